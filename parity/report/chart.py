"""The error by depth as coordinates: what an inline SVG draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from parity.report.layers import Depth
from parity.report.text import number, visible

WIDTH, NARROW, HEIGHT = 960.0, 380.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 16.0, 12.0, 40.0


@dataclass(frozen=True)
class Mark:
    """The local error of one layer."""

    x: float
    y: float
    bad: bool
    label: str


@dataclass(frozen=True)
class Chart:
    """Coordinates of the chart; `ticks` of the vertical axis and `labels` of the horizontal one are (place, text)."""

    band: str
    total: str
    inherited: str
    marks: tuple[Mark, ...]
    ticks: tuple[tuple[float, str], ...]
    labels: tuple[tuple[float, str], ...]
    width: float
    height: float = HEIGHT
    left: float = _LEFT
    bottom: float = HEIGHT - _BOTTOM

    @property
    def right(self) -> float:
        """Where the horizontal axis ends."""
        return self.width - _RIGHT


def chart(points: Sequence[Depth], width: float = WIDTH) -> Chart | None:
    """Place the points on a logarithmic scale, in a picture so wide; None if there is nothing to draw."""
    errors = [v for p in points for v in (p.local, p.floor_low, p.floor_high, p.total, p.inherited)]
    values = [v for v in errors if v is not None and math.isfinite(v) and v > 0]
    if not values:
        return None
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    low, high = max(low, high - 14), max(high, low + 1)
    place = _Scale(low, high, len(points), width)
    return Chart(
        band=_band(points, place),
        total=_line((p.total for p in points), place),
        inherited=_line((p.inherited for p in points), place),
        marks=tuple(_mark(i, p, place) for i, p in enumerate(points) if p.local is not None),
        ticks=tuple((place.y(10.0**e), f"1e{e}") for e in range(low, high + 1, max(1, (high - low) // 6))),
        labels=tuple(_labels(points, place)),
        width=width,
    )


class _Scale:
    def __init__(self, low: int, high: int, count: int, width: float) -> None:
        self.low, self.high, self.count = low, high, count
        self.inner = width - _LEFT - _RIGHT

    def x(self, index: int) -> float:
        return round(_LEFT + self.inner * (index + 0.5) / self.count, 1)

    def y(self, value: float) -> float:
        """Zero lies on the lower edge; what is not finite, on the upper."""
        exponent = float(self.high) if not math.isfinite(value) else math.log10(value) if value > 0 else float(self.low)
        share = min(max((exponent - self.low) / (self.high - self.low), 0.0), 1.0)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)


def _line(values: Iterable[float | None], place: _Scale) -> str:
    """An SVG path with a gap where nothing was measured."""
    parts, pen = [], "M"
    for i, value in enumerate(values):
        if value is None:
            pen = "M"
            continue
        parts.append(f"{pen}{place.x(i):g} {place.y(value):g}")
        pen = "L"
    return "".join(parts)


def _band(points: Sequence[Depth], place: _Scale) -> str:
    """From the smallest floor to the largest, layer by layer."""
    half = place.inner / len(points) / 2
    parts = []
    for i, p in enumerate(points):
        if p.floor_low is None or p.floor_high is None:
            continue
        x, low, high = place.x(i), place.y(p.floor_low) + 1.5, place.y(p.floor_high) - 1.5
        parts.append(f"M{x - half:.1f} {low:g}H{x + half:.1f}V{high:g}H{x - half:.1f}Z")
    return "".join(parts)


def _mark(index: int, point: Depth, place: _Scale) -> Mark:
    local = point.local if point.local is not None else 0.0
    label = f"{visible(point.label)}: local error {number(local, '.2g')} at {visible(point.site)}"
    return Mark(place.x(index), place.y(local), point.bad, label)


def _labels(points: Sequence[Depth], place: _Scale) -> Iterable[tuple[float, str]]:
    """The ends by name, every so many layers by number."""
    every = max(1, math.ceil(len(points) * 28 / place.inner))
    for i, p in enumerate(points):
        _, dot, last = p.label.rpartition(".")
        if dot and last.isdecimal() and int(last) % every == 0:
            yield place.x(i), last
