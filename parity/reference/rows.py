"""What the rows of a site say: ratios over all of them, in their middle and of the worst, and where the error is.

A row is all but the last axis. Rows that repeat each other, as those of a repeated token do, count once; rows of
padding do not count. Where there are some, `kept` says of all rows of a site which are compared, and so are among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parity.reference import chance
from parity.results import Structure
from parity.sites import CALL, Dims

_PROFILE_BINS = 256
# A token whose ratio is above this counts as the first one that is wrong.
_FIRST = 3.0
# Rows without a direction are of one kind.
_NOWHERE = -(1 << 19)
# As many tokens are named in the reason for a verdict.
_NAMED = 8
Floats = NDArray[np.float64]
Kept = NDArray[np.bool_] | None


@dataclass(frozen=True)
class Rows:
    """Sums of squares for each row (a row is all but the last axis), and what is summed over all rows.

    rr, ee, ss, qq, yy: the local error, the reference's error, that of storage, that of jitter, and the truth;
    ry: error times truth; floor: the strict floor; inherited, total, own_total: see Measurement.
    channels and heads: energy of the error in units of each row's floor, by last-axis index and by head.
    kinds: for each row the number of its kind (kinds_of).
    """

    channels: Floats
    heads: Floats
    counts: dict[str, int]
    kinds: NDArray[np.int64]
    rr: Floats
    ee: Floats
    ss: Floats
    qq: Floats
    yy: Floats
    ry: Floats
    floor: Floats
    inherited: Floats
    total: Floats
    own_total: Floats


def kinds_of(directions: Floats) -> NDArray[np.int64]:
    """For each row the number of its kind, from its directions (n, 3): equal ones are of one kind."""
    steps = np.nan_to_num(directions, nan=_NOWHERE, posinf=_NOWHERE, neginf=_NOWHERE).astype(np.int64)
    found: NDArray[np.int64] = np.unique(steps @ np.array([1, 1 << 20, 1 << 40]), return_inverse=True)[1]
    return found


def ratios(squares: Floats, floor: Floats) -> Floats:
    """√(squares / floor); 0 / 0 is 0, and any error over no floor is infinite."""
    return np.sqrt(np.where(squares == 0, 0.0, squares / floor))


def statistic(rows: Rows, floor: Floats, stray: Callable[[float], float]) -> float:
    """The ratio over all rows or in their middle, less what chance makes of so many rows."""
    by_row = ratios(rows.rr, floor)
    if not by_row.size:
        return 0.0
    energies = np.bincount(rows.kinds, floor)
    # As many rows of equal size would make a mean as uncertain: one if one row outweighs all others.
    counting = energies.sum() ** 2 / max(np.square(energies).sum(), 1e-300)
    middle = (by_row.size - 1) // 2
    return max(
        chance.less(relative(rows.rr, floor), stray(counting)),
        chance.less(float(np.partition(by_row, middle)[middle]), stray(energies.size)),
    )


def no_less_than_usual(floor: Floats, size: Floats) -> Floats:
    """The floor of each row, or what is usual relative to its size: a row's own floor may be small by chance."""
    some = size > 0
    return np.maximum(floor, np.median(floor[some] / size[some]) * size) if some.any() else floor


def chances(freedom: float, dims: Dims, shape: tuple[int, ...], kept: Kept = None) -> Floats:
    """By how much each row may stray by chance, as the worst of all; those of the last token among themselves."""
    rows = math.prod(shape[:-1]) if kept is None else int(kept.sum())
    every = np.full(shape[:-1], chance.of_worst_row(freedom, rows))
    if "token" in dims[:-1] and rows:
        last = _is_last(dims, shape, kept)
        every[last] = chance.of_worst_row(freedom, int(last.sum()))
    return every.reshape(-1) if kept is None else every.reshape(-1)[kept]


def _is_last(dims: Dims, shape: tuple[int, ...], kept: Kept) -> NDArray[np.bool_]:
    """Which rows are those of the last token that is compared, as (…) for values (…, features)."""
    axis = dims.index("token")
    every = np.ones(shape[:-1], bool) if kept is None else kept.reshape(shape[:-1])
    from_here_on = np.flip(np.cumsum(np.flip(every, axis), axis), axis)
    last: NDArray[np.bool_] = every & (from_here_on == 1)
    return last


