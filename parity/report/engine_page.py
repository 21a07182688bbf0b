"""Two engines as one HTML file: two columns of verdicts, distance by depth, log-probabilities by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from parity import words
from parity.engine_report import Contrast, Distance, Positions
from parity.report.chart import chart
from parity.report.html import page
from parity.report.layers import Depth, rows
from parity.report.text import count_layers, families, number, where
from parity.results import BAD, ROUNDING, Comparison
from parity.sites import group_label

_BAR = 200.0  # pixels of the longest bar
# Two runs that round apart are seldom so many times as far from each other as usual.
_FAR = 2 * ROUNDING


def render_contrast(c: Contrast, heads: Sequence[str], layers: Sequence[Any], legend: str) -> str:
    """The page. `layers` have the cells of the table by layer, whose columns are `heads`; the same gives the same."""
    called = [
        name if name in ("", side.environment.candidate) else f"{name} ({side.environment.candidate})"
        for name, side in zip(c.engines, (c.first, c.second), strict=True)
    ]
    sides = [
        {"name": name, "c": side, "called": said or side.environment.candidate, "remarks": list(_remarks(side))}
        for name, side, said in zip(("first", "second"), (c.first, c.second), called, strict=True)
    ]
    return page(
        "contrast.html.j2",
        "engines.css",
        c=c,
        summary=summary(c),
        facts=list(_facts(c)),
        sides=sides,
        chart=chart(_depths(c)),
        spans=_spans(c.logprobs),
        heads=heads,
        rows=layers,
        legend=legend,
    )


def summary(c: Contrast) -> str:
    """Which of both is wrong, in a few words."""
    each = (("first", c.first), ("second", c.second))
    wrong = [name for name, side in each if side.verdict == "diverged"]
    undecided = [name for name, side in each if side.verdict == "inconclusive"]
    if len(wrong) == 2:
        said = "both engines are wrong"
    elif wrong:
        said = f"the {wrong[0]} engine is wrong"
    elif undecided:
        said = f"{'both are' if len(undecided) == 2 else f'the {undecided[0]} is'} undecided"
    else:
        said = "each engine is right up to rounding"
    return f"the weights differ; {said}" if c.weights else said


def _facts(c: Contrast) -> Iterator[tuple[str, str]]:
    if c.agreeing is not None:
        yield "same top token", f"{c.agreeing} of {c.positions} positions"
    apart, what = c.apart, c.compared
    if c.distances:
        yield f"same {what}", f"{len(c.distances) - len(apart)} of {len(c.distances)} sites"
    if apart:
        yield f"first other {what}", apart[0].site
        farthest = max(apart, key=lambda d: d.ratio)
        yield "farthest for its floor", f"{farthest.site}, {number(farthest.ratio)}x"
    yield "tokens", str(c.first.environment.tokens)


def _remarks(side: Comparison) -> Iterator[str]:
    layers = count_layers(side)
    for finding in side.findings:
        fault = f": {finding.fault.title}" if finding.fault else ": no known fault matched"
        yield f"{families(finding)}, {where(finding, layers)}, {number(finding.ratio)}x the floor{fault}"
    yield from (f"check failed: {check.name}: {check.detail}" for check in side.checks if not check.ok)
    yield from (f"failed: {words.trouble(trouble)}" for trouble in side.troubles)


def _depths(c: Contrast) -> list[Depth]:
    """A point for each layer: its farthest site for its floor, and its last."""
    groups: dict[str, list[Distance]] = {}
    for d in c.distances:
        groups.setdefault(group_label(d.site), []).append(d)
    bad = {row.label for side in (c.first, c.second) for row in rows(side.sites) if row.verdict in BAD}
    return [_depth(label, group, label in bad) for label, group in groups.items()]


def _depth(label: str, group: Sequence[Distance], bad: bool) -> Depth:
    farthest = max(group, key=lambda d: d.ratio)
    floors = [d.floor for d in group if d.floor]
    return Depth(
        label=label,
        site=farthest.site,
        bad=bad,
        local=farthest.distance,
        floor_low=min(floors, default=None),
        floor_high=max(floors, default=None),
        total=group[-1].distance,
        inherited=None,
    )


def _spans(spans: Sequence[Positions]) -> list[dict[str, Any]]:
    """The rows of the table by position, with bars on one scale."""
    largest = max((max(s.mean_abs, s.floor) for s in spans), default=0.0) or 1.0
    return [
        {
            "tokens": str(s.start) if s.start == s.end else f"{s.start}–{s.end}",
            "size": f"{s.mean_abs:.3g}",
            "floor": f"{s.floor:.3g}",
            "times": number(s.mean_abs / s.floor) if s.floor else "–",
            "width": round(_BAR * s.mean_abs / largest, 1),
            "floor_width": round(_BAR * s.floor / largest, 1),
            "is_far": s.mean_abs > _FAR * s.floor,
        }
        for s in spans
    ]
