"""The second and third stage: judge what was measured, and explain what is wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from parity.compare.findings import finding_of, findings, in_calls, placed, spanning
from parity.compare.judge import RoundingMode, judge_site, luck, rounding_mode
from parity.compare.measure import Measured, MeasuredSite
from parity.compare.routing import judge_routers
from parity.compare.sides import Sides
from parity.diagnose.error_map import with_error_maps
from parity.diagnose.foreign_rows import with_foreign_rows
from parity.diagnose.idle_faults import refuse_idle
from parity.diagnose.match import diagnose
from parity.diagnose.power import power, untried
from parity.diagnose.second_look import ANY, second_look
from parity.diagnose.weak_constants import weak_constants
from parity.diagnose.workbench import Workbench
from parity.faults import Fault, shows_at
from parity.observer import Observer
from parity.reasons import Gap
from parity.reference.batch import Batch
from parity.reference.floor import Local
from parity.reference.precision import unit_roundoff
from parity.results import BAD, Finding, Measurement, Power
from parity.sites import short


@dataclass(frozen=True)
class Judged:
    """Every site of the reference with its verdict, in order of execution, and the wrong ones by family.

    `strayed` are the sites that are rounding only if the port sums in an order of its own.
    """

    mode: RoundingMode
    sites: tuple[Measurement, ...]
    findings: tuple[Finding, ...]
    strayed: frozenset[str]


@dataclass(frozen=True)
class Explained:
    """The findings with their causes, and what the run could have seen; `sites` are judged in that light."""

    sites: tuple[Measurement, ...]
    findings: tuple[Finding, ...]
    power: Power | None


def judge(sides: Sides, measured: Measured, observer: Observer) -> Judged:
    """Give every site a verdict, now that the run's rounding mode is known."""
    locals_ = {site: m.local for site, m in measured.sites.items()}
    mode = rounding_mode(locals_.values(), unit_roundoff(sides.reference.working.dtype))
    # A regime has a floor of its own, which says nothing of the usual one.
    inside, outside = ({s: x for s, x in locals_.items() if (s in sides.regimes) is is_in} for is_in in (True, False))
    lucky = luck(inside) | luck(outside)

    def in_doubt(site: str, local: Local) -> bool:
        return judge_site(local, mode, lucky[site])[0] in BAD

    def judged(cleared: Mapping[str, Local]) -> tuple[Measurement, ...]:
        ours = {site: replace(m, local=cleared.get(site, m.local)) for site, m in measured.sites.items()}
        return tuple(
            Measurement(site, "unmeasured", "", gap=gap)
            if (gap := sides.gap(site)) is not None
            else _judged(ours[site], mode, lucky[site], sides.regimes.get(site))
            for site in sides.pairs
            if not sides.is_absent(site)
        )

    cleared: dict[str, Local] = {}
    with observer.surviving("second look"):
        bench = Workbench(sides.reference, sides.run.batch, sides.recorded)
        cleared = second_look(locals_, in_doubt, bench, spanning(judged({})))
    sites = judged(cleared)
    routed = judge_routers(sites, sides.reference.routes)
    strayed = frozenset(site for site, local in cleared.items() if local.way == ANY)
    return Judged(mode, routed, findings(routed), strayed)


def explain(sides: Sides, judged: Judged, observer: Observer) -> Explained:
    """Find the cause of each finding, constants that are wrong below the rounding, and what would have shown."""
    run, model = sides.run, sides.reference.working
    sites, found = judged.sites, judged.findings
    if not model.is_cut:
        return Explained(
            sites, _where(found, sides, sites), untried(run.faults, run.dtype) if run.options.power else None
        )
    bench = Workbench(sides.reference, run.batch, sides.recorded)
    with observer.surviving("own faults"):
        refuse_idle(run.faults, bench)
    unread = _unread(sides)
    if found:
        observer.show("looking for causes", 0, 0)
        with observer.timed("diagnose"), observer.surviving("causes"):
            causes = diagnose(found, bench, run.faults, lambda names: finding_of(names, sites), unread, observer)
            causes = _on_top_of_regimes(causes, sides, sites, unread, observer)
            written = {site.name for site in model.sites if site.overwritten}
            found = tuple(_with_advice(with_foreign_rows(finding, bench), written) for finding in causes)
        with observer.timed("diagnose"):
            found = with_error_maps(found, sites, bench, observer)
    # In float32 the ratio shows any constant, but where an order of summation has widened the floor.
    weak = [s for s in sites if s.site not in unread]
    weak = [s for s in weak if model.dtype is not torch.float32 or s.site in judged.strayed]
    if weak and not judged.mode.truncates:
        with observer.timed("wrong constants"), observer.surviving("wrong constants"):
            leaning = weak_constants(weak, bench, run.faults)
            sites, found = _accused(sites, leaning), (*found, *leaning)
    could_see = None
    if run.options.power:
        with observer.timed("power"), observer.surviving("power"):
            named = {finding.fault.id for finding in found if finding.fault}
            could_see = power(bench, run.faults, observer, named)
    return Explained(sites, _where(found, sides, sites), could_see)