def _placed(values: Floats, kept: Kept) -> Floats:
    """A number for each row of a site, 0 where a row is padding."""
    if kept is None:
        return values
    every = np.zeros(kept.size)
    every[kept] = values
    return every


def tokens_of(by_row: Floats, worst: float, dims: Dims, shape: tuple[int, ...], kept: Kept = None) -> tuple[int, ...]:
    """The tokens of the worst rows, in their order; none where a row does not belong to a token."""
    if "token" not in dims[:-1] or not by_row.size:
        return ()
    by_row = _placed(by_row, kept)
    rest = tuple(i for i, dim in enumerate(dims[:-1]) if dim != "token")
    by_token = by_row.reshape(shape[:-1]).max(rest) if rest else by_row
    bad = np.flatnonzero(by_token >= worst / 2)
    return tuple(sorted(bad[np.argsort(-by_token[bad], kind="stable")][:_NAMED].tolist()))


def relative(squares: Floats, size: Floats) -> float:
    """Root mean square over all rows, in units of that of `size`; both are squares, row by row."""
    return float(ratios(squares.sum(), size.sum()))


def structure(rows: Rows, strict: Floats, dims: Dims, shape: tuple[int, ...], kept: Kept = None) -> Structure:
    """Where the error is, by the floor of each row, for values of this shape and these axes."""
    weight = 1 / np.where(rows.floor > 0, rows.floor, 1.0)
    ry, energy, size = (float((x * weight).sum()) for x in (rows.ry, rows.rr, rows.yy))
    placed = _placed(rows.rr, kept), _placed(strict, kept)
    by_token = _profile(*placed, dims, shape, "token")
    channel = int(rows.channels.argmax()) if rows.channels.size else 0
    if rows.heads.size > 1:
        # Energy is in units of each row's whole floor, of which one head has its share.
        by_head = np.sqrt(rows.heads / max(rows.rr.size, 1) * rows.heads.size)
    else:
        by_head = _profile(*placed, dims, shape, "head")
    return Structure(
        gain=ry / size if size else 0.0,
        cosine=ry / math.sqrt(energy * size) if energy and size else 0.0,
        by_token=_bins(_without_gaps(by_token, dims, shape, kept)),
        by_head=tuple(by_head.tolist()),
        channel=channel,
        channel_share=float(rows.channels[channel] / rows.channels.sum()) if energy else 0.0,
        first_token=_first(by_token),
        elements=rows.rr.size * shape[-1],
        pooled=_pooled(by_token),
    )


def first_read(rows: Rows, strict: Floats, dims: Dims, shape: tuple[int, ...], kept: Kept = None) -> int | None:
    """The first call that reads something wrong of a cache, for values of this shape; None where no call does."""
    return _first(_profile(_placed(rows.rr, kept), _placed(strict, kept), dims, shape, CALL))


def _first(profile: Floats) -> int | None:
    return next((i for i, value in enumerate(profile.tolist()) if value > _FIRST), None)


def _profile(rr: Floats, floor: Floats, dims: Dims, shape: tuple[int, ...], axis: str) -> Floats:
    """Ratio along one axis of the rows; empty if the rows have no such axis."""
    rows = dims[:-1]
    if axis not in rows:
        return np.zeros(0)
    rest = tuple(i for i, dim in enumerate(rows) if dim != axis)
    return ratios(rr.reshape(shape[:-1]).sum(rest), floor.reshape(shape[:-1]).sum(rest))


def _without_gaps(by_token: Floats, dims: Dims, shape: tuple[int, ...], kept: Kept) -> Floats:
    """The profile with what is usual in place of a token that is padding in every row."""
    if kept is None or not by_token.size or not kept.any():
        return by_token
    rest = tuple(i for i, dim in enumerate(dims[:-1]) if dim != "token")
    some = kept.reshape(shape[:-1]).any(rest)
    return np.where(some, by_token, np.median(by_token[some]))


def _bins(profile: Floats) -> tuple[float, ...]:
    """At most 256 numbers, each the largest of its neighbours."""
    starts = range(0, profile.size, _pooled(profile))
    return tuple(np.maximum.reduceat(profile, starts).tolist()) if profile.size else ()


def _pooled(profile: Floats) -> int:
    return max(1, math.ceil(profile.size / _PROFILE_BINS))
