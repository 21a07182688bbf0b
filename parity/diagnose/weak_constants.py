"""Wrong constants far below the rounding: no single value shows them, all of them together do.

A wrong eps moves each number by less than its rounding, but always in the direction that eps moves it. So the
residual of every site of a family is regressed on that direction: with rows weighted by their floor, the slope
is 0 for rounding and 1 for the fault. Rounding may lean too: an operation that rounds twice has a bias, which a
candidate that rounds once does not share. So every slope between 0 and that of the reference's own rounding on the
same inputs, the null, is legal, and a candidate is accused only if it leans far beyond these.

The thresholds, all on the slope (1 is the whole fault), and what holds them:

| value | what it bounds | unit | where | held by |
|---|---|---|---|---|
| 8 | distance from what is legal | standard errors | _SIGMAS | tests.bench.localization: constants read |
| 1 | the same | slopes of the null | _TIMES_NULL | .localization: legal variants of the norm |
| 0.05 | the least slope | share of the fault | _LEAST_SLOPE | chosen |
| 0.3 | spread of the slopes of layers that agree | share of the slope | _AGREE | chosen |
| 16 | rows of a fit | number | _LEAST_ROWS | chosen |
| 0.95 | evidence from which a fault is a rival | share of the best's | _TIED | chosen |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from parity.diagnose.readings import LEAST_EFFECT
from parity.diagnose.workbench import Workbench
from parity.faults import Fault
from parity.reference.one_operation import LoadedPiece
from parity.reference.precision import unit_roundoff
from parity.reference.row_sums import alike
from parity.results import FaultMatch, Finding, Measurement, Reading
from parity.sites import family, layer_of

# The slope must be this many standard errors from what is legal, errors being clustered in rows …
_SIGMAS = 8.0
# … and from what is legal by this many times the slope of the reference's own rounding: legal variants of the norm
# stray by up to 0.2.
_TIMES_NULL = 1.0
# A slope fitted to fewer rows than this fits by chance.
_LEAST_ROWS = 16
# Slopes below this share of the step are too small for any real fault.
_LEAST_SLOPE = 0.05
# Of two faults that lean the same way neither is named without the other.
_TIED = 0.95
# Layers where the constant is right disagree with those where it is not by more than this share.
_AGREE = 0.3


@dataclass(frozen=True)
class _Sums:
    """What a regression needs of one site: Σ w r g, the same of the reference's error e, Σ w g g, and its noise.

    shared and own are Σ w r e and Σ w e e, size is Σ w y y of the truth y; rows of one kind (alike) count as one.
    """

    site: str
    candidate: float
    reference: float
    response: float
    noise: float
    shared: float
    own: float
    size: float
    rows: int

    @property
    def slope(self) -> float:
        """The candidate's slope at this site alone."""
        return self.candidate / self.response if self.response else 0.0

    @property
    def sigmas(self) -> float:
        """The slope in its own standard errors."""
        return abs(self.candidate) / math.sqrt(self.noise) if self.noise else 0.0


def weak_constants(sites: Sequence[Measurement], bench: Workbench, catalogue: Iterable[Fault]) -> list[Finding]:
    """Findings of wrong constants at sites whose error looks like rounding, one by one."""
    suspects = {m.site: m for m in sites if m.verdict == "rounding" and layer_of(m.site) is not None}
    faults = [fault for fault in catalogue if fault.number is not None and not fault.number.discrete]
    sums: dict[tuple[str, str], list[_Sums]] = {}
    steps: dict[tuple[str, str], tuple[float, float]] = {}
    for layer in sorted({layer for site in suspects if (layer := layer_of(site)) is not None}):
        with bench.piece(layer) as at:
            if at is not None:
                for fault, expected, step, found in _regress(at, suspects, faults, bench):
                    key = (fault.id, family(found.site))
                    sums.setdefault(key, []).append(found)
                    steps[key] = (expected, step)
    by_id = {fault.id: fault for fault in faults}
    accused = {
        key: guilty
        for key, found in sums.items()
        if (guilty := _guilty(found)) and _is_possible(by_id[key[0]], _reading(guilty)[0], *steps[key])
    }
    best: dict[str, tuple[str, str]] = {}
    for key, guilty in accused.items():
        rival = best.get(key[1])
        if rival is None or _evidence(guilty) > _evidence(accused[rival]):
            best[key[1]] = key
    return [
        _with_rivals(_finding(by_id[key[0]], accused[key], *steps[key], suspects, bench), key, accused)
        for key in best.values()
    ]


def _with_rivals(finding: Finding, key: tuple[str, str], accused: Mapping[tuple[str, str], list[_Sums]]) -> Finding:
    """The finding with all faults of its family that the same lean speaks for."""
    least = _TIED * _evidence(accused[key])
    rivals = tuple(k[0] for k, sums in accused.items() if k[1] == key[1] and k != key and _evidence(sums) > least)
    return replace(finding, fault=finding.fault and replace(finding.fault, rivals=rivals))


def _regress(
    at: LoadedPiece, suspects: dict[str, Measurement], faults: Sequence[Fault], bench: Workbench
) -> Iterator[tuple[Fault, float, float, _Sums]]:
    """The sums of every fault at every suspect site of a loaded layer."""
    model = bench.reference.working
    cheap = {s.name for s in model.sites_of(at.piece) if not isinstance(model.model.get_submodule(s.module), nn.Linear)}
    names = [n for n in at.recorded if n in suspects and n in cheap and any(bench.shows(f, n) for f in faults)]
    if not names:
        return
    truth = bench.compute(at, names, bench.reference.precise)
    floor = bench.compute(at, names, model)
    for fault in faults:
        wanted = [name for name in names if bench.shows(fault, name)]
        if not wanted or not bench.applies(fault, at.piece):
            continue
        right = {name: bench.expected(fault, at.piece, name) for name in wanted}
        for expected in dict.fromkeys(right.values()):
            step, these = _step(fault, expected), [name for name in wanted if right[name] == expected]
            moved = bench.compute(at, these, bench.reference.precise, fault, expected + step)
            for name in these:
                found = _sums(name, at.recorded[name], truth[name], floor[name], moved[name], model.dtype)
                yield fault, expected, step, found


