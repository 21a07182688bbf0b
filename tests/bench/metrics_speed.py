"""How fast `parity.compare.metrics` reads a pair of arrays: `python -m tests.bench.metrics_speed`.

Rates count the bytes of both inputs per second of processor time, over all threads, so that they hold for one
core and depend little on what else runs. The yardstick is float64 numpy on the whole arrays, in the same run;
it does without ULP and without care for NaN.
"""

import time
import tracemalloc
from collections.abc import Callable

import ml_dtypes
import numpy as np

from parity.compare.metrics import Array, measure

ELEMENTS = 1 << 22
REPEATS = 7
PAIRS = [
    ("bfloat16", "bfloat16"),
    ("float32", "float32"),
    ("float16", "float16"),
    ("float64", "float64"),
    ("bfloat16", "float64"),
    ("bfloat16", "float32"),
    ("float32", "float64"),
    ("float8_e4m3fn", "float8_e4m3fn"),
    ("int32", "int32"),
]


def whole(candidate: Array, reference: Array) -> tuple[float, ...]:
    """MSE, cosine, largest difference and relative L2 as one would write them first."""
    c, r = candidate.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    d = c - r
    norms = np.linalg.norm(c), np.linalg.norm(r)
    return (d**2).mean(), c @ r / (norms[0] * norms[1]), np.abs(d).max(), np.linalg.norm(d) / norms[1]


def whole_silent(candidate: Array, reference: Array) -> tuple[float, ...]:
    """The yardstick, silent about what infinities do to it."""
    with np.errstate(invalid="ignore"):
        return whole(candidate, reference)


def rate(function: Callable[[Array, Array], object], candidate: Array, reference: Array) -> float:
    """Best of a few runs, in GB per second of processor time."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        function(candidate, reference)
        best = min(best, time.process_time() - start)
    return (candidate.nbytes + reference.nbytes) / best / 1e9


def scratch(function: Callable[[Array, Array], object], candidate: Array, reference: Array) -> float:
    """Most memory held at a time besides the inputs, in MiB."""
    tracemalloc.start()
    function(candidate, reference)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def row(
    name: str,
    ours: Callable[[Array, Array], object],
    plain: Callable[[Array, Array], object],
    pair: tuple[Array, Array],
) -> None:
    """Measure both and print a line."""
    fast, slow = rate(ours, *pair), rate(plain, *pair)
    memory = scratch(ours, *pair), scratch(plain, *pair)
    print(f"{name:32}{fast:9.2f}{slow:9.2f}{fast / slow:8.1f}{memory[0]:9.1f}{memory[1]:9.1f}", flush=True)


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    reference = 50 * rng.standard_normal(ELEMENTS)
    candidate = reference * (1 + 1e-3 * rng.standard_normal(ELEMENTS))
    print(f"{'':32}{'GB/s':>9}{'numpy':>9}{'ratio':>8}{'MiB':>9}{'numpy':>9}")
    for names in PAIRS:
        kinds = [np.dtype(getattr(ml_dtypes, name, name)) for name in names]
        pair = candidate.astype(kinds[0]), reference.astype(kinds[1])
        row(" / ".join(names), measure, whole, pair)
    bf16 = candidate.astype(ml_dtypes.bfloat16), reference.astype(ml_dtypes.bfloat16)
    square = [array.reshape(2048, 2048) for array in bf16]
    row("bfloat16, both transposed", measure, whole, (square[0].T, square[1].T))
    row("bfloat16, one transposed", measure, whole, (square[0].T, square[1]))
    row("bfloat16, columns 1:1025", measure, whole, (square[0][:, 1:1025], square[1][:, 1:1025]))
    masked = [array.copy() for array in bf16]
    for array in masked:
        array[::2] = -np.inf
    row("bfloat16, half −inf", measure, whole_silent, (masked[0], masked[1]))


if __name__ == "__main__":
    main()
