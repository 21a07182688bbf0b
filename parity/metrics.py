"""How far one array is from another: errors, angles, ULPs and KL, in one pass over memory.

Arrays are read in tiles that stay in cache, widened to float64 there and forgotten: besides the inputs only
scratch space of a fixed size is used, whatever the shape, strides or dtype. Sums are float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]
DType = np.dtype[Any]

# Eight float64 tiles fill half of a usual 1 MiB L2 cache. OpenBLAS starts threads for dot products of more
# than 10 000 elements, which would cost more than they save and make sums depend on the number of cores.
TILE = 8192
LOGITS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Metrics:
    """What `measure` found in a pair of arrays.

    A pair of elements **clashes** if one of them is NaN or infinite and they are not the same infinity (so
    NaN clashes with NaN). A single clash makes `mse`, `max_abs`, `rel_l2`, `ulp_max` and `ulp_mean` inf and
    `cosine` nan, so that no threshold takes it for agreement. Equal infinities differ by zero and add
    nothing to the norms.

    count                 pairs of elements
    mse                   mean of (c − r)², in squared units of the arrays; 0 if empty
    cosine                of the angle between the flattened arrays; 1 if both are zero, 0 if only one is
    max_abs               largest |c − r|, in units of the arrays
    rel_l2                ‖c − r‖ / ‖r‖; with a zero reference 0 if the candidate is zero too, else inf
    ulp_max, ulp_mean     distance in ULP as `ulp_distance` defines it, over all pairs
    nonfinite_candidate   elements of the candidate that are NaN or infinite
    nonfinite_reference   the same in the reference
    bit_equal             same dtype, same bits and no NaN; −0.0 and +0.0 have different bits
    """

    count: int
    mse: float
    cosine: float
    max_abs: float
    rel_l2: float
    ulp_max: float
    ulp_mean: float
    nonfinite_candidate: int
    nonfinite_reference: int
    bit_equal: bool


def measure(candidate: Array, reference: Array) -> Metrics:
    """All elementwise metrics of a pair of arrays, in one pass and without copying either.

    Shapes: equal, any strides. Dtypes: floats of 8, 16, 32 or 64 bits (those of ml_dtypes too), integers and
    bool; the two may differ. Differences of integers are exact, all else is computed in float64. Only
    float64 values whose squares leave the range of float64 are read a second time, rescaled; of two arrays
    more than about 1e150 apart, the smaller then counts as zero.

    Raises: ValueError if shapes differ, TypeError for any other dtype.
    """
    ruler = _Ruler(candidate, reference)
    with np.errstate(all="ignore"):
        sums = _sums(candidate, reference, ruler)
        scale = _rescue(sums) if np.float64 in (candidate.dtype, reference.dtype) else 1.0
        if scale != 1.0:
            scaled = _sums(candidate, reference, ruler, scale)
            sums = replace(sums, cc=scaled.cc, rr=scaled.rr, cr=scaled.cr, dd=scaled.dd)
    return _metrics(sums, candidate.size, scale)


def ulp_distance(a: Array, b: Array) -> Floats:
    """How many representable numbers apart two arrays are, element by element.

    Shapes: equal; the result has the same. Units: ULP of the dtype with fewer mantissa bits, to which both
    sides are rounded first (to nearest, ties to even). Zeros of either sign are one number; from the
    smallest negative to the smallest positive subnormal it is 2. A finite number that overflows in rounding
    sits one step beyond the largest one. Between integers or bools: the absolute difference; an integer
    against a float is rounded like a float.

    NaN is inf from everything, itself included; an infinity is inf from everything but itself. The result is
    float64: distances of float64 numbers above 2⁵³ are rounded.

    Raises: ValueError if shapes differ, TypeError for dtypes that `measure` does not take.
    """
    ruler = _Ruler(a, b)
    out = np.empty(a.shape, np.float64)
    with np.errstate(all="ignore"):
        for left, right, target in _tiles(a, b, out):
            wide, steps = ruler.read(left, right)
            np.copyto(target, steps, casting="unsafe")
            finite, clash = _nonfinite(wide)
            target[~finite.all(axis=0)] = 0.0
            target[clash] = np.inf
    return out


def kl_divergence(candidate_logits: Array, reference_logits: Array) -> Floats:
    """KL(reference ‖ candidate) of the distributions that two arrays of logits stand for.

    Shapes: both `*rows vocabulary`, equal → `*rows`. Units: nats, in float64 with an absolute error of about
    1e-16 times the largest difference of log probabilities; never negative. A logit of −inf is a token of
    probability zero: inf if the candidate excludes a token that the reference allows. A row that is no
    distribution on either side (NaN, +inf, −inf throughout) gives inf, never nan.

    Raises: ValueError if shapes differ or there is no token, TypeError for dtypes that `measure` does not take.
    """
    _check(candidate_logits, reference_logits)
    if candidate_logits.ndim == 0 or candidate_logits.shape[-1] == 0:
        raise ValueError(f"logits of shape {candidate_logits.shape} have no vocabulary axis or no tokens")
    out = np.empty(candidate_logits.shape[:-1], np.float64)
    with np.errstate(all="ignore"):
        _kl_into(out, candidate_logits, reference_logits)
    return out


@dataclass
class _Sums:
    """Running totals of one pass; c candidate, r reference, d their difference."""

    cc: float = 0.0
    rr: float = 0.0
    cr: float = 0.0
    dd: float = 0.0
    max_abs: float = 0.0
    ulp_max: float = 0.0
    ulp_sum: float = 0.0
    nonfinite_candidate: int = 0
    nonfinite_reference: int = 0
    clashes: int = 0
    same_bits: bool = True


def _metrics(sums: _Sums, count: int, scale: float) -> Metrics:
    clash = sums.clashes > 0
    inf = math.inf
    return Metrics(
        count=count,
        # Twice by scale, whose square is beyond float64.
        mse=inf if clash else sums.dd / max(count, 1) / scale / scale,
        cosine=math.nan if clash else _cosine(sums),
        max_abs=inf if clash else sums.max_abs,
        rel_l2=inf if clash else _rel_l2(sums),
        ulp_max=inf if clash else sums.ulp_max,
        ulp_mean=inf if clash else sums.ulp_sum / max(count, 1),
        nonfinite_candidate=sums.nonfinite_candidate,
        nonfinite_reference=sums.nonfinite_reference,
        bit_equal=sums.same_bits and not clash,
    )


def _cosine(sums: _Sums) -> float:
    if sums.max_abs == 0.0:  # rounding of the three sums must not make equal arrays differ
        return 1.0
    norms = math.sqrt(sums.cc) * math.sqrt(sums.rr)
    return min(1.0, max(-1.0, sums.cr / norms)) if norms else 0.0


def _rel_l2(sums: _Sums) -> float:
    if sums.rr == 0.0:
        return 0.0 if sums.max_abs == 0.0 else math.inf
    return math.sqrt(sums.dd) / math.sqrt(sums.rr)


def _rescue(sums: _Sums) -> float:
    """The power of two by which to scale float64 values so that their squares stay in range; mostly 1."""
    if not math.isfinite(sums.cc + sums.rr + sums.dd):
        return 2.0**-600
    return 2.0**600 if max(sums.cc, sums.rr) < 2.0**-900 else 1.0


def _sums(candidate: Array, reference: Array, ruler: "_Ruler", scale: float = 1.0) -> _Sums:
    sums = _Sums(same_bits=candidate.dtype == reference.dtype)
    scratch = np.empty(TILE)
    for left, right in _tiles(candidate, reference):
        wide, steps = ruler.read(left, right)
        if scale != 1.0:
            wide *= scale
        sums.same_bits = sums.same_bits and np.array_equal(_bits(left), _bits(right))
        _add(sums, wide, steps, scratch[: left.size], ruler.exact)
    return sums


def _add(sums: _Sums, wide: Floats, steps: Array, diff: Floats, exact: bool) -> None:
    """Add one tile; `exact` says that `steps` are the differences themselves. Overwrites all arrays."""
    c, r = wide
    cc, rr = float(c @ c), float(r @ r)
    if not math.isfinite(cc + rr):  # the only test that tiles without NaN or Inf pay for
        finite, clash = _nonfinite(wide)
        sums.nonfinite_candidate += int(np.count_nonzero(~finite[0]))
        sums.nonfinite_reference += int(np.count_nonzero(~finite[1]))
        sums.clashes += int(np.count_nonzero(clash))
        aside = ~finite.all(axis=0)
        wide[:, aside] = 0.0
        steps[aside] = 0
        cc, rr = float(c @ c), float(r @ r)
    if exact:
        np.copyto(diff, steps, casting="unsafe")
    else:
        np.subtract(c, r, out=diff)
    sums.cc += cc
    sums.rr += rr
    sums.cr += float(c @ r)
    sums.dd += float(diff @ diff)
    sums.max_abs = max(sums.max_abs, float(diff.max()), -float(diff.min()))
    sums.ulp_max = max(sums.ulp_max, float(steps.max()))
    sums.ulp_sum += float(steps.sum(dtype=np.float64))


def _nonfinite(wide: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which elements of either side are finite, and which pairs clash."""
    finite = np.isfinite(wide)
    return finite, ~finite.all(axis=0) & (wide[0] != wide[1])


