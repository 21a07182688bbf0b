"""Which known porting bug is it? Each is tried on the guilty operation, on the candidate's own inputs.

A fault is the answer if the reference with that fault reproduces the candidate: the remainder is then at the
fault's own floor, as large as rounding in the working dtype makes it. Faults whose remainders cannot be told
apart are reported together, and where nothing fits nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parity.diagnose.readings import Uncertainty, best_value, difference, energy, is_told, uncertainty
from parity.diagnose.workbench import Workbench
from parity.faults import Fault, Number, shows_at
from parity.reference.floor import Local
from parity.reference.one_operation import LoadedPiece
from parity.results import FaultMatch, Finding, Reading
from parity.sites import layer_of, without_call

# A remainder up to this ratio is the fault's own rounding.
CONFIRMED = 1.6
# A rival this much worse than the best is another fault; below, the two cannot be told apart.
_CLEARLY_WORSE = 1.5
# Faults that explain less than this of the error's energy are not worth a second pass.
_PROMISING = 0.5
_LAYERS_TRIED = 3
_NEAR = 16
# Squares of numbers above this do not fit float32.
_LARGE = 1e15


@dataclass(frozen=True)
class Trial:
    """A fault tried at one site of one layer."""

    fault: Fault
    value: float
    expected: float
    unsure: Uncertainty
    explained: float
    ratio: float


# Faults that fit, best first, for the families of each finding.
Trials = dict[tuple[str, ...], list[Trial]]


def diagnose(findings: Sequence[Finding], bench: Workbench, catalogue: Sequence[Fault]) -> tuple[Finding, ...]:
    """The findings with their causes; those that one fault explains become one."""
    trials = {finding.families: _tried(finding, bench, catalogue) for finding in findings}
    return _assigned(findings, trials)


# -- trying --------------------------------------------------------------------------------------------------


def _tried(finding: Finding, bench: Workbench, catalogue: Sequence[Fault]) -> list[Trial]:
    """Faults that reproduce the candidate in every layer tried, best first."""
    merged: dict[str, list[Trial]] = {}
    excused: dict[str, int] = {}  # the last layer has no next one, to take a weight from
    sites = _sample(finding.sites)
    for site in sites:
        for trial in _at_site(site, bench, catalogue, excused, known=merged if site is not sites[0] else None):
            merged.setdefault(trial.fault.id, []).append(trial)
    everywhere = [trials for name, trials in merged.items() if len(trials) == len(sites) - excused.get(name, 0)]
    return sorted((_combined(trials) for trials in everywhere), key=_preference)


def _preference(trial: Trial) -> tuple[float, bool, float]:
    """Small remainders first; where they are alike, a fault without a number to fit."""
    return (round(trial.ratio, 1), trial.fault.number is not None, trial.ratio)


def _sample(sites: Sequence[str]) -> list[str]:
    """The first, the middle and the last of a finding's sites."""
    if len(sites) <= _LAYERS_TRIED:
        return list(sites)
    return [sites[0], sites[len(sites) // 2], sites[-1]]


def _at_site(
    site: str,
    bench: Workbench,
    catalogue: Sequence[Fault],
    excused: dict[str, int],
    known: dict[str, list[Trial]] | None,
) -> Iterator[Trial]:
    """Faults confirmed at one site; only those already known from another layer, where there are such."""
    working, precise = bench.reference.working, bench.reference.precise
    with bench.piece(working.piece_of(site)) as at:
        if at is None or site not in at.recorded:
            return
        truth = bench.compute(at, [site], precise)[site]
        floor = bench.compute(at, [site], working)[site]
        for fault in catalogue:
            if known is not None and fault.id not in known:
                continue
            if not shows_at(fault, site):
                continue
            try:
                if not bench.applies(fault, at.piece):
                    excused[fault.id] = excused.get(fault.id, 0) + 1
                    continue
                trial = _try(fault, site, at, bench, truth, floor)
            except Exception:  # a fault that cannot be had here is not what happened, and no verdict hangs on it
                continue
            if trial is not None and trial.ratio <= CONFIRMED:
                yield trial


def _try(fault: Fault, site: str, at: LoadedPiece, bench: Workbench, truth: Tensor, floor: Tensor) -> Trial | None:
    candidate, expected = at.recorded[site], bench.expected(fault, at.piece)

    def curve(value: float) -> Tensor:
        return bench.compute(at, [site], bench.reference.precise, fault, value)[site]

    def rounded(value: float) -> Tensor:
        return bench.compute(at, [site], bench.reference.working, fault, value)[site]

    value = 0.0
    if fault.number is not None:
        starts = _starts(fault.number, expected, lambda: bench.local(at, site, truth, floor).structure.first_token)
        value = best_value(fault.number, expected, starts, curve, candidate, truth)
    # What only rounds differently equals the reference in higher precision: its rounding has to be the candidate's.
    faulty, predicted = curve(value), rounded(value) if fault.only_rounds else None
    error = energy(candidate, truth)
    explained = 1 - energy(candidate, faulty if predicted is None else predicted) / error if error else 0.0
    if not explained > _PROMISING:
        return None
    own_floor = rounded(value) if predicted is None else predicted
    local = _remainder(at, site, bench, faulty, own_floor)
    if local is None:
        return None
    unsure = (
        uncertainty(value, curve, candidate, own_floor, difference(floor, truth))
        if _is_continuous(fault)
        else Uncertainty()
    )
    if _is_continuous(fault) and not is_told(value, expected, unsure, faulty, truth):
        return None
    return Trial(fault, value, expected, unsure, explained, local.ratio)


def _remainder(at: LoadedPiece, site: str, bench: Workbench, faulty: Tensor, floor: Tensor) -> Local | None:
    """What a fault leaves of the candidate; None if one of the two is not finite where the other is."""
    candidate = at.recorded[site].to(floor.device)
    lost = ~floor.isfinite()
    masked = faulty <= torch.finfo(torch.float16).min
    if not torch.equal(lost | masked, ~candidate.isfinite() | masked):
        return None
    # Where a sum is about as large as numbers get, its order decides whether it overflows.
    doubtful = ~(faulty.isfinite() | lost | masked)
    if int(doubtful.sum()) > int(lost.sum()):
        return None
    faulty, floor, candidate = (torch.where(lost | doubtful, 0, x) for x in (faulty, floor, candidate))
    exact = faulty if float(faulty.abs().max()) < _LARGE else faulty.double()
    local = bench.local(replace(at, recorded={site: candidate}), site, exact, floor)
    return None if local.nonfinite else local


def _is_continuous(fault: Fault) -> bool:
    return fault.number is not None and not fault.number.discrete


def _starts(number: Number, expected: float, first_wrong: Callable[[], int | None]) -> list[float]:
    """Numbers to start from: those seen in the wild, and what the first wrong token or a coarse grid suggests."""
    starts = [value for value in number.typical if value != expected]
    if number.discrete:
        # A window ends shortly before the first token that is clearly wrong.
        first = first_wrong() if number.method == "first-token" else None
        return starts + ([] if first is None else [float(w) for w in range(max(first - _NEAR, 1), first + 2)])
    if number.log and expected > 0:
        return starts + [expected * factor for factor in (0.1, 0.5, 1.01, 2.0, 10.0)]
    return [*starts, expected - 1, expected + 1]


def _combined(trials: list[Trial]) -> Trial:
    """One trial for several layers: the worst ratio, and the number's mean weighted by its errors."""
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


# -- assigning -----------------------------------------------------------------------------------------------


def _assigned(findings: Sequence[Finding], trials: Trials) -> tuple[Finding, ...]:
    """Give each finding its fault, the one first that explains most findings; merge what one fault explains."""
    flagged = {site for finding in findings for site in finding.sites}
    open_findings = list(findings)
    done: list[Finding] = []
    while open_findings:
        group, trial = _widest(open_findings, trials, flagged)
        if trial is None:
            done += open_findings
            break
        rivals = _rivals(trial, group, trials, flagged)
        done.append(_merged(group, _match(trial, rivals)))
        open_findings = [finding for finding in open_findings if finding not in group]
    order = {finding.sites[0]: position for position, finding in enumerate(findings)}
    return tuple(sorted(done, key=lambda finding: order[finding.sites[0]]))


def _widest(findings: list[Finding], trials: Trials, flagged: set[str]) -> tuple[list[Finding], Trial | None]:
    """The fault that explains most of the findings in one set of layers, then claims least that is clean."""
    best: tuple[tuple[float, ...], list[Finding], Trial] | None = None
    for finding in findings:
        for trial in trials[finding.families]:
            group = [f for f in findings if f.layers == finding.layers and _has(trials[f.families], trial.fault.id)]
            clean = _unflagged(trial.fault, flagged) / len(trial.fault.sites)
            score = (-len(group), clean, *_preference(trial))
            if best is None or score < best[0]:
                best = (score, group, trial)
    return (best[1], best[2]) if best else ([], None)


def shows_at_end(site: str, end: str) -> bool:
    """Whether a site's name ends in `end` at a dot; the empty end is a layer's own output."""
    site = without_call(site)
    return site == end or site.endswith(f".{end}") if end else site.rsplit(".", 1)[-1].isdigit()


def _has(trials: Sequence[Trial], fault: str) -> bool:
    return any(trial.fault.id == fault for trial in trials)


def _unflagged(fault: Fault, flagged: set[str]) -> int:
    """How many kinds of site a fault should have made wrong, but that are not."""
    return sum(not any(shows_at_end(site, end) for site in flagged) for end in fault.sites)


def _rivals(best: Trial, group: Sequence[Finding], trials: Trials, flagged: set[str]) -> list[Trial]:
    """Faults that explain every finding of the group about as well, and claim no more that is clean."""
    limit = max(best.ratio, 1.0) * _CLEARLY_WORSE
    claims = _unflagged(best.fault, flagged)
    return [
        trial
        for trial in trials[group[0].families]
        if trial.fault.id != best.fault.id
        and trial.ratio <= limit
        and _unflagged(trial.fault, flagged) <= claims
        and all(_has(trials[finding.families], trial.fault.id) for finding in group)
    ]


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
