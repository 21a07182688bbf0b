"""How far one tensor is from another: errors, angles and ULPs, in one pass where the tensors are.

Tensors are read in blocks that suit the device and widened there. Numbers of 16 bits or less are squared and added
along rows in float32, rows and all else in float64. What that is too narrow for (squares beyond float32, NaN,
infinities) shows in the sums, and is read once more with more care.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite, nan, sqrt

import torch
from torch import Tensor

from parity.reference.transfer import Floats, Task, row_blocks
from parity.results import ULP_BINS

_FLOATS = (
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
)  # from coarse to fine
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Mean squares below this may have lost numbers whose squares underflow in float32.
_SMALL = 1e-30
# Squares of float64 are taken as they are between these; otherwise the numbers are scaled first.
_LEAST, _SCALE = 2.0**-900, 2.0**600


@dataclass(frozen=True)
class Metrics:
    """What is found in a pair of tensors, candidate c and reference r.

    NaN clashes with everything, itself included; an infinity with all but itself. A single clash makes `mse`,
    `max_abs`, `rel_l2`, `ulp_max` and `ulp_mean` inf and `cosine` nan: none looks like agreement. Equal
    infinities differ by zero and add nothing to the norms. Empty tensors are equal.
    """

    count: int  # pairs of elements
    mse: float  # mean of (c − r)², in squared units of the tensors
    cosine: float  # of the angle between the flattened tensors; 1 if both are zero, 0 if only one is
    max_abs: float  # largest |c − r|, in units of the tensors
    rel_l2: float  # ‖c − r‖ / ‖r‖; if r is zero: 0 if c is zero too, else inf
    ulp_max: float  # distance in ULP as `ulp_distance` defines it
    ulp_mean: float
    nonfinite_candidate: int  # elements that are NaN or infinite
    nonfinite_reference: int
    bit_equal: bool  # same dtype, same bits, no NaN; −0.0 and +0.0 have different bits


def measuring(candidate: Tensor, reference: Tensor) -> Task[Metrics]:
    """All elementwise metrics of a pair of tensors.

    Shapes: equal, otherwise any. Dtypes: floats of 8 (e4m3fn, e5m2), 16, 32 or 64 bits, integers up to int64 and bool;
    the two may differ. Differences of integers are exact. Sums of numbers of 16 bits or less are good to 1e-6, others
    are computed in float64; of two float64 tensors more than about 1e150 apart, the smaller counts as zero.

    Raises: ValueError if shapes differ, TypeError for any other dtype.
    """
    _check(candidate, reference)
    narrow = all(x.is_floating_point() and x.element_size() <= 2 for x in (candidate, reference))
    sums = _Sums.of((yield _sums(candidate, reference, torch.float32 if narrow else torch.float64)))
    if narrow and not sums.is_sure(candidate.numel()):
        sums = _Sums.of((yield _sums(candidate, reference, torch.float64)))
    careful = not isfinite(sums.cc + sums.rr)
    if careful:
        sums = _Sums.of((yield _sums(candidate, reference, torch.float64, careful=True)))
    scale, size = 1.0, sums.cc + sums.rr + sums.dd
    if torch.float64 in (candidate.dtype, reference.dtype) and not _LEAST < size < inf:
        scale = _SCALE if size < 1.0 else 1 / _SCALE
        scaled = _Sums.of((yield _sums(candidate, reference, torch.float64, careful=careful, scale=scale)))
        sums = replace(sums, cc=scaled.cc, rr=scaled.rr, dd=scaled.dd)
    return _metrics(sums, candidate.numel(), scale)


def counting_ulps(a: Tensor, b: Tensor) -> Task[tuple[int, ...]]:
    """How many pairs of numbers are how far apart, in ULP as `ulp_distance` counts them.

    Shapes: equal, otherwise any. One count for the distances up to each of `ULP_BINS`, then one for what is further
    apart or not finite; zeros at the end are left out.

    Raises: ValueError if shapes differ, TypeError as `measuring`.
    """
    _check(a, b)
    counts = yield _histogram(a, b, careful=False)
    if counts[-1]:  # a place beyond the largest number: it may be NaN or infinite
        counts = yield _histogram(a, b, careful=True)
    last = max((place for place, count in enumerate(counts[:-1]) if count), default=-1)
    return tuple(int(count) for count in counts[: last + 1])


@dataclass(frozen=True)
class _Sums:
    """Sums of squares of c, r and their difference, and what else is told of a pair; clashes: see Metrics."""

    cc: float
    rr: float
    dd: float
    max_abs: float
    ulp_max: float
    ulp_sum: float
    changed_bits: float
    nonfinite_candidate: float
    nonfinite_reference: float
    clashes: float

    @classmethod
    def of(cls, sums: Floats) -> _Sums:
        return cls(*sums.tolist())

    def is_sure(self, count: int) -> bool:
        """Whether float32 held all squares: finite, and large enough for those that vanished not to matter."""
        least = _SMALL * count
        sizes = (self.cc, self.rr, self.dd if self.max_abs else inf)
        return isfinite(self.cc + self.rr) and min(sizes) > least


def _metrics(sums: _Sums, count: int, scale: float) -> Metrics:
    c, r, d = sqrt(sums.cc), sqrt(sums.rr), sqrt(sums.dd)
    same = sums.max_abs == 0.0  # rounding of the sums must not make equal tensors differ
    # From the difference, so that rounding of the sums shows least where the angle is small.
    cosine = (1.0 - (sums.dd - (c - r) ** 2) / (2 * c * r)) if c * r else 0.0
    metrics = Metrics(
        count=count,
        mse=sums.dd / max(count, 1) / scale / scale,  # not by scale², which is beyond float64
        cosine=1.0 if same else min(1.0, max(-1.0, cosine)),
        max_abs=sums.max_abs,
        rel_l2=0.0 if same else d / r if r else inf,
        ulp_max=sums.ulp_max,
        ulp_mean=sums.ulp_sum / max(count, 1),
        nonfinite_candidate=int(sums.nonfinite_candidate),
        nonfinite_reference=int(sums.nonfinite_reference),
        bit_equal=not sums.changed_bits and not sums.clashes,
    )
    if sums.clashes:
        return replace(metrics, mse=inf, cosine=nan, max_abs=inf, rel_l2=inf, ulp_max=inf, ulp_mean=inf)
    return metrics


def _sums(c: Tensor, r: Tensor, wide: torch.dtype, *, careful: bool = False, scale: float = 1.0) -> Tensor:
    """The fields of _Sums (10); without care, NaN and infinities spoil cc or rr."""
    if not c.numel():
        return torch.tensor([0.0] * 6 + [float(c.dtype != r.dtype)] + [0.0] * 3, dtype=torch.float64, device=c.device)
    blocks = [_block(x, y, wide, careful, scale) for x, y in row_blocks(_rows(c), _rows(r))]
    sums, largest = (torch.stack(part) for part in zip(*blocks, strict=True))
    added, most = sums.sum(0), largest.amax(0)
    return torch.cat((added[:3], most[:2], added[3:4], most[2:], added[4:]))


def _block(c: Tensor, r: Tensor, wide: torch.dtype, careful: bool, scale: float) -> tuple[Tensor, Tensor]:
    """What adds up over blocks (cc, rr, dd, ulp_sum, nonfinite, nonfinite, clashes), and what is largest."""
    if not careful and _same_bits(c, r):
        x = c.to(wide) if scale == 1.0 else c.to(wide) * scale
        size = torch.linalg.vecdot(x, x).sum(dtype=torch.float64)
        return torch.stack((size, size, *[torch.zeros_like(size)] * 5)), torch.zeros(3, dtype=torch.float64)
    steps = _steps(c, r)
    x, y = c.to(wide), r.to(wide)
    # Exact beyond 2⁵³ too.
    d = steps.double() if _grid(c, r) is None else x - y
    counts = torch.zeros(3, dtype=torch.float64, device=c.device)
    if careful:
        finite, others = x.isfinite(), y.isfinite()
        keep = finite & others
        counts = torch.stack([mask.sum() for mask in (~finite, ~others, ~keep & (x != y))]).double()
        x, y, d, steps = (torch.where(keep, value, 0) for value in (x, y, d, steps))
    low, high = d.aminmax()
    if scale != 1.0:
        x, y, d = x * scale, y * scale, d * scale
    squares = [torch.linalg.vecdot(value, value).sum(dtype=torch.float64) for value in (x, y, d)]
    changed = torch.ones((), device=c.device)
    if c.dtype == r.dtype:
        bits = _BITS[c.element_size()]
        least, most = (c.view(bits) ^ r.view(bits)).aminmax()
        changed = (least != 0) | (most != 0)
    largest = (torch.maximum(high, -low), steps.amax(), changed)
    added = torch.stack((*squares, steps.sum(-1).sum(dtype=torch.float64)))
    return torch.cat((added, counts)), torch.stack([value.double() for value in largest])


def _same_bits(c: Tensor, r: Tensor) -> bool:
    """Whether two tensors on the CPU are the same numbers, bit by bit; a GPU would have to be waited for."""
    bits = _BITS[c.element_size()]
    return c.device.type == "cpu" and c.dtype == r.dtype and torch.equal(c.view(bits), r.view(bits))


def _histogram(a: Tensor, b: Tensor, *, careful: bool) -> Tensor:
    """Counts by bin (len(ULP_BINS) + 1), and whether a number lies beyond the largest of its dtype."""
    if not a.numel():
        return torch.zeros(len(ULP_BINS) + 2, dtype=torch.float64, device=a.device)
    return torch.stack([_count(x, y, careful) for x, y in row_blocks(_rows(a), _rows(b))]).sum(0)


def _count(a: Tensor, b: Tensor, careful: bool) -> Tensor:
    beyond = torch.zeros(1, dtype=torch.float64, device=a.device)
    grid = _grid(a, b)
    if careful or grid is None:
        steps = ulp_distance(a, b)
    else:
        places = [_order(_rounded(x, grid)) for x in (a, b)]
        steps = _apart(*places)
        largest = _order(torch.tensor(torch.finfo(grid).max, dtype=grid, device=a.device))
        ends = torch.stack([end for place in places for end in place.aminmax()])
        beyond = (ends.long().abs() > largest).sum()[None].double()
    # The exponent of the number just below, in float32: 0 up to the first bin's end, 1 to the second, …
    bits = steps.float().clamp_max_(2.0 * ULP_BINS[-1]).view(torch.int32)
    place = ((bits - 1) >> 23).sub_(125).clamp_(0, len(ULP_BINS))
    return torch.cat((_frequencies(place), beyond))


def _frequencies(place: Tensor) -> Tensor:
    """How often each of the numbers 0 … len(ULP_BINS) occurs."""
    if place.device.type == "cpu":
        return torch.bincount(place.flatten(), minlength=len(ULP_BINS) + 1).double()
    # bincount would wait for the device.
    small = place.to(torch.int8)
    return torch.stack([(small == number).sum() for number in range(len(ULP_BINS) + 1)]).double()


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers apart two tensors are, element by element, in float32 or float64.

    Shapes: equal → the same. Units: ULP of the dtype with fewer mantissa bits, to which both sides are
    rounded first (to nearest, ties to even). Zeros of either sign are one number. A finite number that
    overflows in rounding sits one step beyond the largest. Between integers or bools: the absolute
    difference; an integer against a float is rounded like a float. NaN is inf from everything, itself
    included; an infinity is inf from all but itself. Float64: distances above 2⁵³ are rounded.
    """
    x, y, steps = a.double(), b.double(), _steps(a, b)
    if _grid(a, b) is None:
        return steps
    return torch.where(x.isfinite() & y.isfinite(), steps, torch.where(x == y, 0.0, inf).to(steps))


