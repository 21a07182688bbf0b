"""A candidate that is a torch module: built by its factory, hooked, run once and recorded to a dump."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parity.candidates.spec import describe, load_factory
from parity.dump import ArchiveWriter, RunInfo
from parity.errors import CandidateError
from parity.record.arrays import to_numpy
from parity.record.tap import first_tensor, quiet_torch, tapping
from parity.sites import Site

Progress = Callable[[str], None]


def build(spec: str, model_dir: Path, dtype: str, device: str) -> nn.Module:
    """Call the candidate's factory. Raises CandidateError for anything that goes wrong in it."""
    factory = load_factory(spec)
    try:
        module = factory(str(model_dir), dtype, device)
    except Exception as error:
        raise CandidateError(f"candidate {spec!r}: loading {model_dir} failed with {describe(error)}") from error
    if not isinstance(module, nn.Module):
        raise CandidateError(f"candidate {spec!r}: returned {type(module).__name__}, expected a torch.nn.Module.")
    return module.eval()


def record(module: nn.Module, input_ids: Tensor, sites: Sequence[Site], path: Path, info: RunInfo) -> None:
    """Run the module once on token ids (b, t), and write what it has of `sites` to `path`.

    A site is the output of the module's submodule of the same name; the logits are what the module returns.
    Raises CandidateError when the module fails, returns no logits or has no site at all.
    """
    with ArchiveWriter(path, info) as writer:
        seen: set[str] = set()

        def tap(site: str, value: Tensor) -> Tensor:
            # A module that is called twice in one pass is recorded once, as the reference calls it once.
            if site not in seen:
                seen.add(site)
                writer.add(site, to_numpy(value), None)
            return value

        _run(module, input_ids, own_sites(module, sites), tap)
        if not seen:
            raise CandidateError(
                "the candidate has no submodule with a name that the reference has, so nothing could be recorded. "
                "Name its modules as the checkpoint does (`parity sites` lists the names); nn.Identity will do."
            )


def token_axes(module: nn.Module, input_ids: Tensor, sites: Sequence[Site]) -> dict[str, tuple[str, ...]]:
    """Which axis of each site counts tokens, found by running the module with one token less.

    Names only that axis; the others are "_". A site whose shape does not change stays out.
    """
    long = _shapes(module, input_ids, sites)
    short = _shapes(module, input_ids[:, :-1], sites)
    axes: dict[str, tuple[str, ...]] = {}
    for site, shape in long.items():
        changed = [i for i, (a, b) in enumerate(zip(shape, short.get(site, shape), strict=False)) if a != b]
        if len(changed) == 1:
            axes[site] = tuple("token" if i == changed[0] else "_" for i in range(len(shape)))
    return axes


def own_sites(module: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """The reference's sites that the module has, each as the output of the submodule of that name."""
    names = {name for name, _ in module.named_modules()}
    return [replace(site, module=site.name, where="output") for site in sites if site.name in names]


def _shapes(module: nn.Module, input_ids: Tensor, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        shapes.setdefault(site, tuple(value.shape))
        return value

    _run(module, input_ids, own_sites(module, sites), tap)
    return shapes


def _run(module: nn.Module, input_ids: Tensor, sites: Sequence[Site], tap: Callable[[str, Tensor], Tensor]) -> None:
    try:
        with quiet_torch(), tapping(module, sites, tap):
            output: Any = module(input_ids)
    except Exception as error:
        raise CandidateError(f"the candidate failed in its forward pass with {describe(error)}") from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits if logits is not None else first_tensor(output), torch.Tensor):
        raise CandidateError(f"the candidate returned {type(output).__name__}, expected logits as a tensor.")