def _step(fault: Fault, expected: float) -> float:
    """A change of the number along which the response is still a straight line."""
    assert fault.number is not None, "unreachable because only faults with a number are regressed"
    if fault.number.method == "typical-step":
        return next((value for value in fault.number.typical if value > expected), 2 * expected) - expected
    return expected * 0.01 if expected else 0.01


def _sums(site: str, candidate: Tensor, truth: Tensor, floor: Tensor, moved: Tensor, working: torch.dtype) -> _Sums:
    r, e, g = candidate.to(truth) - truth, floor.to(truth) - truth, moved - truth
    visible = truth > torch.finfo(torch.float16).min
    r, e, g = (torch.where(visible & x.isfinite(), x, 0).double() for x in (r, e, g))
    least = (0.3 * unit_roundoff(working)) ** 2 * torch.where(visible, truth, 0).double().square().sum(-1)
    weight = 1 / torch.maximum(e.square().sum(-1), least).clamp_min(1e-300)
    kinds = alike(truth.flatten(0, -2))
    rg, eg, gg = (np.bincount(kinds, ((x * g).sum(-1) * weight).flatten().cpu().numpy()) for x in (r, e, g))
    shared, own = (float(((x * e).sum(-1) * weight).sum()) for x in (r, e))
    size = float((torch.where(visible, truth, 0).double().square().sum(-1) * weight).sum())
    slope = float(rg.sum() / gg.sum()) if gg.sum() else 0.0
    noise = float(np.maximum(np.square(rg - slope * gg), np.square(eg)).sum())
    return _Sums(site, float(rg.sum()), float(eg.sum()), float(gg.sum()), noise, shared, own, size, len(rg))


def _guilty(found: list[_Sums]) -> list[_Sums]:
    """The sites of a family at which the constant is wrong: all of them together, or those that show it alone."""
    if _is_coherent(found):
        slope = _slope(found)
        agreeing = [s for s in found if s.sigmas < _SIGMAS or abs(s.slope - slope) <= _AGREE * abs(slope)]
        if len(agreeing) == len(found):
            return found
    alone = [one for one in found if _is_coherent([one])]
    # A wrong constant moves the numbers of all its sites one way; rounding leans this way here and that way there.
    return alone if len({one.slope > 0 for one in alone}) == 1 else []


def _is_possible(fault: Fault, slope: float, expected: float, step: float) -> bool:
    """Whether the number could be what the slope reads: an eps or a scale is positive."""
    assert fault.number is not None, "unreachable because only faults with a number are regressed"
    return not (fault.number.log and expected > 0) or expected + slope * step > 0


def _is_coherent(found: Sequence[_Sums]) -> bool:
    response, noise = sum(s.response for s in found), sum(s.noise for s in found)
    if not response or not noise or sum(s.rows for s in found) < _LEAST_ROWS:
        return False
    slope, null = _slope(found), _null(found)
    beyond = max(slope - max(null, 0.0), min(null, 0.0) - slope)
    sigmas = beyond * response / math.sqrt(noise)
    effect = abs(slope) * math.sqrt(response / max(sum(s.size for s in found), 1e-300))
    return effect > LEAST_EFFECT and beyond > _LEAST_SLOPE and sigmas > _SIGMAS and beyond > _TIMES_NULL * abs(null)


def _slope(found: Sequence[_Sums]) -> float:
    return sum(s.candidate for s in found) / sum(s.response for s in found)


def _null(found: Sequence[_Sums]) -> float:
    return sum(s.reference for s in found) / sum(s.response for s in found)


def _kinship(found: Sequence[_Sums]) -> float:
    """How far the candidate rounds as the reference does, and so shares its bias: 0 not at all, 1 the same bits."""
    own = sum(s.own for s in found)
    return min(1.0, max(0.0, sum(s.shared for s in found) / own)) if own else 0.0


def _reading(found: Sequence[_Sums]) -> tuple[float, float]:
    """The slope without the bias that the rounding shares with the reference's, and its standard error."""
    response, null, kinship = sum(s.response for s in found), _null(found), _kinship(found)
    noise = math.sqrt(sum(s.noise for s in found)) / response
    return _slope(found) - kinship * null, math.hypot(noise, (1 - kinship) * null)


def _evidence(found: Sequence[_Sums]) -> float:
    """How much of the error a fault accounts for, to choose between faults that lean the same way."""
    return sum(s.candidate for s in found) ** 2 / sum(s.response for s in found)


def _read_again(
    fault: Fault, guilty: Sequence[_Sums], value: float, step: float, bench: Workbench
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
            found.append(_sums(name, at.recorded[name], truth, floor, moved, working.dtype))
    slope, stderr = _reading(found)
    return value + slope * step, abs(stderr * step)


def _finding(
    fault: Fault,
    guilty: Sequence[_Sums],
    expected: float,
    step: float,
    suspects: dict[str, Measurement],
    bench: Workbench,
) -> Finding:
    assert fault.number is not None, "unreachable because only faults with a number are regressed"
    slope, stderr = _reading(guilty)
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
