"""The map of a run: layers as rows, families as columns, one cell for each site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from parity import words
from parity.report.text import number, times, visible
from parity.results import ROUNDING, Measurement
from parity.sites import family, group_label, layer_of, short

# Upper ends of the colour steps, in units of the floor: the first is rounding, each next is twice or four times as far.
STEPS = (ROUNDING, 4.0, 8.0, 16.0, 64.0, 256.0, math.inf)


@dataclass(frozen=True)
class Cell:
    """One site: its place in `Comparison.sites`, its verdict, its colour step, and what stands in the cell."""

    index: int
    site: str
    verdict: str
    step: int
    glyph: str
    label: str


@dataclass(frozen=True)
class Row:
    """A layer has a cell or a gap for each column; what lies outside the layers has cells of its own."""

    label: str
    is_layer: bool
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Grid:
    """Column heads are the families' names inside the layer."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def grid(sites: Sequence[Measurement]) -> Grid:
    """Arrange the sites; each of them is in exactly one cell."""
    columns = list(dict.fromkeys(family(m.site) for m in sites if layer_of(m.site) is not None))
    heads = {family(m.site): short(m.site) for m in sites}
    groups: dict[tuple[str, bool], list[tuple[int, Measurement]]] = {}
    for index, m in enumerate(sites):
        groups.setdefault((group_label(m.site), layer_of(m.site) is not None), []).append((index, m))
    rows = [_row(label, is_layer, group, columns) for (label, is_layer), group in groups.items()]
    return Grid(tuple(visible(heads[c]) for c in columns), tuple(row for part in rows for row in part))


def _row(label: str, is_layer: bool, group: list[tuple[int, Measurement]], columns: list[str]) -> list[Row]:
    """One row; more if names occur twice, which a report must survive."""
    cells = [(family(m.site), cell(index, m)) for index, m in group]
    if not is_layer:
        return [Row(visible(label), False, tuple(c for _, c in cells))]
    rows: list[dict[str, Cell]] = []
    for name, one in cells:
        row = next((r for r in rows if name not in r), None)
        if row is None:
            rows.append(row := {})
        row[name] = one
    return [Row(visible(label), True, tuple(row.get(c) for c in columns)) for row in rows]


def cell(index: int, m: Measurement) -> Cell:
    """The cell of one site."""
    said = {"exact": "bit-equal", "unmeasured": visible(words.reason(m))}.get(m.verdict, f"{times(m.ratio)} the floor")
    name = visible(m.site)
    return Cell(index, name, m.verdict, step(m), glyph(m), f"{name}: {m.verdict}, {said}")


def glyph(m: Measurement) -> str:
    """At most four characters that tell the verdict without colour: a number stands for more than rounding."""
    fixed = {"exact": "=", "rounding": "·", "unmeasured": "?", "nonfinite": "NaN"}
    if m.verdict in fixed:
        return fixed[m.verdict]
    if m.ratio is None or not math.isfinite(m.ratio):
        return number(m.ratio)
    if m.ratio >= 9999.5:
        return "≥1e" + str(math.floor(math.log10(m.ratio)))
    return f"{m.ratio:.1f}" if m.ratio < 9.95 else f"{m.ratio:.0f}"


def step(m: Measurement) -> int:
    """The colour step, 0 to 6; -1 where there is no ratio to colour."""
    if m.verdict == "unmeasured" or m.ratio is None:
        return -1 if m.verdict != "nonfinite" else len(STEPS) - 1
    if m.verdict == "nonfinite" or math.isnan(m.ratio):
        return len(STEPS) - 1
    return next(i for i, end in enumerate(STEPS) if m.ratio <= end)


def legend() -> list[tuple[int, str]]:
    """The colour steps in words."""
    words = [f"≤ {STEPS[0]:g}x"]
    words += [f"{a:g}-{b:g}x" for a, b in pairwise(STEPS[:-1])]
    return list(enumerate([*words, f"> {STEPS[-2]:g}x"]))
