"""Which known porting bug is it? Each is tried on the guilty operation, on the candidate's own inputs.

A fault is the answer if the reference with that fault reproduces the candidate: the remainder is then at the
fault's own floor, as large as rounding in the working dtype makes it. Where sites before a guilty one were not
recorded, every fault that acts in their operations is tried as well. A fault is true of the layers where it fits and
of no others. Faults that cannot be told apart are reported together, and where nothing fits nothing is said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from parity.diagnose.causes import Part, Tried, assigned
from parity.diagnose.near_miss import is_near_miss, is_usual
from parity.diagnose.read import read
from parity.diagnose.spans import span_before
from parity.diagnose.trial import Case, Trial, attempt
from parity.diagnose.workbench import Workbench
from parity.faults import Fault
from parity.observer import Observer
from parity.reference.one_operation import LoadedPiece
from parity.results import Finding

# So many sites of a finding are tried with the whole catalogue, the others with what fits there; if nothing fits at
# the first of them, it is not tried at all of so many.
_WHOLE, _IN_VAIN = 4, 2
# A number that leaves more than this is no reason not to read: it may only come near.
_CLOSE = 1.1


def diagnose(
    findings: Sequence[Finding],
    bench: Workbench,
    catalogue: Sequence[Fault],
    part: Part,
    unread: Collection[str],
    observer: Observer,
) -> tuple[Finding, ...]:
    """The findings with their causes: split by layers where these differ, merged where one fault explains several.

    `part` makes the finding of some sites of a family; at the sites `unread` no number is read, because the weights
    there are known to differ. A finding at which this fails has no cause, and `observer` is told.
    """
    flagged = {site for finding in findings for site in finding.sites}
    tried = [Tried(finding, {}) for finding in findings]
    seen: list[Fault] = []
    for position, finding in enumerate(findings):
        with observer.surviving("causes", finding.families[0]):
            tried[position] = _tried(finding, bench, catalogue, flagged, unread, seen)
    return assigned(tried, part)


def _tried(
    finding: Finding,
    bench: Workbench,
    catalogue: Sequence[Fault],
    flagged: Collection[str],
    unread: Collection[str],
    seen: list[Fault],
) -> Tried:
    """The faults that reproduce the candidate at each of a finding's sites: first those that did so at another.

    Where none does, what is read there is tried; `seen` holds what was read before, and gets it.
    """
    fits: dict[str, dict[str, Trial]] = {}
    clean: set[str] = set()
    whole = 0
    for site in _order(finding.sites):
        known = {id: trial for found in fits.values() for id, trial in found.items()}
        if whole >= _IN_VAIN and not known:
            break
        with bench.piece(bench.reference.working.piece_of(site)) as at:
            if at is None or site not in at.recorded:
                continue
            clean |= at.recorded.keys() - flagged
            case = _case(site, at, bench)
            numbers = site not in unread
            fits[site] = dict(_fitting(case, [t.fault for t in known.values()], known))
            if fits[site]:
                continue
            if whole < _WHOLE:
                whole += 1
                new = [f for f in catalogue if f.id not in known and (numbers or f.number is None)]
                fits[site] = dict(_fitting(case, new, {}))
            if all(_may_be_near(trial) for trial in fits[site].values()):
                fits[site] |= _read(case, seen)
    return Tried(finding, fits, frozenset(clean))


def _may_be_near(trial: Trial) -> bool:
    return trial.fault.number is not None and trial.ratio > _CLOSE and not is_usual(trial)


def _read(case: Case, seen: list[Fault]) -> dict[str, Trial]:
    """What was read at another site, where it is true of this one as well, or else what is read here."""
    fits = dict(_fitting(case, seen, {}))
    if not fits:
        new = read(case)
        fits = dict(_fitting(case, new, {}))
        seen += [fault for fault in new if fault.id in fits]
    return fits


def _order(sites: Sequence[str]) -> list[str]:
    """The first, the middle and the last site, then the others."""
    chosen = [sites[0], sites[len(sites) // 2], sites[-1]]
    return list(dict.fromkeys([*chosen, *sites]))


def _case(site: str, at: LoadedPiece, bench: Workbench) -> Case:
    exact, rounded = (bench.compute(at, [site], m)[site] for m in (bench.reference.precise, bench.reference.working))
    return Case(site, at, bench, exact, rounded)


def _fitting(case: Case, faults: Sequence[Fault], known: dict[str, Trial]) -> Iterator[tuple[str, Trial]]:
    """Those of the faults that act in the operations behind a site and are a cause of all that is wrong there."""
    names = [site.name for site in case.bench.reference.working.sites_of(case.at.piece)]
    behind = (case.site, *span_before(names, names.index(case.site), lambda name: name in case.at.recorded))
    for fault in faults:
        if not any(case.bench.shows(fault, name) for name in behind):
            continue
        other = known.get(fault.id)
        try:
            applies = case.bench.applies(fault, case.at.piece)
            trial = attempt(fault, case, other.value if other else None) if applies else None
            fits = trial is not None and trial.fits and not is_near_miss(trial, case)
        except Exception:  # a fault that cannot be had here is not what happened, and no verdict hangs on it
            continue
        if trial is not None and fits:
            yield fault.id, trial
