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
single row, whose floor is no smaller than the usual one: few wrong rows are lost in both. Each is divided by what
chance may make of so few numbers, or of the worst of so many rows (parity.reference.chance), where that is more
than the limit allows for; rows that repeat each other, as those of a repeated token do, count once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parity.reference import chance
from parity.reference.precision import unit_roundoff
from parity.reference.replay import Replayed
from parity.reference.rows import (
    Floats,
    Rows,
    alike,
    chances,
    no_less_than_usual,
    ratios,
    relative,
    statistic,
    structure,
    tokens_of,
)
from parity.results import Structure
from parity.sites import FLATTENED

# A correct rounding is rarely smaller than this share of the unit roundoff, so no floor is.
_LEAST_SHARE = 0.3
# What rounds a number that a whole row shares, in unit roundoffs of float32: a mean, its root, and their product.
_SHARED = 1.5
_MASKED = -1e30
_HIDDEN = -1e3
_HEADS = f"head{FLATTENED}head_dim"
# Elements in a block: a handful of float32 temporaries of this size fit a usual L2 cache.
_BLOCK = 1 << 15


@dataclass(frozen=True)
class Local:
    """One site's local error against its floor. Relative numbers are ‖·‖ / ‖truth‖, dimensionless.

    ratio is on the strict floor, ratio_fused on the floor that allows for fused operations, and so is row_ratio:
    the worst row over the usual floor; worst_tokens are those of up to eight such rows, of so many tokens, where rows
    are tokens'. There are rows of so many kinds (alike), each of so many numbers (width).
    reference_rel is the reference's own error alone. way says in words which legal way the site was measured against,
    where it was not the reference's.
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
    way: str = ""


@np.errstate(all="ignore")
def local_error(site: Replayed, working: torch.dtype, storage: torch.dtype, head_dim: int | None) -> Local:
    """Measure a replayed site.

    `storage` is the dtype whose grid the candidate's numbers lie on; `head_dim` splits flattened heads.
    """
    rows = _measure_rows(site, working, storage, head_dim)
    shape, dims = tuple(site.truth.shape), site.site.dims
    must_be_exact = not (rows.ee.any() or rows.ss.any() or rows.qq.any())
    strict = np.zeros_like(rows.yy) if must_be_exact else rows.floor
    if site.allowed is not None:
        strict = np.maximum(strict, _numpy(site.allowed).reshape(-1))
    fused = strict + rows.qq
    by_row = ratios(rows.rr, strict)
    # What another way may be off by, all of a row shares; in float32 that may be most of any error.
    freedom = chance.in_row(shape[-1]) if site.allowed is None else 1.0
    alone = 1.0 if working is torch.float32 else freedom
    strays: Callable[[float], float] = chance.of_sample if site.allowed is None else chance.of_known

    def stray(count: float) -> float:
        return strays(freedom * count)

    by_usual = ratios(rows.rr, no_less_than_usual(fused, rows.yy)) / chances(alone, dims, shape)
    worst = float(by_usual.max()) if by_row.size else 0.0
    return Local(
        ratio=statistic(rows, strict, stray),
        ratio_fused=statistic(rows, fused, stray),
        row_max=float(by_row.max()) if by_row.size else 0.0,
        row_ratio=worst,
        worst_tokens=tokens_of(by_usual, worst, dims, shape),
        tokens=shape[dims.index("token")] if "token" in dims[:-1] else 0,
        kinds=int(rows.kinds.max()) + 1 if by_row.size else 0,
        width=shape[-1],
        local_rel=relative(rows.rr, rows.yy),
        floor_rel=relative(strict, rows.yy),
        reference_rel=relative(rows.ee, rows.yy),
        inherited_rel=relative(rows.inherited, rows.yy),
        total_ratio=relative(rows.total, rows.own_total),
        bit_equal=rows.counts["different"] == 0,
        must_be_exact=must_be_exact,
        all_zero=rows.counts["candidate nonzero"] == 0 and rows.counts["truth nonzero"] > 0,
        nonfinite=rows.counts["candidate nonfinite"],
        nonfinite_inputs=rows.counts["truth nonfinite"] > 0,
        reference_nonfinite=rows.counts["floor nonfinite"],
        structure=structure(rows, strict, dims, shape),
    )


def _measure_rows(site: Replayed, working: torch.dtype, storage: torch.dtype, head_dim: int | None) -> Rows:
    """One pass over the site in blocks that stay in cache: whole-tensor temporaries cost ten times as much."""
    assert site.candidate is not None, "unreachable because only recorded sites are measured"
    width = site.truth.shape[-1]
    values = _Values(site.candidate.to(site.truth.device), site.truth, site.floor, site.jitter, site.own, site.ideal)
    flat = _Values(*(value.reshape(-1, width) for value in values))
    step = max(1, _BLOCK // max(width, 1))
    least = _least(site, working)
    starts = range(0, max(flat.truth.shape[0], 1), step)
    blocks = [_block(_Values(*(f[i : i + step] for f in flat)), storage, least) for i in starts]
    channels = _numpy(torch.stack([block.channels for block in blocks]).sum(0))
    heads = width // head_dim if site.site.dims[-1] == _HEADS and head_dim and width % head_dim == 0 else 1
    return Rows(
        channels,
        channels.reshape(heads, -1).sum(-1),
        {key: sum(block.counts[key] for block in blocks) for key in blocks[0].counts},
        alike(flat.truth),
        *_numpy(torch.cat([block.rows for block in blocks], -1)),
    )


def _numpy(sums: Tensor) -> Floats:
    """What is left of a site is small: numpy is faster there, and a GPU is asked once."""
    return sums.double().cpu().numpy()


def _least(site: Replayed, working: torch.dtype) -> float:
    """The smallest floor that any operation of this kind has, squared, relative to the truth."""
    rows = max(site.truth.numel() // max(site.truth.shape[-1], 1), 1)
    summation = site.summands / 6 if site.summands > 1 else 0.0
    in_float32 = unit_roundoff(torch.float32) ** 2 * max(summation, _SHARED**2 / rows)
    return float(max((_LEAST_SHARE * unit_roundoff(working)) ** 2, in_float32))


class _Values(NamedTuple):
    """The six tensors of a site, or the same rows (n, features) of each."""

    candidate: Tensor
    truth: Tensor
    floor: Tensor
    jitter: Tensor
    own: Tensor
    ideal: Tensor


class _Block(NamedTuple):
    """Rows (10, n) and channels (features) of some of a site's rows, as in Rows."""

    rows: Tensor
    channels: Tensor
    counts: dict[str, int]


