"""Where in a guilty site the error lies: its local error over its floor, token by token and head by head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from parity.diagnose.workbench import Workbench
from parity.observer import Observer
from parity.results import Finding, Measurement, Residual, four_digits
from parity.sites import FLATTENED, Dims

# At most so many rows and columns: a picture shows no more, and a report stays small.
_TOKENS, _COLUMNS = 64, 32


def with_error_maps(
    findings: Sequence[Finding], sites: Sequence[Measurement], bench: Workbench, observer: Observer
) -> tuple[Finding, ...]:
    """The findings, each with the residual of its site with the largest ratio."""
    ratios = {m.site: m.ratio or 0.0 for m in sites}
    mapped = list(findings)
    for position, finding in enumerate(findings):
        worst = max(finding.sites, key=ratios.__getitem__)
        with observer.surviving("error map", worst):
            mapped[position] = replace(finding, residual=residual(worst, bench))
    return tuple(mapped)


def residual(site: str, bench: Workbench) -> Residual | None:
    """The residual of one site; None if its operation cannot be run alone, or if it has no tokens."""
    working, precise = bench.reference.working, bench.reference.precise
    with bench.piece(working.piece_of(site)) as at:
        if at is None or site not in at.recorded:
            return None
        truth, floor = (bench.compute(at, [site], model)[site] for model in (precise, working))
    # What is not finite counts as an infinite error here, and must not be passed over.
    largest = torch.finfo(truth.dtype).max
    recorded = at.recorded[site].to(truth).nan_to_num(largest, largest, -largest)
    kind, axis, length = _columns(bench.sites[site].dims, working.head_dim)
    size = truth.shape[axis] // length
    step = math.ceil(size / _COLUMNS) * length
    parts = zip(*(torch.split(value, step, axis) for value in (recorded, truth, floor)), strict=True)
    columns = [
        bench.local(replace(at, recorded={site: candidate}), site, exact, rounded).structure.by_token
        for candidate, exact, rounded in parts
    ]
    rows = tuple(zip(*map(_pooled, columns), strict=True))
    return Residual(site, kind, size, rows) if rows else None


def _columns(dims: Dims, head_dim: int | None) -> tuple[Literal["head", "channel"], int, int]:
    """What to tell apart beside tokens, along which axis, and how many numbers of the axis are one of them."""
    if "head" in dims[:-1]:
        return "head", dims.index("head"), 1
    if dims[-1] == f"head{FLATTENED}head_dim" and head_dim:
        return "head", -1, head_dim
    return "channel", -1, 1


def _pooled(ratios: Sequence[float]) -> tuple[float, ...]:
    """The largest of neighbouring ratios where there are many."""
    width = math.ceil(len(ratios) / _TOKENS) or 1
    return four_digits([max(ratios[i : i + width]) for i in range(0, len(ratios), width)])
