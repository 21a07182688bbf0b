"""The usual figures of a rollout, each beside what an engine that only rounds would show.

With p the reference's and q the engine's log-probabilities of the sampled tokens, Δ = q − p:

    mean |Δ|, mean exp|Δ|, k1 = mean Δ, k3 = mean(e^−Δ − 1 + Δ), Pearson of e^q and e^p, share of |e^−Δ − 1| > 0.2

k1 and k3 estimate KL(engine ‖ reference) from the engine's own samples (J. Schulman, "Approximating KL Divergence",
2020). The floor of each is measured: engines that only round are drawn at random, and the same figure is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parity.reference import chance
from parity.rollout_report import Figure, Stretch

Floats = NDArray[np.float64]

CLIP = 0.2
_MOST_DECIMALS = 7
_FEWEST = 8  # numbers that show a grid
# As many draws as the middle of all tokens counts for where one token's floor is estimated.
_PRIOR = 4


@dataclass(frozen=True)
class Storage:
    """How a file rounds its numbers: `step(values)` is the distance of neighbours; words is empty where none shows."""

    words: str
    step: Callable[[Floats], Floats]

    def stored(self, values: Floats) -> Floats:
        """Values (…) as the file would hold them."""
        step = self.step(values)
        return np.where(step > 0, np.round(values / np.where(step > 0, step, 1)) * step, values)

    def holds(self, values: Floats) -> bool:
        """Whether all values (n) lie on the grid, but for the last bits of a decimal fraction."""
        return bool(np.abs(self.stored(values) - values).max() < 1e-12)


def storage_of(values: Floats) -> Storage:
    """The coarsest grid on which all finite numbers (n) of a file lie: few decimals, bfloat16 or float16."""
    finite = values[np.isfinite(values)]
    if finite.size < _FEWEST:
        return Storage("", np.zeros_like)
    grids = [Storage(f"{decimals} decimals", _absolute(10.0**-decimals)) for decimals in range(1, _MOST_DECIMALS)]
    grids += [Storage("bfloat16", _relative(8)), Storage("float16", _relative(11))]
    return next((grid for grid in grids if grid.holds(finite)), Storage("", np.zeros_like))


def _absolute(width: float) -> Callable[[Floats], Floats]:
    return lambda values: np.full_like(values, width)


def _relative(bits: int) -> Callable[[Floats], Floats]:
    def step(values: Floats) -> Floats:
        _, exponent = np.frexp(values)
        result: Floats = np.where(values == 0, 0.0, np.ldexp(1.0, exponent - bits))
        return result

    return step


@dataclass(frozen=True)
class Floor:
    """What rounding does to log-probabilities (n): `draws` (k, n) are errors of engines that only round.

    `rms` is their root mean square at each token.
    """

    draws: Floats

    @property
    def rms(self) -> Floats:
        """(n): root mean square over the draws."""
        return rms(self.draws, axis=0)

    @property
    def usual(self) -> Floats:
        """The same (n), no smaller than chance makes a token's few draws: drawn towards the middle of all."""
        draws, middle = len(self.draws), float(np.median(self.rms))
        whole: Floats = np.sqrt((draws * np.square(self.rms) + _PRIOR * middle**2) / (draws + _PRIOR))
        return np.maximum(whole, np.finfo(np.float64).tiny)


def floor_of(own: Floats, ideal: Floats, noise: Floats, storage: Storage) -> Floor:
    """Errors of engines that only round, from the reference's own error and passes rounded at random (k, n).

    A stochastic rounding's error is √2 times that of one to nearest. Where the reference itself is farther off than
    those passes (it rounds within its operations too), they are widened to that.
    """
    errors = (noise - ideal) / np.sqrt(2)
    ours, theirs = rms(own - ideal), rms(errors)
    wider = max(1.0, ours / theirs) if theirs else 1.0
    drawn = storage.stored(ideal + wider * errors) - ideal
    return Floor(np.concatenate([drawn, (storage.stored(own) - ideal)[None]]))


def rms(values: Floats, axis: int | None = None) -> Floats:
    """Root mean square, of all values or along an axis."""
    result: Floats = np.sqrt(np.square(values).mean(axis))
    return result