def _where(found: Sequence[Finding], sides: Sides, sites: Sequence[Measurement]) -> tuple[Finding, ...]:
    """The findings with the call in which each begins, and what is special about its first token."""
    config = sides.reference.working.config
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    given = [window for window in windows if isinstance(window, int) and window > 1]
    behind = behind_padding(sides.run.batch)
    return tuple(placed(in_calls(finding, sides.run.calls, sites), sites, given, behind) for finding in found)


def behind_padding(batch: Batch) -> dict[int, list[int]]:
    """The rows of a batch that begin with padding, by the token at which their text begins."""
    found: dict[int, list[int]] = {}
    for row, first in enumerate([] if batch.text is None else batch.text.int().argmax(1).tolist()):
        if first:
            found.setdefault(first, []).append(row)
    return found


def _on_top_of_regimes(
    found: tuple[Finding, ...], sides: Sides, sites: Sequence[Measurement], unread: frozenset[str], observer: Observer
) -> tuple[Finding, ...]:
    """The findings without a cause tried again with the reference in each accepted regime that acts there."""
    for regime in sides.run.accepted:
        at = {s: regime for f in found if f.fault is None for s in f.sites if shows_at(regime, s)}
        if not at:
            continue
        inside = sides.within(at)
        bench = Workbench(inside.reference, sides.run.batch, sides.recorded)
        unnamed = [f for f in found if f.fault is None and not at.keys().isdisjoint(f.sites)]
        named = diagnose(unnamed, bench, sides.run.faults, lambda names: finding_of(names, sites), unread, observer)
        said = f"on top of the accepted regime {regime.id}"
        named = tuple(replace(f, evidence=(*f.evidence, said)) if f.fault else f for f in named)
        found = (*(f for f in found if f not in unnamed), *named)
    return found


def _with_advice(finding: Finding, written: Collection[str]) -> Finding:
    """How to record what gives the cause, where unmeasured sites hide it or a value is `written` into later."""
    if finding.fault is not None:
        return finding
    advice = []
    if finding.span:
        kinds = dict.fromkeys(short(site) for site in finding.span)
        advice.append(f"record {', '.join(kinds)} to tell which operation it is")
    if all(site in written for site in finding.sites):
        advice.append("the reference writes into this value later (clamp_ and the like): see that a copy was recorded")
    return replace(finding, evidence=(*finding.evidence, *advice))


def _unread(sides: Sides) -> frozenset[str]:
    """The sites where no constant is read: those of modules with weights, if the candidate's are known to differ.

    The check tells that some differ, not of each which; a wrong weight would be read as a wrong constant.
    """
    if all(check.ok for check in sides.checks if check.name == "candidate weights"):
        return frozenset()
    model = sides.reference.working
    own = {name.rpartition(".")[0] for name, _ in model.model.named_parameters()}
    return frozenset(site.name for site in model.sites if site.where == "output" and site.module in own)


def _accused(sites: Sequence[Measurement], leaning: Sequence[Finding]) -> tuple[Measurement, ...]:
    """The sites with the verdict that a finding of weak constants gives them."""
    guilty = {site: finding for finding in leaning for site in finding.sites}
    return tuple(
        replace(m, verdict="wrong", reason=guilty[m.site].evidence[0]) if m.site in guilty else m for m in sites
    )


def _judged(m: MeasuredSite, mode: RoundingMode, lucky: float, regime: Fault | None) -> Measurement:
    verdict, ratio, reason = judge_site(m.local, mode, lucky)
    x, local = m.metrics, m.local
    return Measurement(
        site=m.pair.site.name,
        verdict=verdict,
        reason="" if isinstance(reason, Gap) else reason,
        gap=reason if isinstance(reason, Gap) else None,
        ratio=ratio,
        row_max=local.row_max,
        local_rel=local.local_rel,
        inherited_rel=local.inherited_rel,
        floor_rel=local.floor_rel,
        total_ratio=local.total_ratio,
        bit_equal=local.bit_equal,
        mse=x.mse,
        cosine=x.cosine,
        max_abs=x.max_abs,
        rel_l2=x.rel_l2,
        ulp_max=x.ulp_max,
        ulps=m.ulps,
        structure=local.structure.shortened(),
        first_read=local.first_read,
        dtype=m.dtype,
        shape=m.pair.site.shape,
        steps=m.pair.steps,
        regime=regime.id if regime else "",
    )
