"""Reading a number off the candidate: which eps, theta, scale or offset fits it best, and how surely.

A fault with a number is a curve of outputs. Where along it the candidate lies is found by least squares, from
the numbers seen in the wild and from a regression on the way to each of them, which finds every number whose
effect is nearly linear however far off it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from parity.faults import Number

# A number is refined only from a start that leaves less than this share of the error.
_HOPEFUL = 0.9
_STEPS = 8
_HALVINGS = 5
# The change of a number, relative to it, over which its effect is taken for a straight line …
_SMALL = 1e-3
# … and the one that is too small to be worth another step.
_SETTLED = 1e-7
# The logarithm of a number moves by no more than this in one step.
_FARTHEST = 2.0

# Legal ways to a constant's effect differ by this much: a factor that all rows share, in unit roundoffs of float32 (the
# mean of a norm, its root, its inverse and the product, each rounded or approximated once), and a base of powers.
LEAST_EFFECT, _LEAST_CHANGE = 4 * 2.0**-24, 1e-5

# What the reference with the fault computes, for each value of the fault's number.
Curve = Callable[[float], Tensor]


@dataclass(frozen=True)
class Uncertainty:
    """How far a number may be off: by noise that rows do not share, and by what rounding makes of it.

    stderr   standard error by least squares, with errors clustered in rows
    leans    how much too large the number reads on the reference's own rounding, with the fault and without:
             errors that many rows share (a table of cosines) make it so
    """

    stderr: float = 0.0
    leans: tuple[float, float] = (0.0, 0.0)

    @property
    def total(self) -> float:
        """Both together."""
        return math.hypot(self.stderr, *self.leans)


def difference(candidate: Tensor, truth: Tensor) -> Tensor:
    """Candidate minus truth where that is finite and the truth is not masked, else 0. All have one shape, any shape."""
    raw = candidate.to(truth.device, truth.dtype) - truth
    return torch.where(raw.isfinite() & (truth > torch.finfo(torch.float16).min), raw, 0)


def energy(candidate: Tensor, truth: Tensor) -> float:
    """Sum of squares of the difference. Both have one shape, any shape."""
    # Numbers beyond 1e19 have no squares in float32, and sums of many squares have few digits there.
    return float(torch.linalg.vector_norm(difference(candidate, truth), dtype=torch.float64).square())


def is_told(value: float, expected: float, unsure: Uncertainty, faulty: Tensor, truth: Tensor) -> bool:
    """Whether a number that was read is another than the right one, rather than the right one in another legal way.

    `faulty` is the reference's output with the number, `truth` with the right one; both have one shape, any shape.
    """
    size = float(torch.linalg.vector_norm(torch.where(truth.isfinite(), truth, 0), dtype=torch.float64))
    is_seen = math.sqrt(energy(faulty, truth)) > LEAST_EFFECT * size
    margin = max(_LEAST_CHANGE * abs(expected), 2 * unsure.total if math.isfinite(unsure.total) else 0.0)
    return is_seen and abs(value - expected) > margin


def best_value(
    number: Number, expected: float, starts: Iterable[float], curve: Curve, candidate: Tensor, truth: Tensor
) -> float:
    """The number with the smallest remainder. `candidate` and `truth` have one shape, any shape."""
    error = energy(candidate, truth)
    tried: dict[float, float] = {}
    regressed: dict[float, float] = {}
    for start in starts:
        faulty = curve(start)
        tried[start] = energy(candidate, faulty)
        if not number.discrete:
            slope, share = _regression(candidate, truth, faulty)
            regressed[expected + slope * (start - expected)] = share
    if regressed:
        start = max(regressed, key=lambda value: regressed[value])
        if start > 0 or not _in_ratios(number, expected):
            tried[start] = energy(candidate, curve(start))
    best = min(tried, key=lambda value: tried[value])
    if number.discrete or not tried[best] < _HOPEFUL * error:
        return best
    return _descend(best, tried[best], curve, candidate, log=_in_ratios(number, expected))


def _in_ratios(number: Number, expected: float) -> bool:
    return number.log and expected > 0


def _regression(candidate: Tensor, truth: Tensor, faulty: Tensor) -> tuple[float, float]:
    """How far the candidate has gone from the truth towards a faulty output, and the share of its error on that way."""
    error, way = difference(candidate, truth), difference(faulty, truth)
    along, length, size = _dot(error, way), _dot(way, way), _dot(error, error)
    return (along / length, along**2 / (length * size)) if length and size else (0.0, 0.0)


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.linalg.vecdot(x, y).double().sum())


def _descend(start: float, least: float, curve: Curve, candidate: Tensor, *, log: bool) -> float:
    """Gauss-Newton steps, halved until they help; by factors for numbers whose errors are ratios."""
    value, faulty = start, curve(start)
    for _ in range(_STEPS):
        slope = _slope(curve, value, faulty)
        steep = _dot(slope, slope)
        if not 0 < steep < math.inf:
            break
        step = _dot(difference(candidate, faulty), slope) / steep
        for halving in range(_HALVINGS):
            part = step / 2**halving
            moved = value * math.exp(max(-_FARTHEST, min(_FARTHEST, part / value))) if log else value + part
            output = curve(moved)
            left = energy(candidate, output)
            if left < least or abs(part) <= _SETTLED * abs(value):
                break
        if not left < least:
            break
        value, faulty, least = moved, output, left
        if abs(part) <= _SETTLED * abs(value):
            break
    return value


def _slope(curve: Curve, value: float, faulty: Tensor) -> Tensor:
    """The output's change with the number."""
    small = abs(value) * _SMALL or _SMALL
    return difference(curve(value + small), faulty) / small


def uncertainty(value: float, curve: Curve, candidate: Tensor, floor: Tensor, plain: Tensor) -> Uncertainty:
    """How far off a number may be that was read off the candidate.

    `floor` is what the reference with the fault computes in the working dtype, `plain` its rounding error without.
    The noise is what the fault leaves of the candidate, or the reference's own rounding if that is larger.
    The tensors have one shape, any shape.
    """
    faulty = curve(value)
    slope = _slope(curve, value, faulty)
    steep = _dot(slope, slope)
    if not 0 < steep < math.inf:
        return Uncertainty(math.inf)
    own, left = difference(floor, faulty), difference(candidate, faulty)
    # Rounding errors of one row are not independent (a norm's factor is shared), so rows are what is counted.
    noise = max(float(torch.linalg.vecdot(slope, e).double().square().sum().sqrt()) for e in (own, left))
    # The number has been fitted to a candidate that may have the very same errors: the others are needed as well.
    return Uncertainty(noise / steep, (_dot(slope, own) / steep, _dot(slope, plain) / steep))
