"""Measurements gathered by layer: the rows of every per-layer table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parity.results import Measurement, SiteVerdict, worst_verdict
from parity.sites import group_label, short


@dataclass(frozen=True)
class LayerRow:
    """One layer, or one of the ends: its worst verdict, ratio, MSE and cosine, each with the site that has it."""

    label: str
    verdict: SiteVerdict
    measured: int
    known: int
    ratio: float | None
    ratio_site: str
    mse: float | None
    mse_site: str
    cosine: float | None


def rows(sites: Sequence[Measurement]) -> list[LayerRow]:
    """One row for each layer and each site outside the layers, in order of execution."""
    groups: dict[str, list[Measurement]] = {}
    for site in sites:
        groups.setdefault(group_label(site.site), []).append(site)
    return [_row(label, group) for label, group in groups.items()]


def _row(label: str, group: list[Measurement]) -> LayerRow:
    measured = [m for m in group if m.verdict != "unmeasured"]
    by_ratio = max((m for m in measured if m.ratio is not None), key=lambda m: m.ratio or 0.0, default=None)
    by_mse = max((m for m in measured if m.mse is not None), key=lambda m: m.mse or 0.0, default=None)
    return LayerRow(
        label=label,
        verdict=worst_verdict(m.verdict for m in group),
        measured=len(measured),
        known=len(group),
        ratio=by_ratio.ratio if by_ratio else None,
        ratio_site=short(by_ratio.site) if by_ratio else "",
        mse=by_mse.mse if by_mse else None,
        mse_site=short(by_mse.site) if by_mse else "",
        cosine=min((m.cosine for m in measured if m.cosine is not None), default=None),
    )
