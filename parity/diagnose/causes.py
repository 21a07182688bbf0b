"""From trials to causes: which fault explains which layers of which findings, and what it cannot be told from.

A cell is one guilty site. The fault that explains most cells comes first, and takes them; what it does not explain
stays open for another. So layers with different causes part, and families with one cause become one finding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from parity.diagnose.readings import Uncertainty
from parity.diagnose.trial import Trial
from parity.faults import Fault
from parity.faults.fault import ROLES
from parity.results import FaultMatch, Finding, Reading
from parity.sites import ends_of, layer_of

# A rival this much worse than the best is another fault; below, the two cannot be told apart.
_CLEARLY_WORSE = 1.5
# Numbers that differ by more than this share, and by more than their errors, are not of one bug.
_ALIKE = 0.01
_SIGMAS = 4.0
_CUT = 1e-4

# The finding that some sites of one family make.
Part = Callable[[Sequence[str]], Finding]


@dataclass(frozen=True)
class Tried:
    """What was tried at a finding's sites.

    fits   faults that fit, by id, for each site where any was tried; empty where none fits
    clean  sites that the candidate recorded in the pieces that were opened and that are not wrong
    """

    finding: Finding
    fits: Mapping[str, Mapping[str, Trial]]
    clean: frozenset[str] = frozenset()

    def of(self, fault: str, open_: set[str]) -> dict[str, Trial]:
        """The trials of a fault at those of the sites that are open."""
        return {site: fits[fault] for site, fits in self.fits.items() if site in open_ and fault in fits}


def assigned(tried: Sequence[Tried], part: Part) -> tuple[Finding, ...]:
    """Each finding with its causes: split where layers have different ones, merged where families share one."""
    open_ = {site for one in tried for site in one.finding.sites}
    clean = frozenset[str]().union(*(one.clean for one in tried))
    done: list[Finding] = []
    while best := _widest(tried, open_, clean):
        fault, cells = best
        done.append(_explained(fault, cells, tried, open_, clean, part))
        open_ -= set(done[-1].sites)
    for one in tried:
        left = [site for site in one.finding.sites if site in open_]
        if left:
            done.append(one.finding if len(left) == len(one.finding.sites) else part(left))
    order = {one.finding.families[0]: position for position, one in enumerate(tried)}
    return tuple(sorted(done, key=lambda f: (order[f.families[0]], f.layers[:1])))


def preference(trial: Trial) -> tuple[float, bool, bool, float]:
    """Small remainders first; where they are alike, a fault without a number to fit, then one with a usual number."""
    number = trial.fault.number
    usual = number is None or any(_is_near(trial.value, seen, trial.unsure.total) for seen in number.typical)
    # Below the floor nothing is told apart.
    return (round(max(trial.ratio, 1.0), 1), not usual, number is not None, trial.ratio)


def _is_near(value: float, seen: float, stderr: float) -> bool:
    """Whether a number that was read is one seen in the wild, whose digits may have been cut."""
    return abs(value - seen) <= max(_CUT * abs(seen), _SIGMAS * stderr if math.isfinite(stderr) else 0.0)


Cells = dict[str, Trial]


def _widest(tried: Sequence[Tried], open_: set[str], clean: frozenset[str]) -> tuple[str, Cells] | None:
    """The fault that explains most of the open sites, then claims least that is clean; and these sites."""
    best: tuple[tuple[float, ...], str, Cells] | None = None
    for fault in dict.fromkeys(id for one in tried for fits in one.fits.values() for id in fits):
        for cells in _alike([one.of(fault, open_) for one in tried]):
            trial = combined(list(cells.values()))
            score = (-len(cells), _share_of_clean(trial.fault, cells, clean), *preference(trial))
            if best is None or score < best[0]:
                best = (score, fault, cells)
    return (best[1], best[2]) if best else None


def _alike(by_family: Sequence[Cells]) -> list[Cells]:
    """Groups of sites at which one fault, with one number, explains the candidate."""
    groups: list[Cells] = []
    for cells in by_family:
        for site, trial in cells.items():
            home = next((g for g in groups if all(_is_one(trial, other) for other in g.values())), None)
            if home is None:
                groups.append({site: trial})
            else:
                home[site] = trial
    return groups


def _is_one(one: Trial, other: Trial) -> bool:
    """Whether two trials of a fault may be of one bug: it says the same, and has no number or the same one."""
    if one.fault.title != other.fault.title:
        return False
    apart = abs(one.value - other.value)
    errors = math.hypot(one.unsure.total, other.unsure.total)
    return apart <= _ALIKE * max(abs(one.value), abs(other.value)) or apart <= _SIGMAS * errors


def _share_of_clean(fault: Fault, cells: Cells, clean: frozenset[str]) -> float:
    """Of the kinds of site that a fault makes wrong, the share that is clean in the layers in question."""
    layers = {layer_of(site) for site in cells}
    here = [site for site in clean if layer_of(site) in layers]
    ends = [end for end in fault.sites if end not in ROLES]
    return sum(any(end in ends_of(site) for site in here) for end in ends) / max(len(ends), 1)


def _explained(
    fault: str, cells: Cells, tried: Sequence[Tried], open_: set[str], clean: frozenset[str], part: Part
) -> Finding:
    """The finding that a fault makes of its cells, and of sites of the same families that could not be tried."""
    trial = combined(list(cells.values()))
    parts, untried = [], list[str]()
    for one in tried:
        mine = [site for site in one.finding.sites if site in cells]
        if not mine:
            continue
        rest = [site for site in one.finding.sites if site not in cells]
        if all(site not in one.fits for site in rest):
            # Where nothing could be tried, nothing speaks against the cause of all the others.
            untried += rest
            mine = list(one.finding.sites)
        parts.append(one.finding if len(mine) == len(one.finding.sites) else part(mine))
    merged = _merged(parts, _match(trial, _rivals(trial, cells, tried, clean)))
    if untried:
        said = "not tried where the candidate did not record what goes in: " + _layers(untried)
        merged = replace(merged, evidence=(*merged.evidence, said))
    return merged


def _layers(sites: Sequence[str]) -> str:
    numbers = sorted({n for site in sites if (n := layer_of(site)) is not None})
    return "layer" + ("s " if len(numbers) > 1 else " ") + ", ".join(map(str, numbers))


def _rivals(best: Trial, cells: Cells, tried: Sequence[Tried], clean: frozenset[str]) -> list[Trial]:
    """Faults that explain every one of the cells about as well, and claim no more that is clean."""
    limit = max(best.ratio, 1.0) * _CLEARLY_WORSE
    claims = _share_of_clean(best.fault, cells, clean)
    others: dict[str, list[Trial]] = {}
    for fits in (one.fits[site] for one in tried for site in one.fits if site in cells):
        for id, trial in fits.items():
            others.setdefault(id, []).append(trial)
    found = [combined(trials) for id, trials in others.items() if id != best.fault.id and len(trials) == len(cells)]
    near = [t for t in found if t.ratio <= limit and _share_of_clean(t.fault, cells, clean) <= claims]
    return sorted(near, key=preference)


def combined(trials: Sequence[Trial]) -> Trial:
    """One trial for several sites: the worst ratio, and the number's mean weighted by its errors."""
    worst = max(trials, key=lambda t: t.ratio)
    explained = min(t.explained for t in trials)
    weights = [1 / t.unsure.stderr**2 if 0 < t.unsure.stderr < math.inf else 0.0 for t in trials]
    total = sum(weights)
    if not total:
        return replace(worst, explained=explained)

    def mean(of: Sequence[float]) -> float:
        return sum(w * x for w, x in zip(weights, of, strict=True)) / total

    with_fault, plain = zip(*(t.unsure.leans for t in trials), strict=True)
    unsure = Uncertainty(total**-0.5, (mean(with_fault), mean(plain)))
    return replace(worst, explained=explained, value=mean([t.value for t in trials]), unsure=unsure)


def _match(trial: Trial, rivals: Sequence[Trial]) -> FaultMatch:
    number = trial.fault.number
    reads = {number.name: Reading(trial.value, trial.unsure.total, trial.expected)} if number else {}
    return FaultMatch(
        id=trial.fault.id,
        title=trial.fault.title,
        fix=trial.fault.fix,
        explained=trial.explained,
        remainder_ratio=trial.ratio,
        rivals=tuple(rival.fault.id for rival in rivals),
        reads=reads,
    )


def _merged(group: Sequence[Finding], match: FaultMatch) -> Finding:
    first = group[0]
    if len(group) == 1:
        return replace(first, fault=match)
    worst = max(group, key=lambda finding: finding.ratio)
    return replace(
        worst,
        families=tuple(name for finding in group for name in finding.families),
        sites=tuple(site for finding in group for site in finding.sites),
        layers=tuple(sorted({n for finding in group for s in finding.sites if (n := layer_of(s)) is not None})),
        first_token=min((f.first_token for f in group if f.first_token is not None), default=None),
        span=first.span,
        fault=match,
    )