def _steps(a: Tensor, b: Tensor) -> Tensor:
    """Steps between the numbers of two tensors, in float32 where that is exact; whatever where one is not finite."""
    grid = _grid(a, b)
    return _apart(*(v.long() if grid is None else _order(_rounded(v, grid)) for v in (a, b)))


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """Steps between integers, as `_steps` gives them."""
    if x.dtype is torch.int64:
        # They may wrap around, to what is right when read as unsigned.
        apart = torch.maximum(x, y) - torch.minimum(x, y)
        return apart.double() + (apart < 0) * 2.0**64
    narrow = torch.float64 if x.dtype is torch.int32 else torch.float32
    return (x.to(narrow) - y.to(narrow)).abs_()


def _order(values: Tensor) -> Tensor:
    """Floats of one dtype as consecutive integers: 0 for both zeros, then 1, 2, … and −1, −2, …"""
    top = 8 * values.element_size() - 1
    bits = values.view(_BITS[values.element_size()])
    sign = bits >> top
    return (bits & (1 << top) - 1).bitwise_xor_(sign).sub_(sign)


def _rounded(values: Tensor, grid: torch.dtype) -> Tensor:
    """Numbers to the nearest of the grid, ties to even, rounding once; what overflows lies one step beyond.

    torch casts float64 by way of float32, which rounds twice. Rounding to odd first cures that: Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd" (2008).
    """
    if values.dtype == grid or grid in (torch.float32, torch.float64):
        return values.to(grid)
    wide = values if values.is_floating_point() else values.double()
    if wide.dtype is torch.float64:
        single = wide.float()
        towards = torch.sign(wide.abs() - single.abs().double()).nan_to_num(0).int()
        bits = single.view(torch.int32)
        wide = (bits + towards * (~bits & 1)).view(torch.float32)
    narrow = wide.to(grid)
    if grid is torch.float8_e4m3fn:  # has no infinity, and torch stays at the largest number
        beyond = torch.where(wide.signbit(), -1, 127).to(torch.int8)
        narrow = torch.where(wide.abs() > 464, beyond, narrow.view(torch.int8)).view(grid)
    return narrow


def _grid(a: Tensor, b: Tensor) -> torch.dtype | None:
    """The coarser of two dtypes of floats; None between integers."""
    floats = [x.dtype for x in (a, b) if x.is_floating_point()]
    return min(floats, key=_FLOATS.index) if floats else None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)


def _check(candidate: Tensor, reference: Tensor) -> None:
    if candidate.shape != reference.shape:
        raise ValueError(f"shapes differ: candidate {tuple(candidate.shape)}, reference {tuple(reference.shape)}")
    for dtype in (candidate.dtype, reference.dtype):
        if dtype not in _FLOATS + _INTEGERS:
            raise TypeError(f"cannot measure tensors of dtype {dtype}")
