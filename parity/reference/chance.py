"""What chance alone makes of a ratio: how far few numbers, and the worst of many rows, may stray.

A ratio compares two root mean squares, the candidate's error and the reference's, each estimated from a sample of
rounding errors. Of ν independent ones each, ln(ratio) is nearly normal with standard deviation 1/√ν (Fisher's z
of an F distribution). One row against a floor that is known well is a χ² of ν over ν (Wilson and Hilferty).

How many errors of a row are independent? Each number is rounded by itself, but what went in was rounded as well,
and whatever mixes it makes fewer of many: √width was measured on spans of a whole layer.
"""

from __future__ import annotations

import math
from statistics import NormalDist

# A clean run alarms less than once in ten thousand, and looks at up to ten thousand sites.
_ALARMS, _SITES = 1e-4, 1e4
# Legal implementations may be noisier than the reference by this much in the mean; a limit of 2 leaves as much again.
_NOISIER, _LIMIT = 1.2, 2.0
# A reference rounds at least once, so its own error is not smaller by chance than a share of that.
_LUCKIEST = 8.0


def in_row(width: int) -> float:
    """Independent rounding errors among the numbers of one row."""
    return math.sqrt(max(width, 1))


def of_sample(freedom: float) -> float:
    """By how much a ratio of two samples of `freedom` independent errors is divided before it meets the limit of 2."""
    strays = _NOISIER / _LIMIT * math.exp(_sigmas(1) / math.sqrt(max(freedom, 1.0)))
    return min(max(1.0, strays), _LUCKIEST)


def less(ratio: float, strays: float) -> float:
    """A ratio less what chance makes of it: what is above 1 is divided by it, but to no less than 1."""
    return max(min(ratio, 1.0), ratio / strays)


def of_known(freedom: float) -> float:
    """As of_sample, against a floor that is known rather than sampled."""
    return max(1.0, _NOISIER / _LIMIT * of_worst_row(freedom, 1))


def of_worst_row(freedom: float, rows: int) -> float:
    """The same for the worst of so many rows of `freedom` independent errors each, against a known floor."""
    spread = 2 / (9 * max(freedom, 1.0))
    return float((1 - spread + _sigmas(rows) * math.sqrt(spread)) ** 1.5)


def _sigmas(tests: int) -> float:
    return -NormalDist().inv_cdf(_ALARMS / _SITES / max(tests, 1))
