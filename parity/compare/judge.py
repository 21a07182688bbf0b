"""From ratios to verdicts: of a site, of the run; and from wrong sites to findings.

The order of decisions: integrity first, then non-finite values, then the run's rounding mode, then each
site's ratio, and only where that is too large the question whether the error is noise or has structure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from parity.reasons import Gap, Inconclusive
from parity.results import (
    BAD,
    ROUNDING,
    Check,
    Coverage,
    Finding,
    Measurement,
    NextToken,
    RunVerdict,
    SiteVerdict,
    Structure,
    logits_of,
    worst_verdict,
)
from parity.sites import branch, family, is_stream, layer_of

if TYPE_CHECKING:
    from parity.reference.floor import Local

# Above this ratio no amount of extra rounding is plausible, however much the error looks like noise.
IMPRECISE = 16.0
# Rounding is not correlated with the value it rounds; a mean beyond this share is a bias.
_COHERENT = 0.05
_CONCENTRATED = 3.0
# Truncation instead of rounding to nearest loses 0.7213 of a unit roundoff on average.
_TRUNCATION_GAIN = -0.7213
# The reference's own error is exceeded this many times at the logits only if something is wrong.
_TOTAL = 4.0
# A floor that is this much below its family's is no longer put down to chance.
_LUCKIEST = 4.0
# Where the reference itself is this far off, relative to the value, nothing can be said of a candidate.
_USELESS = 0.5


@dataclass(frozen=True)
class RoundingMode:
    """What the whole run says about the candidate's rounding.

    `fused` operations saw inputs before they were rounded for the dump; `truncates` means float32 bits were
    cut off in place of rounded to nearest.
    """

    fused: bool
    truncates: bool


def rounding_mode(sites: Iterable[Local], roundoff: float) -> RoundingMode:
    """The rounding mode that most sites share. `roundoff` is the unit roundoff of the working dtype."""
    noisy = [s for s in sites if not s.must_be_exact and not s.bit_equal and 0 < s.ratio < IMPRECISE]
    if not noisy:
        return RoundingMode(fused=False, truncates=False)
    gains = [s.structure.gain / roundoff for s in noisy]
    biased = sum(gain < _TRUNCATION_GAIN / 3 for gain in gains) > 0.7 * len(gains)
    truncates = biased and median(gains) < _TRUNCATION_GAIN / 2
    return RoundingMode(fused=not truncates and median(s.ratio for s in noisy) > 1.15, truncates=truncates)


def luck(sites: Mapping[str, Local]) -> dict[str, float]:
    """By how much each site's floor fell short of what is usual in its family: 1 or more.

    The floor of few numbers is one draw of a random quantity. An operation of the same kind, in another layer,
    says how large it usually is; a floor that came out small by chance must not turn rounding into a bug.
    """
    families: dict[str, list[float]] = {}
    for name, local in sites.items():
        families.setdefault(family(name), []).append(local.floor_rel)
    usual = {name: median(floors) for name, floors in families.items()}
    return {
        name: min(max(usual[family(name)] / local.floor_rel, 1.0), _LUCKIEST) if local.floor_rel else 1.0
        for name, local in sites.items()
    }


def judge_site(local: Local, mode: RoundingMode, lucky: float = 1.0) -> tuple[SiteVerdict, float, str | Gap]:
    """Verdict, ratio and reason for one site, the reason of an unmeasured one a Gap; `lucky` is its share of `luck`."""
    if local.nonfinite:
        if local.reference_nonfinite:
            return "unmeasured", local.ratio, Gap("reference overflows")
        return "nonfinite", local.ratio, f"{local.nonfinite} values are NaN or infinite, on finite inputs"
    if local.nonfinite_inputs and local.ratio == 0:
        return "unmeasured", 0.0, Gap("inputs not finite")
    strict, ratio_fused = local.ratio / lucky, local.ratio_fused / lucky
    ratio = ratio_fused if mode.fused else strict
    if local.floor_rel > _USELESS and ratio <= ROUNDING:
        return "unmeasured", ratio, Gap("too rough", share=local.floor_rel)
    if local.bit_equal:
        return "exact", ratio, "bit-equal to the reference on the same inputs"
    if local.must_be_exact:
        return ("exact", 0.0, "equal") if ratio == 0 else ("wrong", ratio, "moves data only, and must be bit-equal")
    if mode.truncates and ratio <= IMPRECISE / 2 and local.structure.gain < 0:
        return "imprecise", ratio, "truncates where it should round to nearest"
    if ratio <= ROUNDING:
        return "rounding", ratio, "within the reference's own rounding"
    if local.all_zero:
        return "wrong", ratio, "all zero"
    if ratio_fused <= ROUNDING and not _follows_value(local.structure):
        return "rounding", ratio_fused, "rounding of an operation fused with the one before it"
    structured = structure_of(local.structure)
    if ratio <= IMPRECISE and not structured:
        return "imprecise", ratio, "noise, but more of it than this dtype needs"
    return "wrong", ratio, structured or "too large for rounding"


def structure_of(s: Structure) -> str:
    """What shows that an error is no noise, or an empty string."""
    if _follows_value(s):
        return f"the error follows the value: gain {1 + s.gain:.4g}"
    if _spread(s.by_head) > _CONCENTRATED:
        worst = max(range(len(s.by_head)), key=s.by_head.__getitem__)
        return f"most of it in head {worst}"
    if _spread(s.by_token) > _CONCENTRATED:
        worst = max(range(len(s.by_token)), key=s.by_token.__getitem__)
        return f"most of it at token {worst * s.pooled}" + (f" to {(worst + 1) * s.pooled - 1}" if s.pooled > 1 else "")
    if s.channel_share > 0.5:
        return f"{s.channel_share:.0%} of it in channel {s.channel}"
    return ""


def _follows_value(s: Structure) -> bool:
    # Chance alone correlates n numbers by about 1/√n.
    return abs(s.cosine) > max(_COHERENT, 5 / math.sqrt(max(s.elements, 1)))


def _spread(profile: Sequence[float]) -> float:
    """Largest over median: 1 for noise. Fewer than three values cannot tell."""
    if len(profile) < 3:
        return 1.0
    middle = median(profile)
    return max(profile) / middle if middle else float("inf")


def findings(sites: Sequence[Measurement]) -> tuple[Finding, ...]:
    """Bad sites grouped by family, in order of execution, with the span of unmeasured sites before each."""
    groups: dict[str, list[Measurement]] = {}
    for site in sites:
        if site.verdict in BAD:
            groups.setdefault(family(site.site), []).append(site)
    order = {site.site: position for position, site in enumerate(sites)}
    return tuple(_finding(name, group, sites, order) for name, group in groups.items())


def _finding(name: str, group: list[Measurement], sites: Sequence[Measurement], order: dict[str, int]) -> Finding:
    worst = max(group, key=lambda m: (m.ratio is not None, m.ratio))
    layers = tuple(layer for m in group if (layer := layer_of(m.site)) is not None)
    return Finding(
        families=(name,),
        sites=tuple(m.site for m in group),
        layers=layers,
        verdict=worst_verdict(m.verdict for m in group),
        ratio=worst.ratio or 0.0,
        first_token=min((first for m in group if (first := _first_token(m)) is not None), default=None),
        evidence=tuple(evidence(worst)),
        span=_span_before(sites, order[group[0].site]),
    )


def _first_token(m: Measurement) -> int | None:
    return m.structure.first_token if m.structure else None


def _span_before(sites: Sequence[Measurement], position: int) -> tuple[str, ...]:
    """The unmeasured sites whose operations a site's verdict covers too: back to what was measured.

    Walks backwards along the data: a measured site closes its branch (or the trunk), the residual stream closes
    everything, and an unmeasured site of the trunk or stream opens what flows into it.
    """
    own = branch(sites[position].site)
    closed: set[str] = set()
    span: list[str] = []
    for earlier in reversed(sites[:position]):
        side, stream = branch(earlier.site), is_stream(earlier.site)
        if own and side not in (own, ""):
            continue
        if earlier.verdict != "unmeasured":
            if stream or own:
                break
            closed.add(side)
        elif stream or side not in closed:
            span.insert(0, earlier.site)
            own = own if side else ""
            closed = set() if stream else closed
    return tuple(span)


def evidence(m: Measurement) -> list[str]:
    """What a finding can say of its worst site, in words."""
    lines = [m.reason] if m.reason else []
    s = m.structure
    if s is None:
        return lines
    tokens = s.by_token
    if len(tokens) > 3 and max(tokens) > ROUNDING:
        if s.pooled == 1 and tokens[0] <= ROUNDING < max(tokens[1:4]):
            lines.append("token 0 is right, later tokens are not")
        clean = next((i for i, ratio in enumerate(tokens) if ratio > ROUNDING), 0)
        if clean > 3:
            lines.append(f"the first {clean * s.pooled} tokens are right")
        third = len(tokens) // 3
        early, late = median(tokens[:third] or tokens), median(tokens[-third:] or tokens)
        if late > 2 * early:
            lines.append("the error grows with position")
        elif early > 2 * late:
            lines.append("the error falls with position")
    heads = [i for i, ratio in enumerate(s.by_head) if ratio > ROUNDING]
    if s.by_head and 0 < len(heads) < len(s.by_head):
        lines.append(f"heads {', '.join(map(str, heads[:8]))}{' …' if len(heads) > 8 else ''} only")
    if s.channel_share > 0.2:
        lines.append(f"{s.channel_share:.0%} of the error in channel {s.channel}")
    if abs(s.cosine) > 0.9:
        lines.append(f"mostly a gain of {1 + s.gain:.4g}")
    return list(dict.fromkeys(lines))


def judge_run(
    sites: Sequence[Measurement],
    bad: Sequence[Finding],
    checks: Sequence[Check],
    next_token: NextToken | None,
) -> tuple[RunVerdict, Inconclusive | None]:
    """The verdict of the run, and why it is inconclusive if it is; `bad` are its findings, after diagnosis."""
    if bad:
        return "diverged", None
    why = _inconclusive(sites, checks, next_token)
    return ("inconclusive", why) if why else ("match", None)


def _inconclusive(
    sites: Sequence[Measurement], checks: Sequence[Check], next_token: NextToken | None
) -> Inconclusive | None:
    if not all(check.ok for check in checks):
        return Inconclusive("check failed")
    logits = logits_of(sites)
    if logits is None:
        return Inconclusive("no site")
    if logits.verdict == "unmeasured":
        return Inconclusive("logits unmeasured")
    if logits.total_ratio is not None and not logits.total_ratio <= _TOTAL:
        return Inconclusive("logits off", ratio=logits.total_ratio)
    if next_token is not None and next_token.unexplained_flips:
        return Inconclusive("flips", count=next_token.unexplained_flips)
    return None


def covered(sites: Sequence[Measurement]) -> Coverage:
    """How many of the known sites were measured."""
    return Coverage(sum(s.verdict != "unmeasured" for s in sites), len(sites))
