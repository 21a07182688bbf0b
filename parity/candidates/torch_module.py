"""A candidate that is a torch module: built by its factory, hooked, run once and recorded to a dump."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from parity.candidates.spec import load_factory
from parity.dump import ArchiveWriter, NameMap, RunInfo, sites_of
from parity.errors import CandidateError
from parity.load_object import describe
from parity.record.arrays import to_numpy
from parity.record.tap import first_tensor, quiet_torch, tapping
from parity.sites import Site

Progress = Callable[[str], None]


def build(spec: str, model_dir: Path, dtype: str, device: str) -> nn.Module:
    """Call the candidate's factory. Raises CandidateError for anything that goes wrong in it."""
    factory = load_factory(spec)
    try:
        # Whatever a candidate prints, standard output belongs to the report.
        with redirect_stdout(sys.stderr):
            module = factory(str(model_dir), dtype, device)
    except (Exception, SystemExit) as error:
        raise CandidateError(f"candidate {spec!r}: loading {model_dir} failed with {describe(error)}") from error
    if not isinstance(module, nn.Module):
        raise CandidateError(f"candidate {spec!r}: returned {type(module).__name__}, expected a torch.nn.Module.")
    return module.eval()


def record(
    module: nn.Module,
    input_ids: Tensor,
    sites: Sequence[Site],
    path: Path,
    info: RunInfo,
    names: NameMap | None = None,
) -> None:
    """Run the module once on token ids (b, t), and write what it has of `sites` to `path`.

    A site is the output of the module's submodule of the same name, or of one that `names` maps (it is recorded
    under the submodule's name); the logits are what the module returns.
    Raises CandidateError when the module fails, returns no logits or has no site at all.
    """
    with ArchiveWriter(path, info) as writer:
        seen: set[str] = set()

        def tap(site: str, value: Tensor) -> Tensor:
            seen.add(site)
            writer.add(site, to_numpy(value), None)
            return value

        logits = _run(module, input_ids, own_sites(module, sites, names), tap)
        if not seen:
            raise CandidateError(
                "the candidate has no submodule with a name that the reference has, so nothing could be recorded. "
                "Name its modules as the checkpoint does (`parity sites` lists the names); nn.Identity will do."
            )
        if not any(sites[-1].name in sites_of(names or {}, own) for own in seen):
            tap(sites[-1].name, logits)


def known_axes(
    module: nn.Module, input_ids: Tensor, sites: Sequence[Site], names: NameMap | None = None
) -> dict[str, tuple[str, ...]]:
    """Which axes of each site count tokens and rows of the batch, found by running the module on fewer of them.

    The other axes are "_". Of two axes that count tokens the second counts keys.
    """
    own = own_sites(module, sites, names)
    full = _shapes(module, input_ids, own)
    fewer_tokens = _shapes(module, input_ids[:, :-1], own) if input_ids.shape[1] > 1 else full
    fewer_rows = _shapes(module, input_ids[:-1], own) if input_ids.shape[0] > 1 else full
    axes: dict[str, tuple[str, ...]] = {}
    for site, shape in full.items():
        labels = ["_"] * len(shape)
        for i in _changed(shape, fewer_rows.get(site, shape)):
            labels[i] = "batch"
        for name, i in zip(("token", "key"), _changed(shape, fewer_tokens.get(site, shape)), strict=False):
            labels[i] = name if labels[i] == "_" else "batch*token"
        for ours in sites_of(names or {}, site):
            axes[ours] = tuple(labels)
    return axes


def _changed(shape: tuple[int, ...], other: tuple[int, ...]) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b]


def own_sites(module: nn.Module, sites: Sequence[Site], names: NameMap | None = None) -> list[Site]:
    """The submodules that are sites of the reference, by their name or by the name map; each under its own name."""
    wanted = {site.name: site for site in sites}
    return [
        replace(sites[0], name=name, module=name, where="output")
        for name, _ in module.named_modules()
        if name and any(site in wanted for site in sites_of(names or {}, name))
    ]


def _shapes(module: nn.Module, input_ids: Tensor, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        shapes[site] = tuple(value.shape)
        return value

    _run(module, input_ids, sites, tap)
    return shapes


def _run(module: nn.Module, input_ids: Tensor, sites: Sequence[Site], tap: Callable[[str, Tensor], Tensor]) -> Tensor:
    try:
        with quiet_torch(), redirect_stdout(sys.stderr), tapping(module, sites, tap, every_call=True):
            output: Any = module(input_ids)
    except (Exception, SystemExit) as error:
        raise CandidateError(f"the candidate failed in its forward pass with {describe(error)}") from error
    logits = first_tensor(output)
    if logits is None:
        raise CandidateError(f"the candidate returned {type(output).__name__}, expected logits as a tensor.")
    return logits
