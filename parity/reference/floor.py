"""Local error, floor and ratio of one replayed site: the numbers that the verdict rests on.

With r = candidate − truth, row by row (a row is a token, or a head of a token):

    floor² = max(‖reference in the working dtype − truth‖, ‖truth rounded for storage − truth‖,
                 0.3 u ‖truth‖, 2⁻²⁴ √(n / 6) ‖truth‖, 2⁻²⁴ · 1.5 / √rows ‖truth‖)²
             + ‖truth on jittered inputs − truth‖²   (only where operations may have been fused)

The n in the maximum: adding n products one after another in float32, as a plain loop in C or Rust does, costs that
much. Partial sums grow like a random walk, and each is rounded once. Libraries that add in blocks are better than
that, and no port is wrong for not being a library. The last one: a number that a whole row shares (the scale of a
norm) is rounded once for each row, and of few rows the reference may have drawn the luckier ones.

The ratio R is the larger of ‖r‖ / ‖floor‖ over the whole tensor and the median of the row ratios: the first
sees an error anywhere, the second is not swallowed by one row of massive activations. Beside it stands the worst
single row, whose floor is not smaller than the usual one: few wrong rows are lost in both. Each is divided by what
chance may make of so few numbers, or of the worst of so many rows (parity.reference.chance), where that is more
than the limit allows for; rows that repeat each other, as those of a repeated token do, count once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from parity.reference import chance
from parity.reference.replay import Replayed
from parity.reference.row_sums import MASKED, measuring_rows
from parity.reference.rows import (
    Floats,
    Kept,
    Rows,
    chances,
    first_read,
    no_less_than_usual,
    ratios,
    relative,
    statistic,
    structure,
    tokens_of,
)
from parity.reference.transfer import Task, row_blocks, run_together
from parity.results import Structure


@dataclass(frozen=True)
class Local:
    """One site's local error against its floor. Relative numbers are ‖·‖ / ‖truth‖, dimensionless.

    ratio is on the strict floor, ratio_fused on the floor that allows for fused operations, and so is row_ratio:
    the worst row over the usual floor; worst_tokens are those of up to eight such rows, of so many tokens, where rows
    are tokens'. There are rows of so many kinds (row_sums.alike), each of so many numbers (width).
    reference_rel is the reference's own error alone. way says in words which legal way the site was measured against,
    where it was not the reference's. first_read is the first call that reads something wrong of a cache.
    bit_equal means: the same bits as the reference in the working dtype on the same inputs.
    """

    ratio: float
    ratio_fused: float
    row_max: float
    row_ratio: float
    worst_tokens: tuple[int, ...]
    tokens: int
    kinds: int
    width: int
    local_rel: float
    floor_rel: float
    reference_rel: float
    inherited_rel: float
    total_ratio: float
    bit_equal: bool
    must_be_exact: bool
    all_zero: bool
    nonfinite: int
    nonfinite_inputs: bool
    reference_nonfinite: int
    structure: Structure
    first_read: int | None = None
    way: str = ""


def local_error(site: Replayed, working: torch.dtype, storage: torch.dtype, head_dim: int | None) -> Local:
    """Measure a replayed site.

    `storage` is the dtype whose grid the candidate's numbers lie on; `head_dim` splits flattened heads.
    """
    return run_together([measuring_local(site, working, storage, head_dim)])[0]


def measuring_local(site: Replayed, working: torch.dtype, storage: torch.dtype, head_dim: int | None) -> Task[Local]:
    """`local_error` as a task that shares its transfers with others."""
    rows = yield from measuring_rows(site, working, storage, head_dim)
    allowed = None if site.allowed is None else (yield site.compared(site.allowed))
    kept = None if site.text is None else (yield site.text).reshape(-1) > 0
    with np.errstate(all="ignore"):
        return _local(site, rows, allowed, kept, working)


@dataclass(frozen=True)
class Yardstick:
    """What many values at one site are measured by: the floor of each row is the same for all of them.

    `site` is the replayed site, whoever its candidate is, and `rows` its sums.
    """

    site: Replayed
    rows: Rows

    @classmethod
    def of(cls, site: Replayed, working: torch.dtype, head_dim: int | None) -> Yardstick | None:
        """None where numbers are masked or not finite, so that which of them count depends on the value."""
        truth = site.truth
        some = site.compared(truth) if isinstance(truth, Tensor) else truth
        if not (isinstance(some, Tensor) and some.numel() and bool((some.isfinite() & (some > MASKED)).all())):
            return None
        return cls(site, run_together([measuring_rows(site, working, working, head_dim)])[0])

    def ratio(self, value: Tensor) -> float | None:
        """`local_error(…).ratio` of a value (b, t, d) in place of the candidate's; None if it is not finite."""
        truth = self.site.truth
        if not isinstance(truth, Tensor) or value.shape != truth.shape:
            return None
        values = (self.site.compared(x) for x in (value.to(truth.device), truth))
        flat = (x.reshape(-1, truth.shape[-1]) for x in values)
        errors = (x.to(exact.dtype) - exact for x, exact in row_blocks(*flat))
        rr = torch.cat([torch.linalg.vecdot(error, error) for error in errors]).double().cpu().numpy()
        if not np.isfinite(rr).all():
            return None
        freedom = chance.in_row(truth.shape[-1])
        with np.errstate(all="ignore"):
            rows = replace(self.rows, rr=rr)
            return statistic(rows, _strict(rows), lambda count: chance.of_sample(freedom * count))


