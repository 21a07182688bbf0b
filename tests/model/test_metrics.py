"""Metrics against plain whole-array formulas, and ULP distances against the formats' own neighbours."""

import math
import warnings
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from parity.compare import metrics
from parity.compare.metrics import Metrics
from parity.record.arrays import to_torch
from parity.reference.transfer import run_together
from parity.results import ULP_BINS

TILE = 1 << 15

FLOATS = [
    np.dtype(name)
    for name in (
        "float64",
        "float32",
        "float16",
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
    )
]
INTEGERS = [np.dtype(name) for name in ("int8", "uint8", "int16", "int32", "int64", "bool")]
BF16, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
NAN, INF = math.nan, math.inf


def measure(candidate, reference):
    return run_together([metrics.measuring(to_torch(candidate), to_torch(reference))])[0]


def ulp_distance(a, b):
    return metrics.ulp_distance(to_torch(a), to_torch(b)).double().numpy()


def ulp_histogram(a, b):
    return run_together([metrics.counting_ulps(to_torch(a), to_torch(b))])[0]


def from_bits(bits, dtype):
    """Every bit pattern is fair: NaN payloads, infinities, subnormals, signed zeros."""
    return np.asarray(bits, np.uint64).astype(f"u{dtype.itemsize}").view(dtype)


def widened(array):
    with np.errstate(invalid="ignore"):  # some casts of ml_dtypes flag NaN
        return array.astype(np.float64)


def every(dtype):
    """All finite numbers of a small format in order, −0.0 before or after 0.0."""
    values = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)
    values = values[np.isfinite(widened(values))]
    return values[np.argsort(widened(values), kind="stable")]


def plain(candidate, reference):
    """The definitions, written down on whole float64 arrays; finite input only."""
    c, r = candidate.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    d = c - r
    norms = math.sqrt(math.fsum(c * c)) * math.sqrt(math.fsum(r * r))
    return {
        "mse": math.fsum(d * d) / d.size,
        "cosine": math.fsum(c * r) / norms,
        "max_abs": np.abs(d).max(),
        "rel_l2": math.sqrt(math.fsum(d * d) / math.fsum(r * r)),
    }


def noisy(shape, seed=0):
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal(shape)
    return reference + 0.01 * rng.standard_normal(shape), reference


def assert_plain(candidate, reference):
    got = measure(candidate, reference)
    exact = 1e-6 if max(candidate.itemsize, reference.itemsize) < 4 else 1e-12
    for name, value in plain(candidate, reference).items():
        assert getattr(got, name) == pytest.approx(value, rel=exact, abs=1e-300), name
    steps = ulp_distance(candidate, reference)
    assert got.ulp_max == steps.max()
    assert got.ulp_mean == pytest.approx(steps.mean(), rel=exact)


# --- against plain formulas


@pytest.mark.parametrize("candidate_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reference_dtype", FLOATS, ids=str)
def test_agrees_with_whole_array_formulas_for_every_pair_of_float_dtypes(candidate_dtype, reference_dtype):
    c, r = noisy((7, 11))
    assert_plain(c.astype(candidate_dtype), r.astype(reference_dtype))


@pytest.mark.parametrize("size", [1, TILE - 1, TILE, TILE + 1, 3 * TILE + 5])
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float64], ids=str)
def test_tile_edges_do_not_show(size, dtype):
    c, r = noisy(size)
    assert_plain(c.astype(dtype), r.astype(dtype))


VIEWS = {
    "transposed": lambda a: a.T,
    "sliced": lambda a: a[1:, ::3],
    "reversed": lambda a: a[::-1, ::-1],
    "column": lambda a: a[:, 5],
    "broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "scalar": lambda a: a[3, 4],
    "three axes": lambda a: a.reshape(10, 30, -1).transpose(2, 0, 1)[:, 1:, ::-2],
}


