"""Does a part of a run (a layer, the logits, …) hold what was asked of it? A Comparison in, failures out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from parity import words
from parity.columns import BY_KEY
from parity.report.text import visible
from parity.results import BAD, ROUNDING, Comparison, Finding, Measurement, logits_of
from parity.settings import NEXT_TOKEN, Settings
from parity.sites import layer_of
from parity.testing.baseline import is_worse

EMBEDDING, FINAL_NORM, LOGITS = "embedding", "final_norm", "logits"
_MOST = 6


@dataclass(frozen=True)
class Failure:
    """What is wrong at one site, in a line."""

    site: str
    text: str


def split(sites: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """The sites of each part, in order of execution: what is before the layers, each layer, what comes after."""
    parts: dict[str, list[Measurement]] = {}
    before, logits = True, logits_of(sites)
    for site in sites:
        layer = layer_of(site.site)
        before = before and layer is None
        if layer is not None:
            part = f"layers.{layer}"
        elif site is logits:
            part = LOGITS
        else:
            part = EMBEDDING if before else FINAL_NORM
        parts.setdefault(part, []).append(site)
    return parts


def failures(part: str, c: Comparison, settings: Settings, baseline: Mapping[str, float]) -> list[Failure]:
    """What fails in one part; nothing if all of it holds. `baseline` has earlier ratios by site."""
    if part == NEXT_TOKEN:
        return list(_next_token(c, settings))
    found = [f for m in split(c.sites).get(part, []) if (f := _site(m, settings, baseline)) is not None]
    if part == LOGITS:
        found += [Failure(check.name, f"check failed: {check.detail}") for check in c.checks if not check.ok]
        if not found and _drifts(c) and c.logits is not None and not settings.limits(c.logits.site):
            found.append(Failure(c.logits.site, c.headline))
    return found


def _drifts(c: Comparison) -> bool:
    """Whether the run is inconclusive for a reason that fails no part of its own."""
    return c.inconclusive is not None and c.inconclusive.kind == "logits off"


def _site(m: Measurement, settings: Settings, baseline: Mapping[str, float]) -> Failure | None:
    if m.verdict == "unmeasured":
        if settings.may_be_unmeasured(m.site):
            return None
        return Failure(m.site, f"unmeasured: {words.reason(m)}. Accept it with allow_unmeasured.")
    limits = settings.limits(m.site)
    if m.verdict == "nonfinite" or (m.verdict in BAD and not limits):
        ratio = f"ratio {m.ratio:.3g}" if m.ratio is not None else "no ratio"
        return Failure(m.site, f"{m.verdict}, {ratio} (rounding: up to {ROUNDING:g}): {m.reason}")
    beyond = [text for key, limit in limits if (text := _beyond(m, key, limit))]
    if beyond:
        return Failure(m.site, ", ".join(beyond))
    than = baseline.get(m.site)
    if than is not None and m.ratio is not None and is_worse(m.ratio, than):
        return Failure(m.site, f"ratio {m.ratio:.3g} (baseline: {than:.3g}). Accept it with --parity-record.")
    return None


def _beyond(m: Measurement, key: str, limit: float) -> str:
    """What to say of a number that is beyond its limit, NaN included; empty if it is not."""
    column, value = BY_KEY[key], getattr(m, key)
    if value is None:
        return f"{key} was not measured (limit {limit:g})"
    if column.holds(value, limit):
        return ""
    return f"{column.title} {value:{column.said}} (threshold: {limit:g})"


def _next_token(c: Comparison, settings: Settings) -> Iterator[Failure]:
    token = c.next_token
    if token is None:
        if c.logits and c.logits.verdict == "unmeasured" and settings.may_be_unmeasured(c.logits.site):
            return
        yield Failure(NEXT_TOKEN, "the candidate's logits are missing or not finite")
        return
    limits = dict(settings.limits(NEXT_TOKEN))
    if "kl" in limits and not token.max_kl <= limits["kl"]:
        yield Failure(NEXT_TOKEN, f"KL divergence {token.max_kl:.3g} (threshold: {limits['kl']:g})")
    if not limits and token.unexplained_flips:
        ours, theirs = token.reference[0], token.candidate[0]
        where = f"{token.unexplained_flips} of {token.positions} positions"
        tops = f"reference {ours.text!r} ({ours.logit:.2f}), candidate {theirs.text!r} ({theirs.logit:.2f})"
        yield Failure(NEXT_TOKEN, f"the top token differs by more than rounding at {where}; last: {tops}")


# -- in words ------------------------------------------------------------------------------------------------


def explain(failed: Sequence[Failure], c: Comparison, page: Path) -> list[str]:
    """The failures as lines, each finding's cause, evidence and picture on the page after the sites that it covers.

    A candidate's or a dump's text stands in some of them: none of it can act on a terminal.
    """
    lines = [f"{failure.site}: {failure.text}" for failure in failed[:_MOST]]
    if len(failed) > _MOST:
        lines.append(f"… and {len(failed) - _MOST} more sites")
    sites = {failure.site for failure in failed}
    for number, finding in enumerate(c.findings, 1):
        if sites.intersection(finding.sites):
            said = " ".join(lines)
            lines += [line for line in _cause(finding) if line.strip() not in said]
            if finding.residual is not None and page.suffix == ".html":
                lines.append(f"  picture: {page.as_uri()}#finding-{number}")
    return [visible(line) for line in lines]


def _cause(finding: Finding) -> list[str]:
    fault = finding.fault
    lines = [f"finding: {', '.join(finding.families)}, {finding.verdict}, ratio {finding.ratio:.3g}"]
    if fault is not None:
        lines += [f"  cause: {fault.title} (explains {fault.explained:.4%})", f"  fix: {fault.fix}"]
    return lines + [f"  {line}" for line in finding.evidence]


def worst(sites: Sequence[Measurement]) -> Measurement | None:
    """The site of the largest ratio; None if none was measured."""
    measured = [m for m in sites if m.ratio is not None and m.verdict != "unmeasured"]
    return max(measured, key=lambda m: (m.verdict in BAD, m.ratio), default=None)