def _strict(rows: Rows) -> Floats:
    """The floor of each row; none where nothing is rounded."""
    return np.zeros_like(rows.yy) if _must_be_exact(rows) else rows.floor


def _must_be_exact(rows: Rows) -> bool:
    return not (rows.ee.any() or rows.ss.any() or rows.qq.any())


def _local(site: Replayed, rows: Rows, allowed: Floats | None, kept: Kept, working: torch.dtype) -> Local:
    shape, dims = tuple(site.truth.shape), site.site.dims
    strict = _strict(rows)
    if allowed is not None:
        strict = np.maximum(strict, allowed.reshape(-1))
    fused = strict + rows.qq
    by_row = ratios(rows.rr, strict)
    # What another way may be off by, all of a row shares; in float32 that may be most of any error.
    freedom = chance.in_row(shape[-1]) if allowed is None else 1.0
    alone = 1.0 if working is torch.float32 else freedom
    strays: Callable[[float], float] = chance.of_sample if allowed is None else chance.of_known

    def stray(count: float) -> float:
        return strays(freedom * count)

    by_usual = ratios(rows.rr, no_less_than_usual(fused, rows.yy)) / chances(alone, dims, shape, kept)
    worst = float(by_usual.max()) if by_row.size else 0.0
    return Local(
        ratio=statistic(rows, strict, stray),
        ratio_fused=statistic(rows, fused, stray),
        row_max=float(by_row.max()) if by_row.size else 0.0,
        row_ratio=worst,
        worst_tokens=tokens_of(by_usual, worst, dims, shape, kept),
        tokens=shape[dims.index("token")] if "token" in dims[:-1] else 0,
        kinds=int(rows.kinds.max()) + 1 if by_row.size else 0,
        width=shape[-1],
        local_rel=relative(rows.rr, rows.yy),
        floor_rel=relative(strict, rows.yy),
        reference_rel=relative(rows.ee, rows.yy),
        inherited_rel=relative(rows.inherited, rows.yy),
        total_ratio=relative(rows.total, rows.own_total),
        bit_equal=rows.counts["different"] == 0,
        must_be_exact=_must_be_exact(rows),
        all_zero=rows.counts["candidate nonzero"] == 0 and rows.counts["truth nonzero"] > 0,
        nonfinite=rows.counts["candidate nonfinite"],
        nonfinite_inputs=rows.counts["truth nonfinite"] > 0,
        reference_nonfinite=rows.counts["floor nonfinite"],
        structure=structure(rows, strict, dims, shape, kept),
        first_read=first_read(rows, strict, dims, shape, kept),
    )