@pytest.mark.parametrize("dtype", [np.float32, BF16, ml_dtypes.float8_e5m2], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(view, dtype):
    c, r = (VIEWS[view](a.astype(dtype)) for a in noisy((300, 200)))
    c, r = np.asarray(c), np.asarray(r)
    expected = measure(c.copy("C"), r.copy("C"))
    for left, right in ((c, r), (c.copy("C"), r), (c, r.copy("F"))):
        got = measure(left, right)
        for name, value in vars(expected).items():
            assert getattr(got, name) == pytest.approx(value, rel=1e-12), name
        np.testing.assert_array_equal(ulp_distance(left, right), ulp_distance(c.copy("C"), r.copy("C")))


def test_inputs_unequal_in_shape_or_of_unknown_dtype_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        measure(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(TypeError, match="complex128"):
        measure(np.zeros(1, complex), np.zeros(1))
    with pytest.raises(TypeError, match="int4"):
        measure(np.zeros(1), np.zeros(1, ml_dtypes.int4))


# --- corner values


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
def test_empty_and_zero_arrays_are_equal(dtype):
    for shape in [(0,), (3, 0), (5,)]:
        zeros = np.zeros(shape, dtype)
        assert measure(zeros, zeros) == Metrics(zeros.size, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0, 0, True)
    assert ulp_distance(np.zeros((3, 0), dtype), np.zeros((3, 0), dtype)).shape == (3, 0)


def test_one_zero_vector():
    zero, one = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert (measure(zero, one).cosine, measure(zero, one).rel_l2) == (0.0, 1.0)
    assert (measure(one, zero).cosine, measure(one, zero).rel_l2) == (0.0, INF)


def test_equal_arrays_have_a_cosine_of_exactly_one():
    for seed in range(20):
        c = noisy(99, seed)[0]
        assert measure(c, c.copy()).cosine == 1.0
        assert measure(c, -c).cosine == pytest.approx(-1.0)
        assert measure(c, -c).cosine >= -1.0


def test_bit_equality_asks_for_dtype_and_sign_of_zero():
    a = np.array([0.0, 1.0], np.float32)
    assert measure(a, a.copy()).bit_equal
    assert not measure(a, a.astype(np.float64)).bit_equal
    signed = measure(a, np.array([-0.0, 1.0], np.float32))
    assert (signed.bit_equal, signed.ulp_max, signed.mse, signed.cosine) == (False, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, FP16, BF16, ml_dtypes.float8_e5m2], ids=str)
@pytest.mark.parametrize(
    ("c", "r", "clash"),
    [
        (NAN, 1, True),
        (1, NAN, True),
        (NAN, NAN, True),
        (INF, 1, True),
        (INF, -INF, True),
        (NAN, INF, True),
        (INF, INF, False),
        (-INF, -INF, False),
    ],
)
def test_nonfinite_elements_never_look_like_agreement_nor_poison_others(dtype, c, r, clash):
    candidate, reference = np.array([1, c, 3], dtype), np.array([2, r, 3], dtype)
    got = measure(candidate, reference)
    assert got.nonfinite_candidate == (not math.isfinite(c))
    assert got.nonfinite_reference == (not math.isfinite(r))
    assert not got.bit_equal
    if clash:
        assert {got.mse, got.max_abs, got.rel_l2, got.ulp_max, got.ulp_mean} == {INF}
        assert math.isnan(got.cosine)
    else:
        assert got.mse == pytest.approx(1 / 3)
        assert got.rel_l2 == pytest.approx(1 / math.sqrt(13))
    assert measure(candidate, candidate).bit_equal is not math.isnan(c)
    np.testing.assert_array_equal(ulp_distance(candidate, reference)[1], INF if clash else 0.0)
    assert np.isfinite(ulp_distance(candidate, reference)[[0, 2]]).all()


def test_the_same_nan_is_not_equal():
    nan = np.full(3, NAN, np.float32)
    assert not measure(nan, nan).bit_equal
    assert measure(nan, nan).mse == INF


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e200, np.finfo(np.float64).max / 4])
def test_squares_beyond_float64_leave_the_ratios_right(size):
    c, r = np.array([3.0, 4.0, 0.0]) * size, np.array([0.0, 4.0, 0.0]) * size
    got = measure(c, r)
    rough = 1e-3 if size < 1e-300 else 1e-12  # subnormals have few bits
    assert got.cosine == pytest.approx(0.8, rel=rough)
    assert got.rel_l2 == pytest.approx(0.75, rel=rough)
    assert got.max_abs == c[0]
    assert got.mse == (0.0 if size < 1 else INF)
    lost = np.full(3, -size)
    lost[0] = -INF  # a masked score, next to which the others must still be seen
    assert measure(lost, lost.copy()).cosine == 1.0


