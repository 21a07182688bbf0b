"""The reference's own run in its working dtype and, beside it, exactly: how far rounding alone takes each site."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from parity.compare.align import AmbiguousLayoutError, Pair, align
from parity.compare.conclude import TOTAL
from parity.compare.sides import sized_sites
from parity.dump import Dump
from parity.record.arrays import to_torch
from parity.reference import chance
from parity.reference.batch import Batch
from parity.reference.pieces import Piece, PiecewiseModel
from parity.reference.replay import Reference
from parity.reference.routing import choices_of
from parity.results import Check
from parity.run_spec import RunSpec


def own_runs(reference: Reference, ids: Tensor | Batch) -> Iterator[tuple[Piece, dict[str, tuple[Tensor, Tensor]]]]:
    """For token ids (b, t), piece by piece: the values of each site as the reference computes them, and exact ones."""
    ids = Batch.of(ids)
    reference.prepare(ids)
    hidden: dict[int, Tensor | None] = {0: None, 1: None}
    for piece in reference.working.pieces:
        values: list[dict[str, Tensor]] = []
        with reference.working.loaded(piece), reference.precise.loaded(piece):
            for number, model in enumerate((reference.working, reference.precise)):
                values.append({})
                hidden[number] = _run(model, piece, ids, hidden[number], values[-1])
        yield piece, {site: (values[0][site], values[1][site]) for site in values[0]}


def _run(model: PiecewiseModel, piece: Piece, ids: Batch, hidden: Tensor | None, values: dict[str, Tensor]) -> Tensor:
    overwritten = {site.name for site in model.sites_of(piece) if site.overwritten}

    def keep(site: str, value: Tensor) -> Tensor:
        values[site] = value.clone() if site in overwritten else value
        return value

    return model.run(piece, ids, hidden, keep)


def checked_reference(recording: Dump, run: RunSpec) -> tuple[Reference, Check]:
    """The reference, and whether a recording of it holds what it computes here: else that would go unsaid."""
    reference = Reference(run.model())
    return reference, _recording_check(recording, reference, run)


def _recording_check(recording: Dump, reference: Reference, run: RunSpec) -> Check:
    model = reference.working
    sites = {site.name: site for site in sized_sites(model, run)}
    equal, worst, where = 0, 0.0, ""
    seen = 0
    for _, values in own_runs(reference, run.batch):
        for name, (plain, exact) in values.items():
            entry = recording.entries.get(name)
            if entry is None or not plain.is_floating_point():
                continue
            try:
                pair = align(entry, sites[name], model.head_dim, run.ids.shape[1])
            except AmbiguousLayoutError:
                continue
            if not isinstance(pair, Pair):
                return Check("first dump", False, f"its {name} has the shape {entry.shape}, not that of a recording.")
            recorded = to_torch(pair.read(recording.read(name))).to(plain.device)
            seen += 1
            if recorded.dtype == plain.dtype and bool((recorded == plain).all()):
                equal += 1
                continue
            ratio = _total(recorded, plain, exact)
            worst, where = max((worst, where), (ratio, name))
    if equal == seen:
        return Check("first dump", True, f"its {seen} arrays are those of the reference's own run here")
    detail = f"{seen - equal} of {seen} arrays are not those of the reference here: {where} is {worst:.3g}x as far off"
    # Ties between experts go either way on another machine, and what follows is far off then.
    tied = bool(choices_of(list(model.sites)))
    return Check("first dump", worst <= TOTAL or tied, f"{detail} as the reference; what is compared is its run here")


def _total(recorded: Tensor, plain: Tensor, exact: Tensor) -> float:
    """Distance from the exact values in units of the reference's own, less what chance makes of so few numbers."""
    ours = float((plain.to(exact.dtype) - exact).norm())
    theirs = float((recorded.to(exact.dtype) - exact).norm())
    freedom = chance.in_row(exact.shape[-1]) * (exact.numel() / max(exact.shape[-1], 1))
    if not ours:
        return 0.0 if not theirs else float("inf")
    return theirs / ours / chance.of_sample(freedom)