def _block(values: _Values, storage: torch.dtype, least: float) -> _Block:
    truth, wide = values.truth, values.truth.dtype
    c, f, o = (x.to(wide) for x in (values.candidate, values.floor, values.own))
    r, y, e = c - truth, truth, f - truth
    s, q = truth.to(storage).to(wide) - truth, values.jitter - truth
    inherited, total, own_total = truth - o, c - values.ideal, o - values.ideal
    plain = _is_plain(truth, r, e, s, q, inherited, own_total)
    if not plain:
        compared = c.isfinite() & truth.isfinite() & (truth > _MASKED)
        r = torch.where(compared, r, _unmasked(c, truth))
        y = torch.where(compared, truth, 0)
        e, s, q, inherited, total, own_total = (
            torch.where(compared & x.isfinite(), x, 0) for x in (e, s, q, inherited, total, own_total)
        )
    rr, ee, ss, qq, yy = (torch.linalg.vecdot(x, x) for x in (r, e, s, q, y))
    others = (torch.linalg.vecdot(x, x) for x in (inherited, total, own_total))
    strict = torch.maximum(torch.maximum(ee, ss), least * yy)
    return _Block(
        torch.stack((rr, ee, ss, qq, yy, torch.linalg.vecdot(r, y), strict, *others)),
        torch.where(strict > 0, 1 / strict, 1.0) @ r.square(),
        {
            "different": int(torch.count_nonzero(c != f)),
            "candidate nonzero": int(torch.count_nonzero(c)),
            "truth nonzero": int(torch.count_nonzero(truth)),
            **_nonfinite(c, truth, f, plain=plain),
        },
    )


def _is_plain(truth: Tensor, *differences: Tensor) -> bool:
    """Whether nothing is NaN, infinite or masked: a sum shows the first two, a minimum the last."""
    if not truth.numel():
        return True
    sums = torch.stack([x.sum() for x in differences])
    return bool(sums.isfinite().all()) and float(truth.min()) > _MASKED


def _nonfinite(candidate: Tensor, truth: Tensor, floor: Tensor, *, plain: bool) -> dict[str, int]:
    names = ("candidate nonfinite", "truth nonfinite", "floor nonfinite")
    if plain:
        return dict.fromkeys(names, 0)
    finite = truth.isfinite()
    # A port may well hide a masked score by an infinity.
    spoilt = ~candidate.isfinite() & finite & ((truth > _MASKED) | candidate.isnan())
    return dict(
        zip(
            names,
            (int(x.sum()) for x in (spoilt, ~finite, ~floor.isfinite() & finite)),
            strict=True,
        )
    )


def _unmasked(candidate: Tensor, truth: Tensor) -> Tensor:
    """The error of a masked score: none if the candidate hides it too, by whatever large negative number."""
    shown = (truth <= _MASKED) & (candidate > _HIDDEN)
    return torch.where(shown, torch.full_like(truth, -_HIDDEN), torch.zeros_like(truth))