def test_state_of_numpy_is_untouched_and_nothing_warns():
    before = np.geterr()
    hard = np.array([NAN, INF, -INF, 1e300, -1e300, 1e-310, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (*FLOATS, np.dtype(np.int32)):
            if dtype.kind != "i":
                measure(hard, np.zeros(7, dtype))
                ulp_histogram(hard, np.zeros(7, dtype))
    assert np.geterr() == before


# --- random bit patterns

bits = st.integers(0, 2**64 - 1)
dtypes = st.sampled_from(FLOATS)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(bits, bits), max_size=12), dtypes, dtypes)
def test_any_bit_patterns(pairs, candidate_dtype, reference_dtype):
    c = from_bits([pair[0] for pair in pairs], candidate_dtype)
    r = from_bits([pair[1] for pair in pairs], reference_dtype)
    got, mirrored = measure(c, r), measure(r, c)
    wide_c, wide_r = widened(c), widened(r)
    finite = np.isfinite(wide_c) & np.isfinite(wide_r)
    assert got.nonfinite_candidate == np.count_nonzero(~np.isfinite(wide_c)) == mirrored.nonfinite_reference
    assert (got.mse, got.max_abs, got.ulp_max, got.ulp_mean) == (
        mirrored.mse,
        mirrored.max_abs,
        mirrored.ulp_max,
        mirrored.ulp_mean,
    )
    np.testing.assert_array_equal(ulp_distance(c, r), ulp_distance(r, c))
    clash = ~finite & ~((wide_c == wide_r) & np.isinf(wide_c))
    if clash.any():
        assert got.mse == INF
        assert math.isnan(got.cosine)
        return
    exact = [Fraction(x) - Fraction(y) for x, y in zip(wide_c[finite], wide_r[finite], strict=True)]
    squares = [sum(x * x for x in map(Fraction, wide[finite])) for wide in (wide_c, wide_r)]
    assert -1.0 <= got.cosine <= 1.0
    assert (got.max_abs == 0.0) is not any(exact)
    if not any(exact):
        assert (got.mse, got.cosine, got.rel_l2, got.ulp_max) == (0.0, 1.0, 0.0, 0.0)
    if squares[1] and Fraction(10) ** -200 < squares[0] / squares[1] < Fraction(10) ** 200:
        ratio = sum(x * x for x in exact) / squares[1]
        assert got.rel_l2**2 == pytest.approx(float(ratio), rel=1e-6, abs=1e-200)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.int64, 6), hnp.arrays(np.int64, 6), st.sampled_from(INTEGERS), st.sampled_from(INTEGERS))
def test_integers_differ_by_their_difference(c, r, candidate_dtype, reference_dtype):
    c, r = c.astype(candidate_dtype), r.astype(reference_dtype)
    exact = [abs(int(x) - int(y)) for x, y in zip(c, r, strict=True)]
    assert ulp_distance(c, r).tolist() == pytest.approx([float(x) for x in exact], rel=1e-15)
    got = measure(c, r)
    assert got.max_abs == pytest.approx(max(exact), rel=1e-15)
    assert got.mse == pytest.approx(float(sum(x * x for x in exact)) / 6, rel=1e-12)


def test_large_integers_one_apart_are_not_equal():
    c, r = np.array([2**63 - 1]), np.array([2**63 - 2])
    assert (measure(c, r).max_abs, measure(c, r).mse, measure(c, r).ulp_max) == (1.0, 1.0, 1.0)


# --- ULP


@pytest.mark.parametrize("dtype", [d for d in FLOATS if d.itemsize < 4], ids=str)
def test_ulp_is_one_between_all_neighbours_of_small_formats(dtype):
    ordered = every(dtype)
    steps = ulp_distance(ordered[1:], ordered[:-1])
    both_zeros = widened(ordered[1:]) == widened(ordered[:-1])
    np.testing.assert_array_equal(steps, np.where(both_zeros, 0.0, 1.0))
    # They add up along the whole format, across zero.
    from_lowest = ulp_distance(ordered, np.full_like(ordered, ordered[0]))
    np.testing.assert_array_equal(from_lowest, np.append(0.0, np.cumsum(steps)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=lambda d: d.__name__)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_ulp_counts_steps_of_nextafter(dtype, data):
    start = data.draw(hnp.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False))
    steps = data.draw(st.integers(0, 20))
    end = start
    for _ in range(steps):
        end = np.nextafter(end, dtype(0.0 if abs(start) > 1 else -2.0))
    assert ulp_distance(np.array([start]), np.array([end])).tolist() == [steps]


def test_ulp_of_float64_extremes_does_not_wrap():
    most = np.finfo(np.float64).max
    whole = 2 * float(np.float64(most).view(np.int64))
    assert ulp_distance(np.array([most]), np.array([-most])).tolist() == [whole]
    assert measure(np.array([most]), np.array([-most])).ulp_max == whole