def ratio_of(error: Floats, floor: Floor) -> float:
    """How far an error (n) is above that of rounding, less what chance makes of so few tokens.

    The larger of two: the RMS of all over that of rounding, and the middle of the tokens, each by its own floor. The
    first sees an error anywhere, the second is not swallowed by the few improbable tokens that round the most.
    """
    energy = np.square(floor.rms)
    if not energy.sum():
        return float("inf") if np.any(error) else 0.0
    counting = float(energy.sum() ** 2 / np.square(energy).sum())
    whole = chance.less(float(np.sqrt(np.square(error).sum() / energy.sum())), chance.of_sample(counting))
    usual = floor.usual
    expected = float(np.median(np.abs(floor.draws) / usual))
    middle = float(np.median(np.abs(error) / usual)) / expected if expected else 0.0
    return max(whole, chance.less(middle, chance.of_sample(len(error) / 2)))


def figures(engine: Floats, own: Floats, ideal: Floats, floor: Floor) -> tuple[Figure, ...]:
    """All figures of log-probabilities (n)."""
    engines = ideal + floor.draws[:-1]  # the last draw is the reference itself
    return tuple(_figure(row, engine, own, engines) for row in FIGURES)


@dataclass(frozen=True)
class FigureRow:
    """A figure: `of(engine (n), reference (n))`, `best` where both agree, the fixed `alarm` that is usual."""

    key: str
    title: str
    of: Callable[[Floats, Floats], float]
    best: float = 0.0
    alarm: float | None = None


def _figure(row: FigureRow, engine: Floats, own: Floats, engines: Floats) -> Figure:
    drawn = [row.of(one, own) for one in engines]
    farthest = max(drawn, key=lambda value: abs(value - row.best))
    return Figure(row.key, row.title, row.of(engine, own), float(np.mean(drawn)), farthest, row.alarm)


def _k3(q: Floats, p: Floats) -> float:
    delta = q - p
    return float((np.expm1(-delta) + delta).mean())


def _pearson(q: Floats, p: Floats) -> float:
    a, b = np.exp(q), np.exp(p)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum() / size) if size else float(np.array_equal(q, p))


FIGURES = (
    FigureRow("mean_abs", "mean |Δ log p|", lambda q, p: float(np.abs(q - p).mean())),
    FigureRow("mean_exp", "mean exp |Δ log p|", lambda q, p: float(np.exp(np.abs(q - p)).mean()), 1.0, 1.05),
    FigureRow("k1", "KL, k1", lambda q, p: float((q - p).mean()), 0.0, 0.015),
    FigureRow("k3", "KL, k3", _k3, 0.0, 0.015),
    FigureRow("pearson", "Pearson of the probabilities", _pearson, 1.0),
    FigureRow("clipped", f"ratios beyond 1 ± {CLIP}", lambda q, p: float((np.abs(np.expm1(p - q)) > CLIP).mean())),
)


def stretches(
    at: NDArray[np.int64], error: Floats, delta: Floats, floor: Floor, floor_of_delta: Floats
) -> tuple[Stretch, ...]:
    """By position in the completion: 0, 1, 2 to 3, 4 to 7, …

    at (n) are the positions; error (n) is against the exact values and delta (n) against the reference's, of which
    floor_of_delta (k, n) is what rounding makes.
    """
    found = []
    for start, end in _spans(int(at.max())):
        inside = (at >= start) & (at <= end)
        if not inside.any():
            continue
        found.append(
            Stretch(
                start,
                min(end, int(at[inside].max())),
                int(inside.sum()),
                float(np.abs(delta[inside]).mean()),
                float(np.abs(floor_of_delta[:, inside]).mean()),
                ratio_of(error[inside], Floor(floor.draws[:, inside])),
            )
        )
    return tuple(found)


def _spans(last: int) -> Iterator[tuple[int, int]]:
    yield 0, 0
    start = 1
    while start <= last:
        yield start, 2 * start - 1
        start *= 2


def far_rows(row: NDArray[np.int64], error: Floats, floor: Floor, limit: float) -> tuple[int, ...]:
    """Rows whose RMS error is more than `limit` times that of rounding, less what chance makes of the worst of them.

    `row` and `error` are those of tokens (n). A row's floor is no less than what is usual: it may be small by chance.
    """
    usual = float(np.sqrt(np.square(floor.rms).mean()))
    numbers: Sequence[int] = np.unique(row).tolist()
    found = []
    for number in numbers:
        inside = row == number
        known = max(float(rms(floor.rms[inside])), usual)
        by_chance = chance.of_worst_row(float(inside.sum()), len(numbers))
        if known and float(rms(error[inside])) / known / by_chance > limit:
            found.append(number)
    return tuple(found)
