"""From wrong sites to findings: one for each family, with its evidence and the span it covers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from statistics import median

from parity.diagnose.spans import span_before
from parity.results import BAD, ROUNDING, Finding, FirstCall, Measurement, worst_verdict
from parity.sites import family, layer_of

# Embedding and final norm may belong to the span of a layer.
_ENDS = 2


def findings(sites: Sequence[Measurement]) -> tuple[Finding, ...]:
    """Bad sites grouped by family, in order of execution, with the span of unmeasured sites before each."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        if site.verdict in BAD:
            groups.setdefault(family(site.site), []).append(site.site)
    return tuple(finding_of(names, sites) for names in groups.values())


def finding_of(names: Sequence[str], sites: Sequence[Measurement]) -> Finding:
    """The finding that some bad sites of one family make, among all sites in order of execution."""
    order = {site.site: position for position, site in enumerate(sites)}
    group = [sites[order[name]] for name in names]
    worst = max(group, key=lambda m: (m.ratio is not None, m.ratio))
    return Finding(
        families=(family(names[0]),),
        sites=tuple(names),
        layers=tuple(layer for name in names if (layer := layer_of(name)) is not None),
        verdict=worst_verdict(m.verdict for m in group),
        ratio=worst.ratio or 0.0,
        first_token=min((first for m in group if (first := _first_token(m)) is not None), default=None),
        evidence=tuple(evidence(worst)),
        span=_span_before(sites, order[names[0]]),
    )


def in_calls(finding: Finding, calls: Sequence[int], sites: Sequence[Measurement]) -> Finding:
    """The finding with the first call in which it shows, of calls of so many tokens each."""
    wrong = set(finding.sites)
    first_read = min((m.first_read for m in sites if m.site in wrong and m.first_read is not None), default=None)
    if finding.first_token is None:
        return finding
    starts = [0, *accumulate(calls)][:-1]
    number = sum(start <= finding.first_token for start in starts) - 1 if first_read is None else first_read
    if number < 1:
        return finding
    chunks = max([i + 1 for i, size in enumerate(calls) if size > 1], default=1)
    return replace(finding, first_call=FirstCall(number, max(number - chunks + 1, 0)))


# Tokens that kernels, caches and prefills take together.
_BLOCKS = (128, 64, 32, 16)


def placed(
    finding: Finding,
    sites: Sequence[Measurement],
    windows: Collection[int],
    behind_padding: Mapping[int, Sequence[int]],
) -> Finding:
    """The finding with what is special about its first token, where all of its sites begin to be wrong there.

    `windows` are the numbers of tokens that some layers see; `behind_padding` has the rows whose text begins at a
    token, by that token, of those that begin with padding.
    """
    wrong = set(finding.sites)
    firsts = {_first_token(m) for m in sites if m.site in wrong}
    first = firsts.pop() if len(firsts) == 1 else None
    if not first:
        return finding
    window = next((window for window in sorted(windows) if abs(first - window) <= 1), None)
    block = next((block for block in _BLOCKS if first % block == 0), None)
    if rows := behind_padding.get(first):
        which = f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows))}"
        said = f"it begins at token {first}, the first behind the padding of {which}"
    elif window is not None:
        said = f"it begins at the edge of the window of {window} tokens"
    elif block is not None:
        said = f"it begins at token {first}, a multiple of {block}: where a block or chunk of so many tokens does"
    else:
        return finding
    return replace(finding, evidence=(*finding.evidence, said))


def _first_token(m: Measurement) -> int | None:
    return m.structure.first_token if m.structure else None


def _span_before(sites: Sequence[Measurement], position: int) -> tuple[str, ...]:
    measured = {m.site for m in sites if m.verdict != "unmeasured"}
    return span_before([m.site for m in sites], position, measured.__contains__)


def spanning(sites: Sequence[Measurement]) -> frozenset[str]:
    """The bad sites whose verdict covers operations that were not measured, too."""
    return frozenset(m.site for i, m in enumerate(sites) if m.verdict in BAD and _span_before(sites, i))


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
