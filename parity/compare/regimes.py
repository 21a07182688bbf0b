"""The regimes that a user accepts: where the candidate is proved to compute in one, the reference does so too.

Each accepted regime is tried at every site that is wrong, on the candidate's own inputs. Where it reproduces the
candidate up to rounding, the run is replayed with the reference in that regime there, and judged as strictly as any
other run. What does not stand that is judged against the reference as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from parity.compare.explain import Judged, judge
from parity.compare.findings import finding_of
from parity.compare.measure import Measured, measure
from parity.compare.sides import Sides
from parity.diagnose.match import diagnose
from parity.diagnose.workbench import Workbench
from parity.faults import Fault
from parity.observer import Observer
from parity.results import BAD, Finding
from parity.sites import family, layer_of

# What fails the first replay is left out of the second; after so many the run is judged without any.
_REPLAYS = 3


@dataclass(frozen=True)
class InRegimes:
    """A run with the reference in the accepted regimes where these were proved; `accepted` are findings no more."""

    sides: Sides
    measured: Measured
    judged: Judged
    accepted: tuple[Finding, ...] = ()


def in_regimes(sides: Sides, measured: Measured, judged: Judged, observer: Observer) -> InRegimes:
    """The run in the regimes that are accepted; as it is where there are none, or none is proved."""
    plain = InRegimes(sides, measured, judged)
    regimes = sides.run.accepted
    if not regimes or not judged.findings or not sides.reference.working.is_cut:
        return plain
    with observer.timed("regimes"), observer.surviving("regimes"):
        proved = _proved(sides, judged, regimes, observer)
        for _ in range(_REPLAYS):
            if not proved:
                break
            inside = _within(sides, proved, judged, observer)
            failed = _failed(inside, judged, proved)
            if not failed:
                return inside
            proved = tuple(f for one in proved if (f := _without(one, failed)) is not None)
    return plain


def _proved(sides: Sides, judged: Judged, regimes: tuple[Fault, ...], observer: Observer) -> tuple[Finding, ...]:
    """The findings, or their parts, that a regime explains."""
    bench = Workbench(sides.reference, sides.run.batch, sides.recorded)
    tried = diagnose(judged.findings, bench, regimes, lambda names: finding_of(names, judged.sites), (), observer)
    return tuple(finding for finding in tried if finding.fault is not None)


def _within(sides: Sides, proved: tuple[Finding, ...], judged: Judged, observer: Observer) -> InRegimes:
    by_id = {fault.id: fault for fault in sides.run.accepted}
    at = {site: by_id[f.fault.id] for f in proved if f.fault is not None for site in f.sites}
    inside = sides.within(at)
    measured = measure(inside, observer)
    again = judge(inside, measured, observer)
    return InRegimes(inside, measured, again, proved)


def _failed(inside: InRegimes, judged: Judged, proved: tuple[Finding, ...]) -> frozenset[str]:
    """The sites of which a regime was proved and that are wrong in it, or make others wrong in the same piece."""
    model = inside.sides.reference.working
    bad = {m.site for m in inside.judged.sites if m.verdict in BAD}
    before = {m.site for m in judged.sites if m.verdict in BAD}
    broken = {model.piece_of(site) for site in bad - before}
    ours = [site for finding in proved for site in finding.sites]
    return frozenset(site for site in ours if site in bad or model.piece_of(site) in broken)


def _without(finding: Finding, failed: frozenset[str]) -> Finding | None:
    sites = tuple(site for site in finding.sites if site not in failed)
    if not sites:
        return None
    layers = tuple(sorted({n for site in sites if (n := layer_of(site)) is not None}))
    return replace(finding, sites=sites, layers=layers, families=tuple(dict.fromkeys(map(family, sites))))