class _Ruler:
    """Reads pairs of tiles: their values in float64 and how many steps of the coarser dtype lie between."""

    def __init__(self, candidate: Array, reference: Array) -> None:
        _check(candidate, reference)
        self.dtypes = (candidate.dtype.newbyteorder("="), reference.dtype.newbyteorder("="))
        floats = [dtype for dtype in self.dtypes if dtype.kind not in "biu"]
        self.exact = not floats
        # The further keys only make the choice independent of the order of the arguments.
        coarseness = sorted(floats, key=lambda d: (ml_dtypes.finfo(d).nmant, d.itemsize, d.name))
        self.grid = coarseness[0] if floats else None
        self.wide = np.empty((2, TILE), np.float64)
        self.cells = np.empty((2, TILE), self._cell_dtype())
        self.signs = np.empty((2, TILE), self.cells.dtype)
        self.steps = np.empty(TILE, self.cells.dtype)

    def read(self, *tiles: Array) -> tuple[Floats, Array]:
        """Values, `side element`, and steps between the sides, `element`; scratch, valid until the next."""
        n = tiles[0].size
        wide, cells, steps = self.wide[:, :n], self.cells[:, :n], self.steps[:n]
        for side, (tile, dtype) in enumerate(zip(tiles, self.dtypes, strict=True)):
            values = tile.view(dtype)
            np.copyto(wide[side], values, casting="unsafe")
            np.copyto(cells[side], values if self.exact else self._cell(values, wide[side]), casting="unsafe")
        if cells.dtype.kind == "i" and not self.exact:
            _sign_magnitude_to_order(cells, self.signs[:, :n])
        np.subtract(cells.max(axis=0), cells.min(axis=0), out=steps)
        # The distance of two signed integers may wrap around, to what is right when read as unsigned.
        return wide, steps.view(f"u{steps.itemsize}") if steps.dtype.kind == "i" else steps

    def _cell_dtype(self) -> DType:
        if self.grid is not None:
            return np.dtype(np.float64 if self.grid.itemsize == 1 else f"i{self.grid.itemsize}")
        # float64 where no integer dtype holds both: uint64 against a signed one.
        return (
            np.result_type(np.uint8, *self.dtypes)
            if np.bool_ in self.dtypes
            else np.result_type(*self.dtypes)
        )

    def _cell(self, values: Array, wide: Floats) -> Array:
        """Floats as places in the order of the grid, or as bits that give them (sign and magnitude)."""
        assert self.grid is not None, "unreachable because integers need no grid"
        rounded = values if values.dtype == self.grid else _round(wide, self.grid)
        if self.grid.itemsize > 1:
            return rounded.view(f"i{self.grid.itemsize}")
        # Formats with a single, unsigned NaN lose the sign of what overflowed.
        return np.copysign(_places(self.grid)[rounded.view(np.uint8)], wide)