@pytest.mark.parametrize("origin", [np.float64, np.float32], ids=lambda d: d.__name__)
@pytest.mark.parametrize("grid", [d for d in FLOATS if d.itemsize < 4], ids=str)
def test_numbers_are_rounded_once_to_the_nearest_even_of_the_coarser_dtype(grid, origin):
    values = np.unique(widened(every(grid)))
    middle = ((values[1:] + values[:-1]) / 2).astype(origin)
    either_side = [np.nextafter(middle, origin(INF)), np.nextafter(middle, origin(-INF))]
    probes = np.concatenate([middle, *either_side, values.astype(origin)])
    probes = probes[(probes >= values[0]) & (probes < values[-1])]
    above = np.searchsorted(values, probes, side="right")
    low, high = values[above - 1], values[above]
    even_low = np.abs(low).astype(grid).view(f"u{grid.itemsize}") % 2 == 0
    below, beyond = probes - low, high - probes
    expected = np.where((below < beyond) | ((below == beyond) & even_low), low, high).astype(grid)
    np.testing.assert_array_equal(ulp_distance(probes, expected), 0.0)
    np.testing.assert_array_equal(ulp_distance(expected, probes), 0.0)


@pytest.mark.parametrize("grid", [d for d in FLOATS if d.itemsize < 4], ids=str)
def test_what_overflows_in_rounding_is_one_step_beyond_the_largest(grid):
    ordered = every(grid)
    ends = ordered[[0, -1]]
    assert ulp_distance(widened(ends) * 1e6, ends).tolist() == [1.0, 1.0]
    assert ulp_distance(widened(ends) * 1e6, ends[::-1]).tolist() == [len(np.unique(widened(ordered)))] * 2


def test_coarser_means_fewer_mantissa_bits():
    one = np.array([1.0], FP16)
    assert ulp_distance(one, np.array([1.0078125], BF16)).tolist() == [1.0]
    assert ulp_distance(np.array([1 + 2.0**-10], FP16), one.astype(np.float32)).tolist() == [1.0]
    assert ulp_distance(np.array([1 + 2.0**-10], FP16), one.astype(BF16)).tolist() == [0.0]
    assert ulp_distance(np.array([257]), np.array([256], BF16)).tolist() == [0.0]  # an integer is rounded


# --- histograms


def counted(steps):
    """Distances by bin, one after another."""
    counts = [0] * (len(ULP_BINS) + 1)
    for step in steps.ravel().tolist():
        counts[next((place for place, end in enumerate(ULP_BINS) if step <= end), len(ULP_BINS))] += 1
    while counts and not counts[-1]:
        counts.pop()
    return tuple(counts)


def test_bins_end_at_powers_of_two():
    assert ULP_BINS[:6] == (0, 1, 2, 4, 8, 16)
    ends = [*ULP_BINS, ULP_BINS[-1] + 1, 40_000]
    away = np.array(ends, np.uint16).view(BF16)  # so many steps from zero
    assert ulp_histogram(away, np.zeros(len(away), BF16)) == (*[1] * len(ULP_BINS), 2)
    assert ulp_histogram(away[:4], np.zeros(4, BF16)) == (1, 1, 1, 1), "no zeros at the end"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(bits, bits), max_size=12), dtypes, dtypes)
def test_histogram_of_any_bit_patterns(pairs, candidate_dtype, reference_dtype):
    c = from_bits([pair[0] for pair in pairs], candidate_dtype)
    r = from_bits([pair[1] for pair in pairs], reference_dtype)
    assert ulp_histogram(c, r) == counted(ulp_distance(c, r))


@pytest.mark.parametrize("dtype", [np.float32, FP16, BF16, ml_dtypes.float8_e4m3fn, np.int8], ids=str)
def test_histogram_of_more_than_a_tile(dtype):
    c, r = (np.abs(100 * a).astype(dtype) for a in noisy((3, TILE)))
    got = ulp_histogram(c.T, r.T)
    assert got == counted(ulp_distance(c, r))
    assert sum(got) == c.size


def test_histogram_of_equal_and_of_no_numbers():
    c = noisy(TILE + 5)[0]
    assert ulp_histogram(c, c.copy()) == (TILE + 5,)
    assert ulp_histogram(c[:0], c[:0]) == ()


@pytest.mark.parametrize("dtype", [np.float32, FP16, BF16], ids=str)
def test_blocks_of_the_same_bits_are_summed_like_any_other(dtype):
    c = noisy(3 * TILE)[0].astype(dtype).reshape(3, TILE)
    r = c.copy()
    r[2] = noisy(TILE, 1)[0].astype(dtype)
    got, wide = measure(c, r), (c.astype(np.float64), r.astype(np.float64))
    assert not got.bit_equal
    assert got.mse == pytest.approx(np.square(wide[0] - wide[1]).mean(), rel=1e-6)
    assert got.rel_l2 == pytest.approx(np.linalg.norm(wide[0] - wide[1]) / np.linalg.norm(wide[1]), rel=1e-6)
    assert got.ulp_mean == pytest.approx(ulp_distance(c, r).mean(), rel=1e-6)
    assert measure(c, c.copy()).bit_equal
