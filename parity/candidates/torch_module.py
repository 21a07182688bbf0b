"""A candidate that is a torch module: built by its factory, hooked, run once and recorded to a dump."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from parity.candidates.base import Candidate
from parity.candidates.decoding import Given, calling, calls_of
from parity.candidates.recording import Call, Names, Recording
from parity.candidates.tapping import tapping_check
from parity.candidates.transformers_taps import between_modules, is_compiled, places_of
from parity.dump import ArchiveWriter, Array, Dump, NameMap, left_out, open_dump, rename, sites_of
from parity.errors import CandidateError
from parity.load_object import describe, misfit
from parity.record.arrays import to_numpy
from parity.record.experts import CHOICES, GIVEN, ROUTED
from parity.record.tap import Tap, first_tensor, quiet_torch, tapping, without_wrappers
from parity.reference.batch import Batch
from parity.reference.checkpoint import Checkpoint, Weights
from parity.reference.integrity import weight_check
from parity.reference.module_weights import ModuleWeights
from parity.reference.precision import unit_roundoff
from parity.results import Check
from parity.run_spec import RunSpec
from parity.sites import CALL, Dims, Site

Build = Callable[[RunSpec], nn.Module]
Feed = Callable[[str, int, int, Tensor], Tensor]
_ROUTING = tuple(zip(ROUTED, GIVEN, strict=True))


class TorchModule(Candidate):
    """A module that takes token ids (b, t) and returns logits (b, t, vocab); it is built when it is first needed.

    A site is the output of the submodule of the same name, or of one that `names` maps to it (it is recorded under
    the submodule's name); the logits are what the module returns.
    """

    in_calls = True
    pads = True

    def __init__(self, name: str, build: Build, names: NameMap) -> None:
        self.name = name
        self._build, self._names, self.not_observable = build, names, left_out(names)
        self._module: nn.Module | None = None
        self._tapping: Check | None = None

    @classmethod
    def of(cls, module: object, names: NameMap) -> Self:
        """A module that stands in memory already; it stays its owner's."""
        if not isinstance(module, nn.Module):
            raise CandidateError(f"candidate: found {type(module).__name__}, expected a torch.nn.Module or a SPEC.")
        return cls(type(module).__name__, lambda _run: module, names)

    @classmethod
    def from_factory(cls, spec: str, factory: Callable[..., Any], names: NameMap) -> Self:
        """The module that `factory(model_dir, dtype, device)` returns."""
        return cls(spec, lambda run: _made(spec, factory, run), names)

    def record(self, run: RunSpec, sites: Sequence[Site], path: Path) -> Dump:
        """Run the module once and write what it has of `sites` to `path`.

        Where `run.calls` are several, it runs in as many, with its own cache, and what they recorded is joined.
        Raises CandidateError when the module fails, returns no logits, calls a submodule more often than once
        for each of its names, or has no cache where it needs one.
        """
        module, own = self._loaded(run), self._own(run, sites)
        parts = calls_of(module, run.batch, run.calls, _device(module, run))
        untapped = _untapped(module, parts) if is_compiled(module) else None
        dims = {s.name: tuple(d for d in s.dims if d != CALL) for s in own if s.where != "output"}
        if len(parts) > 1 and len(set(run.calls)) == 1:  # then sizes do not tell tokens from heads
            dims = self._own_axes(run, sites) | dims
        names = Names(self._names, sites, own, _names_of(module))
        with ArchiveWriter(path, run.info(self.name)) as writer:
            step, answers = calling(module, len(parts)), list[Tensor]()
            for number, given in enumerate(parts):
                size, seen = run.calls[number], sum(run.calls[: number + 1])
                recording = Recording(writer, names, dims, Call(number, size, seen) if len(parts) > 1 else None)
                answers.append(_run(module, given, own, recording.tap, step))
                recording.finish(answers[-1], run.batch.part(slice(None), slice(seen - size, seen)))
        if untapped is not None:
            logits = torch.cat(answers, dim=1)
            moved = float((logits.double() - untapped.double()).norm() / untapped.double().norm())
            self._tapping = tapping_check(moved, unit_roundoff(untapped.dtype), len(own))
        return rename(open_dump(path), self._names)

    def fed(self, run: RunSpec, sites: Sequence[Site], feed: Feed) -> list[Tensor]:
        """Run the module in `run.calls`; what flows on from a site is `feed(site, tokens before, tokens, value)`.

        Values have any shape. Returns the logits (b, t, vocab) of each call. Raises CandidateError.
        """
        module, own = self._loaded(run), self._own(run, sites)
        parts = calls_of(module, run.batch, run.calls, _device(module, run))
        step, start, answers = calling(module, len(parts)), 0, list[Tensor]()
        for given, size in zip(parts, run.calls, strict=True):

            def tap(site: str, value: Tensor, start: int = start, tokens: int = size) -> Tensor:
                return feed(next(iter(sites_of(self._names, site)), site), start, tokens, value)

            answers.append(_run(module, given, own, tap, step))
            start += size
        return answers

    def own_weights(self) -> Weights | None:
        """The module's parameters, if a library has quantized some of them."""
        return None if self._module is None else ModuleWeights.of(self.name, self._module)

    def outputs(self, run: RunSpec) -> dict[str, Array]:
        """What each submodule returns on its first call with `run.ids` (b, t), any shape, by name: children first."""
        module, found = self._loaded(run), dict[str, Array]()
        every = [Site(name, (), (), "", path) for name, path in places_of(module).items() if name]

        def tap(name: str, value: Tensor) -> Tensor:
            if name not in found:
                found[name] = to_numpy(value.clone())  # a model may write into it later
            return value

        (given,) = calls_of(module, run.batch, run.ids.shape[1:], _device(module, run))
        _run(module, given, every, tap, calling(module, 1))
        return found

    def checks(self, checkpoint: Checkpoint) -> list[Check]:
        """Whether the module's parameters are the checkpoint's, and a compiled module's run was not changed by taps."""
        weights = [weight_check(self._module, checkpoint)] if self._module is not None else []
        return [*weights, *([self._tapping] if self._tapping is not None else [])]

    def axes(self, run: RunSpec, sites: Sequence[Site]) -> dict[str, Dims]:
        """Found by running the module on fewer tokens and rows. Of two axes that count tokens the second is "key"."""
        found = self._own_axes(run, sites)
        return {ours: dims for site, dims in found.items() for ours in sites_of(self._names, site)}

    def _own_axes(self, run: RunSpec, sites: Sequence[Site]) -> dict[str, Dims]:
        """The same by the module's own names."""
        module, own, batch = self._loaded(run), self._own(run, sites), run.batch
        every, (rows, tokens), device = slice(None), batch.shape, _device(module, run)

        def shapes(part: Batch) -> dict[str, tuple[int, ...]]:
            return _shapes(module, calls_of(module, part, part.shape[1:], device)[0], own)

        full = shapes(batch)
        fewer_tokens = shapes(batch.part(every, slice(tokens - 1))) if tokens > 1 else full
        fewer_rows = shapes(batch.part(slice(rows - 1), every)) if rows > 1 else full
        return {
            site: _labels(shape, fewer_tokens.get(site, shape), fewer_rows.get(site, shape))
            for site, shape in full.items()
        }

    def close(self) -> None:
        """Let go of the module and its weights."""
        self._module = None

    def _loaded(self, run: RunSpec) -> nn.Module:
        if self._module is None:
            self._module = self._build(run)
        return self._module

    def _own(self, run: RunSpec, sites: Sequence[Site]) -> list[Site]:
        """The submodules that are sites of the reference, by their name or by the name map, under their own names.

        What a module of experts is given counts too, where it has the reference's name, and so does what lies between
        modules of transformers' own classes.
        """
        module, wanted = self._loaded(run), {site.name: site for site in sites}
        places = places_of(module)
        # A router is free to choose as it likes: what it chose is what its experts are given.
        others = [site for site in sites if site.where not in CHOICES]
        inner = {site.name: site for site in between_modules(module, others, places)}
        given = {f"{name}.{end}": (path, at) for name, path in places.items() for end, at in _ROUTING}
        return [
            *inner.values(),
            *(
                replace(sites[0], name=name, module=path, where="output")
                for name, path in places.items()
                if name and name not in inner and not wanted.keys().isdisjoint(sites_of(self._names, name))
            ),
            *(
                replace(wanted[site], module=path, where=where)
                for site, (path, where) in given.items()
                if site in wanted and site not in inner and site not in places
            ),
        ]


def _made(spec: str, factory: Callable[..., Any], run: RunSpec) -> nn.Module:
    """What the candidate's factory returns. Raises CandidateError for anything that goes wrong in it."""
    path = run.checkpoint.path
    if reason := misfit(factory, "model_dir", "dtype", "device"):
        raise CandidateError(f"candidate {spec!r}: {reason}. Give it these three parameters.")
    try:
        # Whatever a candidate prints, standard output belongs to the report.
        with redirect_stdout(sys.stderr):
            module = factory(str(path), run.dtype, run.device)
    except (Exception, SystemExit) as error:
        raise CandidateError(f"candidate {spec!r}: loading {path} failed with {describe(error)}") from error
    if not isinstance(module, nn.Module):
        raise CandidateError(f"candidate {spec!r}: returned {type(module).__name__}, expected a torch.nn.Module.")
    return module.eval()


def _device(module: nn.Module, run: RunSpec) -> torch.device:
    """Where the module is: it may be elsewhere than the reference."""
    return next((parameter.device for parameter in module.parameters()), torch.device(run.device))


def _names_of(module: nn.Module) -> dict[str, list[str]]:
    """Every place where a submodule stands, by the first of them."""
    places: dict[nn.Module, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        places.setdefault(child, []).append(without_wrappers(name))
    return {names[0]: names for names in places.values()}


def _labels(shape: Dims | tuple[int, ...], fewer_tokens: tuple[int, ...], fewer_rows: tuple[int, ...]) -> Dims:
    labels = ["_"] * len(shape)
    for i in _changed(shape, fewer_rows):
        labels[i] = "batch"
    for name, i in zip(("token", "key"), _changed(shape, fewer_tokens), strict=False):
        labels[i] = name if labels[i] == "_" else "batch*token"
    return tuple(labels)


def _changed(shape: tuple[Any, ...], other: tuple[int, ...]) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b]


@contextmanager
def _compiled_anew(module: nn.Module) -> Iterator[None]:
    """A compiled module does not look for hooks again: what was compiled before they came, or with them, must go."""
    if not is_compiled(module):
        yield
        return
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def _untapped(module: nn.Module, parts: Sequence[Given]) -> Tensor:
    step = calling(module, len(parts))
    return torch.cat([_run(module, given, [], lambda _site, value: value, step) for given in parts], dim=1)


def _shapes(module: nn.Module, given: Given, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        shapes[site] = tuple(value.shape)
        return value

    _run(module, given, sites, tap, calling(module, 1))
    return shapes


def _run(module: nn.Module, given: Given, sites: Sequence[Site], tap: Tap, call: Callable[[Given], Any]) -> Tensor:
    try:
        with (
            _compiled_anew(module),
            quiet_torch(),
            redirect_stdout(sys.stderr),
            tapping(module, sites, tap, every_call=True),
        ):
            output: Any = call(given)
    except CandidateError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and (reason := misfit(module.forward, "input_ids")):
            raise CandidateError(
                f"the candidate's forward cannot be called: {reason}. "
                "Give what it wants a default, or return a wrapper whose forward(input_ids) makes it."
            ) from error
        raise CandidateError(f"the candidate failed in its forward pass with {describe(error)}") from error
    logits = first_tensor(output)
    if logits is None:
        raise CandidateError(f"the candidate returned {type(output).__name__}, expected logits as a tensor.")
    return logits
