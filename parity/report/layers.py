"""Measurements gathered by layer: the rows of every per-layer table, and the points of the error by depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parity.columns import LAYER_COLUMNS, Column
from parity.results import BAD, SEVERITY, Measurement, SiteVerdict, worst_verdict
from parity.sites import group_label, short


@dataclass(frozen=True)
class Worst:
    """The worst number of a layer in one column, and the site that has it; None where no site has one."""

    column: Column
    value: float | None
    site: str


@dataclass(frozen=True)
class LayerRow:
    """One layer, or one site outside the layers: how many of its sites were measured, and the worst of them.

    The verdict is that of the measured sites, and `unmeasured` only where none was. `worst` are in the order of
    LAYER_COLUMNS, ratio first.
    """

    label: str
    verdict: SiteVerdict
    measured: int
    known: int
    worst: tuple[Worst, ...]

    @property
    def rank(self) -> tuple[int, float]:
        """Sorts the worst first."""
        ratio = self.worst[0].value
        return SEVERITY.index(self.verdict), -LAYER_COLUMNS[0].badness(0.0 if ratio is None else ratio)


def rows(sites: Sequence[Measurement]) -> list[LayerRow]:
    """One row for each layer and each site outside the layers, in order of execution."""
    return [_row(label, group) for label, group in _by_layer(sites).items()]


def _by_layer(sites: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    groups: dict[str, list[Measurement]] = {}
    for site in sites:
        groups.setdefault(group_label(site.site), []).append(site)
    return groups


def _row(label: str, group: list[Measurement]) -> LayerRow:
    measured = [m for m in group if m.verdict != "unmeasured"]
    return LayerRow(
        label=label,
        verdict=worst_verdict(m.verdict for m in measured) if measured else "unmeasured",
        measured=len(measured),
        known=len(group),
        worst=tuple(_worst(column, measured) for column in LAYER_COLUMNS),
    )


def _worst(column: Column, measured: list[Measurement]) -> Worst:
    values = [(value, m.site) for m in measured if (value := getattr(m, column.key)) is not None]
    if not values:
        return Worst(column, None, "")
    value, site = max(values, key=lambda pair: column.badness(pair[0]))
    return Worst(column, value, short(site))


@dataclass(frozen=True)
class Depth:
    """The errors of one layer, or of one site outside the layers, relative to the values.

    local      of the site with the largest ratio; `site` is its name
    floor_low  the smallest and the largest floor of its sites: the band that rounding fills
    total      candidate against the plain reference at the last measured site
    inherited  what of that came in with the inputs
    """

    label: str
    site: str
    bad: bool
    local: float | None
    floor_low: float | None
    floor_high: float | None
    total: float | None
    inherited: float | None


def by_depth(sites: Sequence[Measurement]) -> list[Depth]:
    """One point for each row of the layer table."""
    return [_depth(label, group) for label, group in _by_layer(sites).items()]


def _depth(label: str, group: list[Measurement]) -> Depth:
    measured = [m for m in group if m.verdict != "unmeasured" and m.local_rel is not None]
    floors = [m.floor_rel for m in measured if m.floor_rel]
    worst = max(measured, key=lambda m: (m.verdict in BAD, m.ratio or 0.0), default=None)
    last = measured[-1] if measured else None
    return Depth(
        label=label,
        site=worst.site if worst else "",
        bad=worst is not None and worst.verdict in BAD,
        local=worst.local_rel if worst else None,
        floor_low=min(floors, default=None),
        floor_high=max(floors, default=None),
        total=last.rel_l2 if last else None,
        inherited=last.inherited_rel if last else None,
    )
