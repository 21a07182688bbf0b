"""A finding's picture as coordinates: its residual token by token, which an inline SVG draws."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

from parity.report.text import number, times
from parity.results import ROUNDING, Residual

# Cells at most: more would be narrower than one can see on a page.
_MOST_TOKENS, _MOST_COLUMNS = 128, 32
_WORST = 5
_STEPS = 6


@dataclass(frozen=True)
class ResidualMap:
    """A cell for each token across and each head, or block of channels, down.

    paths    of each colour step beyond rounding, an SVG path in units of cells; the darkest begins at `darkest`, as
             the steps are equal on a logarithmic scale up to the largest ratio: those of the map would all be dark
    calls    places across at which a call begins, but for the first
    worst    the worst tokens and their ratios, in words
    ends     the first and the last token; tokens and heads or channels in a cell are `per_cell`
    """

    width: int
    height: int
    paths: tuple[tuple[int, str], ...]
    darkest: float
    calls: tuple[float, ...]
    worst: str
    label: str
    axis: str
    last: int
    per_cell: tuple[int, int]


def residual_map(found: Residual, tokens: int, calls: Sequence[int]) -> ResidualMap | None:
    """The picture of a residual; None if it has no token, or no column."""
    if not found.ratios or not found.ratios[0]:
        return None
    step = math.ceil(len(found.ratios) / _MOST_TOKENS)
    rows = [_largest(found.ratios[i : i + step]) for i in range(0, len(found.ratios), step)]
    wide = math.ceil(len(rows[0]) / _MOST_COLUMNS)
    cells = [[_worst_of(row[i : i + wide]) for i in range(0, len(row), wide)] for row in rows]
    per_cell = math.ceil(tokens / len(found.ratios)) * step, math.ceil(found.size / len(found.ratios[0])) * wide
    starts = [start / per_cell[0] for start in call_starts(calls)]
    ratios = [_worst_of(row) for row in found.ratios]
    ends = _ends([value for row in cells for value in row])
    return ResidualMap(
        width=len(cells),
        height=len(cells[0]),
        paths=tuple(_paths(cells, ends)),
        darkest=ends[-1],
        calls=tuple(round(start, 2) for start in starts) if len(starts) <= _MOST_TOKENS else (),
        worst=_words(ratios, math.ceil(tokens / len(ratios))) if len(ratios) > 1 else "",
        label=f"Local error over the floor, token by token and {found.columns} by {found.columns}, largest "
        f"{times(_worst_of(ratios))}",
        axis=f"{found.columns}s 0 to {found.size - 1}" if found.size > 1 else found.columns,
        last=tokens - 1,
        per_cell=per_cell,
    )


def call_starts(calls: Sequence[int]) -> list[int]:
    """The tokens at which a call begins, but for the first; of tokens decoded one by one, where that begins."""
    starts = accumulate(calls)
    return [start for start, (one, after) in zip(starts, pairwise(calls), strict=False) if one > 1 or after > 1]


def _worst_of(values: Iterable[float]) -> float:
    """The largest; what is not a number is larger than any."""
    return max((math.inf if math.isnan(v) else v for v in values), default=0.0)


def _largest(rows: Sequence[Sequence[float]]) -> list[float]:
    return [_worst_of(column) for column in zip(*rows, strict=True)]


def _ends(values: Sequence[float]) -> list[float]:
    """Upper ends of the colour steps but the last: rounding, and equal factors up to the largest finite number."""
    most = max([2 * ROUNDING, *(v for v in values if math.isfinite(v))])
    return [ROUNDING * (most / ROUNDING) ** (i / _STEPS) for i in range(_STEPS)]


def _paths(cells: Sequence[Sequence[float]], ends: Sequence[float]) -> Iterable[tuple[int, str]]:
    """For each step beyond rounding, its cells; neighbours of one step across are one rectangle."""
    steps = [[bisect_left(ends, value) for value in row] for row in cells]
    drawn: dict[int, list[str]] = {}
    for y in range(len(steps[0])):
        x = 0
        for step, run in groupby(row[y] for row in steps):
            length = len(list(run))
            if step:
                drawn.setdefault(step, []).append(f"M{x} {y}h{length}v1h-{length}z")
            x += length
    return ((step, "".join(drawn[step])) for step in sorted(drawn))


def _words(ratios: Sequence[float], width: int) -> str:
    """The worst tokens with their ratios: `worst tokens: 213 (550x), 12 (541x), …`."""
    order = sorted(range(len(ratios)), key=lambda i: -ratios[i])[:_WORST]
    named = (f"{i * width}{f' to {(i + 1) * width - 1}' if width > 1 else ''} ({number(ratios[i])}x)" for i in order)
    return f"worst tokens: {', '.join(named)}"
