"""What changed from one run to the next: fixed, new, worse, better; and what can no longer be said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.text import Text

from parity.report.terminal import line
from parity.report.text import ranges, times, visible
from parity.results import BAD, FACTOR, ROUNDING, SEVERITY, Comparison, Measurement, SiteVerdict
from parity.sites import family, layer_of

Kind = Literal["new", "worse", "lost", "fixed", "better"]

KINDS: tuple[Kind, ...] = ("new", "worse", "lost", "fixed", "better")
_STYLES: dict[Kind, str] = {
    "new": "bold red",
    "worse": "red",
    "lost": "yellow",
    "fixed": "bold green",
    "better": "green",
}


@dataclass(frozen=True)
class Change:
    """The sites of one family that changed alike; before and after are the worst of them.

    `cause` is the title of the fault that was named there, in the run where the sites are bad.
    """

    kind: Kind
    family: str
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    before: str
    after: str
    cause: str


@dataclass(frozen=True)
class Changes:
    """All changes, and in which respects the two runs did not ask the same question."""

    changes: tuple[Change, ...]
    differences: tuple[str, ...]
    verdicts: tuple[str, str]
    answers: tuple[str, str]

    def of(self, kind: Kind) -> tuple[Change, ...]:
        """The changes of one kind."""
        return tuple(change for change in self.changes if change.kind == kind)

    @property
    def is_worse(self) -> bool:
        """Whether anything is new, worse or no longer measured."""
        return any(change.kind in ("new", "worse", "lost") for change in self.changes)


def changes(old: Comparison, new: Comparison) -> Changes:
    """Compare two reports, site by site."""
    before, after = ({m.site: m for m in side.sites} for side in (old, new))
    groups: dict[tuple[Kind, str], list[str]] = {}
    for site in [*after, *(name for name in before if name not in after)]:
        kind = _kind(before.get(site), after.get(site))
        if kind is not None:
            groups.setdefault((kind, family(site)), []).append(site)
    causes = {kind: _causes(old if kind in ("fixed", "better", "lost") else new) for kind in KINDS}
    found = [
        Change(
            kind=kind,
            family=name,
            sites=tuple(sites),
            layers=tuple(layer for site in sites if (layer := layer_of(site)) is not None),
            before=_worst([before.get(site) for site in sites]),
            after=_worst([after.get(site) for site in sites]),
            cause=next((causes[kind][site] for site in sites if site in causes[kind]), ""),
        )
        for (kind, name), sites in groups.items()
    ]
    return Changes(
        changes=tuple(sorted(found, key=lambda change: KINDS.index(change.kind))),
        differences=tuple(_differences(old, new)),
        verdicts=(old.verdict, new.verdict),
        answers=(old.answer, new.answer),
    )


def _kind(old: Measurement | None, new: Measurement | None) -> Kind | None:
    """How one site changed; None if it did not."""
    if not _measured(old) or not _measured(new):
        if _measured(old):
            return "lost"
        return "new" if new is not None and new.verdict in BAD else None
    assert old is not None, "it was measured"
    assert new is not None, "it was measured"
    was, now = _badness(old.verdict), _badness(new.verdict)
    if was != now:
        return ("new" if not was else "worse") if now > was else ("fixed" if not now else "better")
    earlier, later = _ratio(old), _ratio(new)
    if later > FACTOR * earlier and later > ROUNDING:
        return "worse"
    return "better" if earlier > FACTOR * later and earlier > ROUNDING else None


def _badness(verdict: SiteVerdict) -> int:
    """0 for what is right; the worse, the more."""
    return len(BAD) - SEVERITY.index(verdict) if verdict in BAD else 0


def _measured(m: Measurement | None) -> bool:
    return m is not None and m.verdict != "unmeasured"


def _ratio(m: Measurement) -> float:
    """The ratio for comparison: none and NaN say nothing, so they cannot grow or shrink."""
    return m.ratio if m.ratio is not None and m.ratio == m.ratio else 0.0


def _worst(group: list[Measurement | None]) -> str:
    """The worst of a group in a few words."""
    measured = [m for m in group if m is not None and m.verdict != "unmeasured"]
    if not measured:
        return "unmeasured" if any(m is not None for m in group) else "absent"
    worst = max(measured, key=lambda m: (_badness(m.verdict), _ratio(m)))
    return worst.verdict if worst.ratio is None else f"{worst.verdict} {times(worst.ratio)}"


def _causes(comparison: Comparison) -> dict[str, str]:
    return {site: f.fault.title for f in comparison.findings if f.fault for site in f.sites}


def _differences(old: Comparison, new: Comparison) -> Iterator[str]:
    """What makes two runs hard to compare. The candidate may differ: that is the point."""
    before, after = old.environment, new.environment
    for name in ("model", "fingerprint", "tokens", "batch", "working_dtype", "candidate_dtype", "attention", "device"):
        was, now = getattr(before, name), getattr(after, name)
        if was != now:
            yield f"{name.replace('_', ' ')}: {visible(str(was))} → {visible(str(now))}"
    if before.prompt != after.prompt:
        yield "another prompt"


def show(found: Changes, console: Console) -> None:
    """Print the changes, what got worse first."""
    counts = [f"{len(found.of(kind))} {kind}" for kind in KINDS if found.of(kind)]
    was, now = found.verdicts
    head = Text(f"{was} → {now}" if was != now else f"still {now}", style="bold")
    line(console, Text.assemble(head, "  ", ", ".join(counts) or "no operation changed"))
    for difference in found.differences:
        line(console, Text(f"not the same question: {difference}", style="yellow"))
    for change in found.changes:
        console.print()
        where = f"  layer{'s' * (len(change.layers) > 1)} {ranges(change.layers)}" if change.layers else ""
        line(console, Text.assemble((f"{change.kind:6}", _STYLES[change.kind]), "  ", visible(change.family), where))
        line(console, Text(f"{change.before} → {change.after}"), 8)
        if change.cause:
            line(console, Text(visible(change.cause), style="dim"), 8)
    if found.answers[0] != found.answers[1]:
        console.print()
        for label, answer in zip(("before", "after"), found.answers, strict=True):
            line(console, Text(f"{label}: {visible(answer)}"))
