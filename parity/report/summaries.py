"""What several reports show alike: sites gathered by reason and by step, and the error by depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from parity import words
from parity.report.text import flips, number, plural, quoted, ranges, visible
from parity.results import BAD, Comparison, Finding, Measurement, NextToken, Token
from parity.sites import family, group_label, layer_of


@dataclass(frozen=True)
class Note:
    """Something that holds of several sites, and which sites these are, by family."""

    text: str
    sites: int
    where: tuple[str, ...]


def steps(sites: Iterable[Measurement]) -> list[Note]:
    """Every transformation that alignment applied, with the sites it was applied to."""
    return _notes((step, m) for m in sites for step in m.steps)


def unmeasured(sites: Iterable[Measurement]) -> list[Note]:
    """Why sites were not measured, with the sites."""
    return _notes((words.reason(m), m) for m in sites if m.verdict == "unmeasured")


def _notes(pairs: Iterable[tuple[str, Measurement]]) -> list[Note]:
    groups: dict[str, list[str]] = {}
    for text, m in pairs:
        groups.setdefault(text, []).append(m.site)
    return [Note(visible(text), len(names), tuple(by_family(names))) for text, names in groups.items()]


def by_family(names: Iterable[str]) -> list[str]:
    """Sites as families with their layers: `model.layers.*.mlp (layers 0-27)`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        layer = layer_of(name)
        groups.setdefault(family(name), []).extend([] if layer is None else [layer])
    return [visible(name) + _layers(layers) for name, layers in groups.items()]


def _layers(layers: Sequence[int]) -> str:
    if not layers:
        return ""
    return f" (layer {layers[0]})" if len(layers) == 1 else f" (layers {ranges(layers)})"


def invisible(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """The faults that this run could not have revealed, each with what is said of it alone, by common reason."""
    groups: dict[str, list[tuple[str, str]]] = {}
    power = comparison.power
    for item in power.unseen if power else ():
        reason, detail = map(visible, words.unseen(item, power.dtype if power else ""))
        groups.setdefault(reason, []).append((visible(item.fault), detail))
    return list(groups.items())


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
    groups: dict[str, list[Measurement]] = {}
    for m in sites:
        groups.setdefault(group_label(m.site), []).append(m)
    return [_depth(label, group) for label, group in groups.items()]


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


def worst_site(finding: Finding, comparison: Comparison) -> Measurement | None:
    """The site of a finding with the largest ratio: the one that its residual is of."""
    names = {finding.residual.site} if finding.residual else set(finding.sites)
    found = [m for m in comparison.sites if m.site in names]
    return max(found, key=lambda m: m.ratio or 0.0, default=None)


def coverage(comparison: Comparison) -> str:
    """`507 of 507 sites measured`."""
    c = comparison.coverage
    return f"{c.measured} of {plural(c.known, 'site')} measured"


def ranks(token: NextToken) -> list[tuple[Token | None, Token | None]]:
    """The top tokens of both sides, side by side."""
    return list(zip_longest(token.reference, token.candidate))


def margins(token: NextToken) -> list[str]:
    """By how much each side prefers its top token, in units of the rounding noise; and where they differ."""
    lines = [
        f"{side} prefers {quoted(top[0].text)} to {quoted(top[1].text)} by {_margin(top, token.margin_sigma)}"
        for side, top in (("reference", token.reference), ("candidate", token.candidate))
        if len(top) > 1
    ]
    lines.append(flips(token) or f"top token is the same at all {plural(token.positions, 'position')}")
    lines.append(f"largest KL divergence at a position: {number(token.max_kl, '.3g')}")
    return lines


def _margin(top: Sequence[Token], sigma: float) -> str:
    margin = top[0].logit - top[1].logit
    noise = f", {number(margin / sigma, '.3g')} standard deviations of the rounding noise" if sigma > 0 else ""
    return f"{number(margin, '.3g')}{noise}"
