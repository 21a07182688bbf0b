"""Wrong constants far below the rounding: no single value shows them, all of them together do.

A wrong eps moves each number by less than its rounding, but always in the direction that eps moves it. So the
residual of every site of a family is regressed on that direction: with rows weighted by their floor, the slope
is 0 for rounding and 1 for the fault. Rounding may lean too: an operation that rounds twice has a bias, which a
candidate that rounds once does not share. So every slope between 0 and that of the reference's own rounding on the
same inputs, the null, is legal, and a candidate is accused only if it leans far beyond these. So is every slope up
to that of a factor rounded to the working dtype, where a port may keep it so: MLX does this with attention's scale.

The thresholds, all on the slope (1 is the whole fault), and what holds them:

| value | what it bounds | unit | where | held by |
|---|---|---|---|---|
| 8 | distance from what is legal | standard errors | lean.SIGMAS | tests.bench.localization: constants read |
| 1 | the same | slopes of the null | lean._TIMES_NULL | .localization: legal variants of the norm |
| 0.05 | the least slope | share of the fault | lean._LEAST_SLOPE | chosen |
| 0.1 | distance from 1 of the slope of a fault without a number | share of the fault | _WHOLE_FAULT | chosen |
| 0.3 | spread of the slopes of layers that agree | share of the slope | _AGREE | chosen |
| 16 | rows of a fit | number | lean._LEAST_ROWS | chosen |
| 0.95 | evidence from which a fault is a rival | share of the best's | _TIED | chosen |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from parity.diagnose.lean import SIGMAS, Sums, evidence, is_coherent, reading, slope_of, sums_of
from parity.diagnose.spans import span_before
from parity.diagnose.workbench import Workbench
from parity.faults import Fault
from parity.reference.one_operation import LoadedPiece
from parity.results import FaultMatch, Finding, Measurement, Reading
from parity.sites import family, layer_of

# Of two faults that lean the same way neither is named without the other.
_TIED = 0.95
# A fault without a number goes all its way: slopes within this of 1 are of it.
_WHOLE_FAULT = 0.1
# Layers where the constant is right disagree with those where it is not by more than this share.
_AGREE = 0.3


def weak_constants(sites: Sequence[Measurement], bench: Workbench, catalogue: Iterable[Fault]) -> list[Finding]:
    """Findings of wrong constants at sites whose error looks like rounding, one by one."""
    suspects = {m.site: m for m in sites if m.verdict == "rounding" and layer_of(m.site) is not None}
    faults = [fault for fault in catalogue if fault.number is not None and not fault.number.discrete]
    sums: dict[tuple[str, str], list[Sums]] = {}
    steps: dict[tuple[str, str], tuple[float, float]] = {}
    for layer in sorted({layer for site in suspects if (layer := layer_of(site)) is not None}):
        with bench.piece(layer) as at:
            if at is not None:
                for fault, expected, step, found in _regress(at, suspects, faults, bench):
                    key = (fault.id, family(found.site))
                    sums.setdefault(key, []).append(found)
                    steps[key] = (expected, step)
    by_id = {fault.id: fault for fault in faults}
    accused = {}
    for key, leans in sums.items():
        guilty = _guilty(leans, _kept(by_id[key[0]], *steps[key], bench))
        if guilty and _is_possible(by_id[key[0]], reading(guilty)[0], *steps[key]):
            accused[key] = guilty
    best: dict[str, tuple[str, str]] = {}
    for key, guilty in accused.items():
        rival = best.get(key[1])
        if rival is None or evidence(guilty) > evidence(accused[rival]):
            best[key[1]] = key
    plain = [fault for fault in catalogue if fault.number is None and not fault.only_rounds]
    return [
        _outdone(
            _with_rivals(_finding(by_id[key[0]], accused[key], *steps[key], suspects, bench), key, accused),
            accused[key],
            suspects,
            plain,
            bench,
        )
        for key in best.values()
    ]


def _outdone(
    finding: Finding,
    guilty: Sequence[Sums],
    suspects: dict[str, Measurement],
    faults: Sequence[Fault],
    bench: Workbench,
) -> Finding:
    """The finding by the name of a fault without a number, where the candidate leans as far its way as the fault goes.

    A forgotten cap moves numbers as another scale would, only more surely: no number has been fitted.
    """
    sums: dict[str, list[Sums]] = {}
    for name in finding.sites:
        with bench.piece(bench.reference.working.piece_of(name)) as at:
            if at is not None:
                behind = _behind(at, suspects, bench)[name]
                for fault, found in _whole(name, behind, at, faults, bench):
                    sums.setdefault(fault.id, []).append(found)
    full = {
        id: found
        for id, found in sums.items()
        if len(found) == len(guilty) and abs(slope_of(found) - 1) <= _WHOLE_FAULT
    }
    best = max(full, key=lambda id: evidence(full[id]), default=None)
    if best is None or evidence(full[best]) < _TIED * evidence(guilty) or finding.fault is None:
        return finding
    fault = next(fault for fault in faults if fault.id == best)
    rivals = (finding.fault.id, *finding.fault.rivals)
    match = replace(finding.fault, id=fault.id, title=fault.title, fix=fault.fix, rivals=rivals, reads={})
    return replace(finding, fault=match)


def _whole(
    name: str, behind: Sequence[str], at: LoadedPiece, faults: Sequence[Fault], bench: Workbench
) -> Iterator[tuple[Fault, Sums]]:
    """The sums of each fault without a number that acts behind a site and does something there."""
    working, precise = bench.reference.working, bench.reference.precise
    truth, floor = (bench.compute(at, [name], model)[name] for model in (precise, working))
    for fault in faults:
        if not any(bench.shows(fault, site) for site in behind) or not bench.applies(fault, at.piece):
            continue
        try:
            moved = bench.compute(at, [name], precise, fault)[name]
        except Exception:  # a fault that cannot be had here is not what happened
            continue
        if moved.shape == truth.shape:
            found = sums_of(name, bench.candidate(at, name), truth, floor, moved, working.dtype)
            if found.response:
                yield fault, found


def _with_rivals(finding: Finding, key: tuple[str, str], accused: Mapping[tuple[str, str], list[Sums]]) -> Finding:
    """The finding with all faults of its family that the same lean speaks for."""
    least = _TIED * evidence(accused[key])
    rivals = tuple(k[0] for k, sums in accused.items() if k[1] == key[1] and k != key and evidence(sums) > least)
    return replace(finding, fault=finding.fault and replace(finding.fault, rivals=rivals))


def _regress(
    at: LoadedPiece, suspects: dict[str, Measurement], faults: Sequence[Fault], bench: Workbench
) -> Iterator[tuple[Fault, float, float, Sums]]:
    """The sums of every fault at every suspect site of a loaded layer, and at those behind what was not recorded."""
    model, precise = bench.reference.working, bench.reference.precise
    behind = _behind(at, suspects, bench)
    shown = {(f.id, n): next((s for s in behind[n] if bench.shows(f, s)), None) for f in faults for n in behind}
    names = [name for name in behind if any(shown[fault.id, name] for fault in faults)]
    if not names:
        return
    truth, floor = bench.compute(at, names, precise), bench.compute(at, names, model)
    for fault in faults:
        first = {name: site for name in names if (site := shown[fault.id, name])}
        if not first or not bench.applies(fault, at.piece):
            continue
        right = {name: bench.expected(fault, at.piece, site) for name, site in first.items()}
        for expected in dict.fromkeys(right.values()):
            step, these = _step(fault, expected), [name for name in first if right[name] == expected]
            moved = bench.compute(at, these, precise, fault, expected + step)
            for name in these:
                found = sums_of(name, bench.candidate(at, name), truth[name], floor[name], moved[name], model.dtype)
                yield fault, expected, step, found


def _behind(at: LoadedPiece, suspects: dict[str, Measurement], bench: Workbench) -> dict[str, tuple[str, ...]]:
    """For each suspect site the sites whose operations it shows: its own, and those before it that were not recorded.

    The product of a linear module alone has no constant; it is worth its time only where it hides something.
    """
    model = bench.reference.working
    sites = model.sites_of(at.piece)
    names = [site.name for site in sites]
    found = {}
    for position, site in enumerate(sites):
        if site.name in suspects and site.name in at.recorded:
            span = span_before(names, position, at.recorded.__contains__)
            own = () if isinstance(model.model.get_submodule(site.module), nn.Linear) else (site.name,)
            found[site.name] = (*own, *span)
    return found


def _step(fault: Fault, expected: float) -> float:
    """A change of the number along which the response is still a straight line."""
    assert fault.number is not None, "unreachable because only faults with a number are regressed"
    if fault.number.method == "typical-step":
        return next((value for value in fault.number.typical if value > expected), 2 * expected) - expected
    return expected * 0.01 if expected else 0.01


def _kept(fault: Fault, expected: float, step: float, bench: Workbench) -> float:
    """The slope of the right number as the working dtype keeps it; 0 if ports may not round it."""
    assert fault.number is not None, "unreachable because only faults with a number are regressed"
    if not fault.number.in_dtype:
        return 0.0
    rounded = torch.tensor(expected, dtype=torch.float64).to(bench.reference.working.dtype)
    return (float(rounded) - expected) / step


def _guilty(found: list[Sums], kept: float = 0.0) -> list[Sums]:
    """The sites of a family at which the constant is wrong: all of them together, or those that show it alone."""
    if is_coherent(found, kept):
        slope = slope_of(found)
        agreeing = [s for s in found if s.sigmas < SIGMAS or abs(s.slope - slope) <= _AGREE * abs(slope)]
        if len(agreeing) == len(found):
            return found
    alone = [one for one in found if is_coherent([one], kept)]
    # A wrong constant moves the numbers of all its sites one way; rounding leans this way here and that way there.
    return alone if len({one.slope > 0 for one in alone}) == 1 else []


def _is_possible(fault: Fault, slope: float, expected: float, step: float) -> bool:
    """Whether the number could be what the slope reads: an eps or a scale is positive."""
    assert fault.number is not None, "unreachable because only faults with a number are regressed"
    return not (fault.number.log and expected > 0) or expected + slope * step > 0


def _read_again(
    fault: Fault, guilty: Sequence[Sums], value: float, step: float, bench: Workbench
) -> tuple[float, float]:
    """The number and its standard error, regressed once more from a first reading of it.

    There the reference rounds as the candidate does, so that the bias which the two share can be told.
    """
    working, precise = bench.reference.working, bench.reference.precise
    found = []
    for name in (one.site for one in guilty):
        with bench.piece(working.piece_of(name)) as at:
            assert at is not None, "unreachable because the site has been regressed before"
            truth, moved = (bench.compute(at, [name], precise, fault, v)[name] for v in (value, value + step))
            floor = bench.compute(at, [name], working, fault, value)[name]
            found.append(sums_of(name, bench.candidate(at, name), truth, floor, moved, working.dtype))
    slope, stderr = reading(found)
    return value + slope * step, abs(stderr * step)


def _finding(
    fault: Fault,
    guilty: Sequence[Sums],
    expected: float,
    step: float,
    suspects: dict[str, Measurement],
    bench: Workbench,
) -> Finding:
    assert fault.number is not None, "unreachable because only faults with a number are regressed"
    slope, stderr = reading(guilty)
    ratio = max(suspects[s.site].ratio or 0.0 for s in guilty)
    first = expected + slope * step
    value = Reading(*_read_again(fault, guilty, first, first - expected, bench), expected)
    return Finding(
        families=(family(guilty[0].site),),
        sites=tuple(s.site for s in guilty),
        layers=tuple(layer for s in guilty if (layer := layer_of(s.site)) is not None),
        verdict="wrong",
        ratio=ratio,
        first_token=None,
        evidence=(
            "smaller than the rounding of any single value, but always in the same direction: "
            f"{abs(slope) / stderr:.0f} standard errors over {len(guilty)} sites",
        ),
        fault=FaultMatch(
            id=fault.id,
            title=fault.title,
            fix=fault.fix,
            explained=1.0,
            remainder_ratio=ratio,
            rivals=(),
            reads={fault.number.name: value},
        ),
    )
