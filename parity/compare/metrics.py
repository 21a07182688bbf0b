"""How far one array is from another: errors, angles and ULPs, in one pass over memory.

Arrays are read in tiles that stay in cache and are widened to float64 there: besides the inputs, only scratch
of a fixed size is used, whatever the shape, strides or dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import inf, isfinite, nan
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from parity.results import ULP_BINS

Array = NDArray[Any]
Floats = NDArray[np.float64]

# Large enough to hide the interpreter's share, small enough for the scratch to stay in a cache of 1 or 2 MiB.
TILE = 32768
# OpenBLAS starts threads beyond 10 000 elements: no gain here, and sums would depend on how many there are.
DOT = 8192


@dataclass(frozen=True)
class Metrics:
    """What `measure` found in a pair of arrays, candidate c and reference r.

    NaN clashes with everything, itself included; an infinity with all but itself. A single clash makes `mse`,
    `max_abs`, `rel_l2`, `ulp_max` and `ulp_mean` inf and `cosine` nan: none looks like agreement. Equal
    infinities differ by zero and add nothing to the norms. Empty arrays are equal.
    """

    count: int  # pairs of elements
    mse: float  # mean of (c − r)², in squared units of the arrays
    cosine: float  # of the angle between the flattened arrays; 1 if both are zero, 0 if only one is
    max_abs: float  # largest |c − r|, in units of the arrays
    rel_l2: float  # ‖c − r‖ / ‖r‖; if r is zero: 0 if c is zero too, else inf
    ulp_max: float  # distance in ULP as `ulp_distance` defines it
    ulp_mean: float
    nonfinite_candidate: int  # elements that are NaN or infinite
    nonfinite_reference: int
    bit_equal: bool  # same dtype, same bits, no NaN; −0.0 and +0.0 have different bits


def measure_arrays(candidate: Array, reference: Array) -> Metrics:
    """All elementwise metrics of a pair of arrays, in one pass and without copying either.

    Shapes: equal, any strides. Dtypes: floats of 8, 16, 32 or 64 bits (those of ml_dtypes too), integers and
    bool; the two may differ. Differences of integers are exact, all else is computed in float64. Only
    float64 values whose squares leave its range are read a second time, rescaled; of two arrays more than
    about 1e150 apart, the smaller then counts as zero.

    Raises: ValueError if shapes differ, TypeError for any other dtype.
    """
    reader = _Reader(candidate, reference)
    scale = 1.0
    with np.errstate(all="ignore"):
        sums = _sums(candidate, reference, reader)
        size = float(sums.squares.sum())
        if np.float64 in (candidate.dtype, reference.dtype) and not 2.0**-900 < size < inf:
            scale = 2.0**600 if size < 1.0 else 2.0**-600
            scaled = _sums(candidate, reference, reader, scale)
            sums = replace(sums, squares=scaled.squares, cr=scaled.cr)
    return _metrics(sums, candidate.size, scale)


def ulp_distance(a: Array, b: Array) -> Floats:
    """How many representable numbers apart two arrays are, element by element.

    Shapes: equal → the same. Units: ULP of the dtype with fewer mantissa bits, to which both sides are
    rounded first (to nearest, ties to even). Zeros of either sign are one number. A finite number that
    overflows in rounding sits one step beyond the largest. Between integers or bools: the absolute
    difference; an integer against a float is rounded like a float. NaN is inf from everything, itself
    included; an infinity is inf from all but itself. Float64: distances above 2⁵³ are rounded.

    Raises: ValueError if shapes differ, TypeError as `measure`.
    """
    reader = _Reader(a, b)
    out = np.empty(a.shape, np.float64)
    with np.errstate(all="ignore"):
        for left, right, target in _tiles(a, b, out):
            target[...] = _steps(reader, left, right)
    return out


def ulp_histogram(a: Array, b: Array) -> tuple[int, ...]:
    """How many pairs of numbers are how far apart, in ULP as `ulp_distance` counts them.

    One count for the distances up to each of `ULP_BINS`, then one for what is further apart or not finite; zeros at
    the end are left out.

    Shapes: equal. Raises: ValueError if shapes differ, TypeError as `ulp_distance`.
    """
    reader = _Reader(a, b)
    beyond = np.zeros(len(ULP_BINS), np.int64)
    with np.errstate(all="ignore"):
        for left, right in _tiles(a, b):
            steps = _steps(reader, left, right)
            for place, end in enumerate(ULP_BINS):
                if not (further := np.count_nonzero(steps > end)):
                    break
                beyond[place] += further
    counts = -np.diff(beyond, prepend=a.size, append=0)
    return tuple(np.trim_zeros(counts, "b").tolist())


@dataclass
class _Sums:
    squares: Floats = field(default_factory=lambda: np.zeros(3))  # of c, r and their difference
    cr: float = 0.0
    max_abs: float = 0.0
    ulp_max: float = 0.0
    ulp_sum: float = 0.0
    nonfinite: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))  # in c, r
    clashes: int = 0
    same_bits: bool = True


def _metrics(sums: _Sums, count: int, scale: float) -> Metrics:
    c, r, d = np.sqrt(sums.squares).tolist()
    same = sums.max_abs == 0.0  # rounding of the sums must not make equal arrays differ
    metrics = Metrics(
        count=count,
        mse=float(sums.squares[2]) / max(count, 1) / scale / scale,  # not by scale², which is beyond float64
        cosine=1.0 if same else min(1.0, max(-1.0, sums.cr / (c * r))) if c * r else 0.0,
        max_abs=sums.max_abs,
        rel_l2=0.0 if same else d / r if r else inf,
        ulp_max=sums.ulp_max,
        ulp_mean=sums.ulp_sum / max(count, 1),
        nonfinite_candidate=int(sums.nonfinite[0]),
        nonfinite_reference=int(sums.nonfinite[1]),
        bit_equal=sums.same_bits and not sums.clashes,
    )
    if sums.clashes:
        return replace(metrics, mse=inf, cosine=nan, max_abs=inf, rel_l2=inf, ulp_max=inf, ulp_mean=inf)
    return metrics


def _sums(candidate: Array, reference: Array, reader: "_Reader", scale: float = 1.0) -> _Sums:
    sums = _Sums(same_bits=candidate.dtype == reference.dtype)
    for left, right in _tiles(candidate, reference):
        sums.same_bits = sums.same_bits and np.array_equal(_bits(left), _bits(right))
        wide, steps = reader.read(left, right)
        if scale != 1.0:
            wide *= scale
        squares = _dot(wide, wide)
        if not isfinite(squares[0] + squares[1]):  # the only test that tiles without NaN or Inf pay for
            finite, clash = _nonfinite(wide)
            sums.nonfinite += [np.count_nonzero(row) for row in ~finite]
            sums.clashes += int(np.count_nonzero(clash))
            keep = finite.all(axis=0)
            bits = wide.view(np.int64)
            bits &= -keep.astype(np.int64)  # zeros the rest; boolean indexing is 15 times slower
            steps *= keep
            squares = _dot(wide, wide)
        sums.squares += squares
        sums.cr += float(_dot(wide[0], wide[1]))
        sums.max_abs = max(sums.max_abs, float(np.maximum.reduce(np.abs(wide[2], out=wide[2]))))
        if most := float(np.maximum.reduce(steps)):
            sums.ulp_max = max(sums.ulp_max, most)
            total = {2: np.uint32, 4: np.uint64}.get(steps.itemsize, np.float64)  # fast, yet no overflow
            sums.ulp_sum += float(np.add.reduce(steps, dtype=total))
    return sums


def _dot(a: Floats, b: Floats) -> Floats:
    blocks = [slice(start, start + DOT) for start in range(0, a.shape[-1], DOT)]
    return np.asarray(sum(np.vecdot(a[..., block], b[..., block]) for block in blocks))


def _steps(reader: "_Reader", left: Array, right: Array) -> Array:
    """Steps between the numbers of two tiles; inf where they clash."""
    wide, steps = reader.read(left, right)
    finite, clash = _nonfinite(wide)
    return steps if finite.all() else np.where(finite.all(axis=0), steps, np.where(clash, inf, 0.0))


def _nonfinite(wide: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    finite = np.isfinite(wide[:2])
    return finite, ~finite.all(axis=0) & (wide[0] != wide[1])


class _Reader:
    """Turns pairs of tiles into float64 and into steps of the coarser dtype, in scratch that it owns."""

    def __init__(self, candidate: Array, reference: Array) -> None:
        _check(candidate, reference)
        self.dtypes = (candidate.dtype.newbyteorder("="), reference.dtype.newbyteorder("="))
        floats = [dtype for dtype in self.dtypes if dtype.kind not in "biu"]
        # The further keys only make the choice independent of the order of the arguments.
        floats.sort(key=lambda d: (ml_dtypes.finfo(d).nmant, d.itemsize, d.name))  # type: ignore[no-untyped-call]
        self.grid = floats[0] if floats else None
        if self.grid is None:  # float64 where no integer dtype holds both: uint64 against a signed one
            cell = np.result_type(np.uint8, *self.dtypes)
        else:
            cell = np.dtype(np.float64 if self.grid.itemsize == 1 else f"i{self.grid.itemsize}")
        self.wide = np.empty((3, TILE), np.float64)
        self.cells, self.spare = np.empty((2, 2, TILE), cell)

    def read(self, *tiles: Array) -> tuple[Floats, Array]:
        """Candidate, reference and difference in float64, and steps apart; scratch for the caller to use."""
        n = tiles[0].size
        wide, cells, spare = self.wide[:, :n], self.cells[:, :n], self.spare[:, :n]
        for side, (tile, dtype) in enumerate(zip(tiles, self.dtypes, strict=True)):
            values = tile.view(dtype)
            np.copyto(wide[side], values, casting="unsafe")
            if self.grid is None:
                np.copyto(cells[side], values)
            else:
                rounded = values if dtype == self.grid else _round(wide[side], dtype, self.grid)
                _order(rounded, wide[side], cells[side], spare[side])
        np.maximum(cells[0], cells[1], out=spare[0])
        np.minimum(cells[0], cells[1], out=spare[1])
        steps = np.subtract(spare[0], spare[1], out=spare[0])
        # Integers may have wrapped around, to what is right when read as unsigned.
        steps = _bits(steps) if steps.dtype.kind == "i" else steps
        np.subtract(wide[0], wide[1], out=wide[2])
        if self.grid is None:  # exact beyond 2⁵³ too
            np.copyto(wide[2], steps, casting="unsafe")
        return wide, steps


def _order(rounded: Array, wide: Floats, cells: Array, spare: Array) -> None:
    """Floats of one dtype to consecutive numbers in `cells`: 0 for both zeros, then 1, 2, … and −1, −2, …"""
    if rounded.itemsize == 1:
        # With the sign of the value: formats with a single NaN have lost that of what overflowed.
        np.copysign(_places(rounded.dtype)[_bits(rounded)], wide, out=cells)
        return
    bits, top = rounded.view(cells.dtype), 8 * rounded.itemsize - 1
    np.right_shift(bits, top, out=spare)
    np.bitwise_and(bits, (1 << top) - 1, out=cells)
    np.bitwise_xor(cells, spare, out=cells)
    np.subtract(cells, spare, out=cells)


def _round(wide: Floats, origin: np.dtype[Any], grid: np.dtype[Any]) -> Array:
    """Numbers of dtype origin, in float64, to the nearest of the grid, ties to even, rounding once.

    ml_dtypes casts float64 by way of float32, which rounds twice. Rounding to odd first cures that: Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd" (2008).
    """
    if grid in (np.float16, np.float32, np.float64):
        return wide.astype(grid)
    single = wide.astype(np.float32)
    if not np.can_cast(origin, np.float32):
        towards = np.sign(np.abs(wide) - np.abs(single))
        bits = single.view(np.int32)
        bits += towards.astype(np.int32) * (~bits & 1)  # if even, the neighbour across the value is odd
    return single.astype(grid)


@lru_cache
def _places(dtype: np.dtype[Any]) -> Floats:
    """For each byte, the place of its magnitude among all, 0 for zero; NaN and Inf follow the largest."""
    values = np.abs(np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64))
    finite = np.isfinite(values)
    magnitudes = np.unique(np.append(values[finite], 0.0))
    return np.searchsorted(magnitudes, np.where(finite, values, np.inf)).astype(np.float64)


def _check(candidate: Array, reference: Array) -> None:
    if candidate.shape != reference.shape:
        raise ValueError(f"shapes differ: candidate {candidate.shape}, reference {reference.shape}")
    for dtype in (candidate.dtype, reference.dtype):
        known = dtype.kind in "biu" or dtype.name in ("float64", "float32", "float16", "bfloat16")
        if not known and not (dtype.itemsize == 1 and dtype.name.startswith("float")):
            raise TypeError(f"cannot measure arrays of dtype {dtype}")


def _bits(tile: Array) -> Array:
    return tile.view(f"u{tile.itemsize}")


def _tiles(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Matching stretches of contiguous native elements of all arrays; those after the second are written."""
    if arrays[0].size:
        # nditer buffers only what numpy knows: ml_dtypes travel as the unsigned integers of their size.
        plain = [_bits(array) if array.dtype.kind == "V" else array for array in arrays]
        flags = [["readonly", "contig", "nbo"]] * 2 + [["writeonly", "contig"]] * (len(arrays) - 2)
        with np.nditer(plain, ["external_loop", "buffered"], flags, buffersize=TILE) as tiles:  # type: ignore[arg-type]
            yield from tiles