def _sign_magnitude_to_order(cells: Array, signs: Array) -> None:
    """Bits of IEEE floats, as signed integers, to integers in the order of the floats; both zeros to 0."""
    np.right_shift(cells, 8 * cells.itemsize - 1, out=signs)
    np.bitwise_and(cells, np.iinfo(cells.dtype).max, out=cells)
    np.bitwise_xor(cells, signs, out=cells)
    np.subtract(cells, signs, out=cells)


def _round(wide: Floats, grid: DType) -> Array:
    """Float64 to the nearest number of the grid, ties to even, rounding once.

    ml_dtypes casts float64 by way of float32, which rounds twice. Rounding to odd first cures that.
    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", IEEE Transactions on Computers 57 (2008).
    """
    if grid in (np.float16, np.float32):
        return wide.astype(grid)
    single = wide.astype(np.float32)
    bits = single.view(np.int32)
    # If inexact and even, the neighbour on the other side of the exact value is odd.
    towards = np.sign(np.abs(wide) - np.abs(single))
    bits += towards.astype(np.int32) * (~bits & 1)
    return single.astype(grid)


@lru_cache
def _places(dtype: DType) -> Floats:
    """For each byte, the place of its magnitude among the finite magnitudes; one beyond for NaN and Inf."""
    values = np.abs(np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64))
    magnitudes = np.unique(np.append(values[np.isfinite(values)], 0.0))
    return np.searchsorted(magnitudes, np.where(np.isfinite(values), values, np.inf)).astype(np.float64)


