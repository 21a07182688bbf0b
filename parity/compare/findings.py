"""From wrong sites to findings: one for each family, with its evidence and the span it covers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from parity.results import BAD, ROUNDING, Finding, Measurement, worst_verdict
from parity.sites import branch, family, is_stream, layer_of

# Embedding and final norm may belong to the span of a layer.
_ENDS = 2


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


def unexamined(sites: Sequence[Measurement]) -> tuple[str, ...]:
    """The sites whose operations no verdict speaks of.

    An unmeasured site is covered by the next measured one on its way, if no more lies between than one layer has:
    over more, errors drown in each other, and no fault could be tried on the candidate's own inputs. What was
    recorded and still could not be judged is covered by nothing.
    """
    open_ = {m.site for m in sites if m.verdict == "unmeasured"}
    if not open_:
        return ()
    in_layers = Counter(layer for m in sites if (layer := layer_of(m.site)) is not None)
    longest = max(in_layers.values(), default=0) + _ENDS
    covered: set[str] = set()
    for position, site in enumerate(sites):
        if site.verdict != "unmeasured":
            span = _span_before(sites, position)
            covered.update(span if len(span) <= longest else ())
    absent = ("not recorded", "not observable")
    judged_elsewhere = {m.site for m in sites if m.gap is not None and m.gap.kind in absent} & covered
    return tuple(m.site for m in sites if m.site in open_ - judged_elsewhere)


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