def _check(candidate: Array, reference: Array) -> None:
    if candidate.shape != reference.shape:
        raise ValueError(f"shapes differ: candidate {candidate.shape}, reference {reference.shape}")
    for dtype in (candidate.dtype, reference.dtype):
        known = dtype.kind in "biu" or dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
        if not known and not (dtype.itemsize == 1 and dtype.name.startswith("float")):
            raise TypeError(f"cannot measure arrays of dtype {dtype}")


def _bits(tile: Array) -> Array:
    return tile.view(f"u{tile.itemsize}")


def _tiles(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Matching stretches of contiguous native elements of all arrays; those after the second are written."""
    if not arrays[0].size:
        return
    # nditer buffers only what numpy knows: the ml_dtypes travel as the unsigned integers of their size.
    plain = [_bits(array) if array.dtype.kind == "V" else array for array in arrays]
    flags = [["readonly", "contig", "nbo", "aligned"]] * 2 + [["writeonly", "contig"]] * (len(arrays) - 2)
    with np.nditer(plain, ["external_loop", "buffered"], flags, buffersize=TILE) as tiles:  # type: ignore[arg-type]
        for tile in tiles:
            yield tile


def _kl_into(out: Array, candidate: Array, reference: Array) -> None:
    """Halve the leading axes until a piece is small: rows of any strides, without reshaping, which may copy."""
    if candidate.ndim == 1 or candidate.size <= LOGITS_AT_ONCE:
        out[...] = _kl(_log_softmax(candidate), _log_softmax(reference))
    elif len(candidate) == 1:
        _kl_into(out[0, ...], candidate[0], reference[0])
    else:
        half = len(candidate) // 2
        _kl_into(out[:half], candidate[:half], reference[:half])
        _kl_into(out[half:], candidate[half:], reference[half:])


def _log_softmax(logits: Array) -> Floats:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _kl(candidate: Floats, reference: Floats) -> Floats:
    weights = np.exp(reference)
    terms = np.where(weights == 0.0, 0.0, weights * (reference - candidate))
    total: Floats = terms.sum(axis=-1)
    return np.where(np.isnan(total), np.inf, np.maximum(total, 0.0))
