"""One fault tried at one guilty site: the reference with it, on the candidate's own inputs, against the candidate.

The thresholds, and what holds them:

| value | what it bounds | unit | where | held by |
|---|---|---|---|---|
| 1.6 | remainder of a fault that is the cause | its floors | CONFIRMED | tests.bench.localization: bugs named |
| 0.5 | energy explained, for a second pass | share of the error's | _PROMISING | chosen: saves time |
| 16 | window sizes before the first wrong token | number | _NEAR | chosen: saves time |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parity.diagnose.flips import allowed_by_flips
from parity.diagnose.readings import Uncertainty, best_value, difference, energy, is_told, uncertainty
from parity.diagnose.workbench import Workbench
from parity.faults import Fault, Number
from parity.reference.floor import Local
from parity.reference.one_operation import LoadedPiece

# A remainder up to this ratio is the fault's own rounding.
CONFIRMED = 1.6
# Faults that explain less than this of the error's energy are not worth a second pass.
_PROMISING = 0.5
# A cause explains at least this share of the error, or leaves no more than rounding alone does.
_EXPLAINED = 0.95
_ROUNDING = 1.2
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

    @property
    def fits(self) -> bool:
        """Whether the fault is a cause of all that is wrong at the site."""
        whole = self.explained >= _EXPLAINED or self.ratio <= _ROUNDING
        return self.ratio <= CONFIRMED and whole


@dataclass(frozen=True)
class Case:
    """A guilty site of a loaded piece: what the reference computes there, exactly and in the working dtype."""

    site: str
    at: LoadedPiece
    bench: Workbench
    truth: Tensor
    floor: Tensor

    @property
    def candidate(self) -> Tensor:
        """What the candidate recorded there, (b, t, d) at most sites."""
        return self.bench.candidate(self.at, self.site)


def attempt(fault: Fault, case: Case, start: float | None = None) -> Trial | None:
    """The fault at the site with the number that fits best; None if it explains little.

    With `start`, the number that explains another site, the search begins there, and starts over only if that fails.
    Raises whatever the fault's patch does where it cannot be had.
    """
    expected = case.bench.expected(fault, case.at.piece, case.site)
    if fault.number is None:
        return _with(fault, case, 0.0, expected)
    begin = [] if start is None else [[start]]
    found = None
    for starts in (*begin, _starts(fault.number, expected, case)):
        value = best_value(fault.number, expected, starts, lambda v: _exact(fault, case, v), case.candidate, case.truth)
        found = _with(fault, case, value, expected)
        if found is not None and found.fits:
            return found
    return found


def _exact(fault: Fault, case: Case, value: float) -> Tensor:
    return case.bench.compute(case.at, [case.site], case.bench.reference.precise, fault, value)[case.site]


def _rounded(fault: Fault, case: Case, value: float) -> Tensor:
    return case.bench.compute(case.at, [case.site], case.bench.reference.working, fault, value)[case.site]


def _with(fault: Fault, case: Case, value: float, expected: float) -> Trial | None:
    """The fault with this number."""
    faulty = _exact(fault, case, value)
    if faulty.shape != case.truth.shape:
        return None
    # What only rounds differently equals the reference in higher precision: its rounding has to be the candidate's.
    predicted = _rounded(fault, case, value) if fault.only_rounds else None
    error = energy(case.candidate, case.truth)
    explained = 1 - energy(case.candidate, faulty if predicted is None else predicted) / error if error else 0.0
    if not explained > _PROMISING:
        return None
    floor = _rounded(fault, case, value) if predicted is None else predicted
    local = _remainder(case, faulty, floor)
    if local is None:
        return None
    if fault.regime and local.ratio > CONFIRMED and case.bench.reference.working.dtype is torch.float32:
        flips = allowed_by_flips(case.at, {case.site: faulty}, case.bench, fault)
        local = case.bench.local(case.at, case.site, faulty, floor, flips[case.site])
    unsure = Uncertainty()
    if fault.number is not None and not fault.number.discrete:
        plain = difference(case.floor, case.truth)
        unsure = uncertainty(value, lambda v: _exact(fault, case, v), case.candidate, floor, plain)
        if not is_told(value, expected, unsure, faulty, case.truth):
            return None
    return Trial(fault, value, expected, unsure, explained, local.ratio)


def _remainder(case: Case, faulty: Tensor, floor: Tensor) -> Local | None:
    """What a fault leaves of the candidate; None if one of the two is not finite where the other is."""
    candidate = case.candidate.to(floor.device)
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
    local = case.bench.local(replace(case.at, recorded={case.site: candidate}), case.site, exact, floor)
    return None if local.nonfinite else local


def _kept(by_token: Sequence[float]) -> list[float]:
    """How many of the last tokens are right, where the first are wrong; none where no token or all are right."""
    right = next((i for i, ratio in enumerate(by_token) if ratio <= CONFIRMED), 0)
    return [float(len(by_token) - right)] if right else []


def _starts(number: Number, expected: float, case: Case) -> list[float]:
    """Numbers to start from: those seen in the wild, and what the residual or a coarse grid suggests."""
    starts = [value for value in number.typical if value != expected]
    if number.discrete:
        # A window ends shortly before the first token that is clearly wrong.
        local = case.bench.local(case.at, case.site, case.truth, case.floor)
        first = local.structure.first_token if number.method == "first-token" else None
        near = [] if first is None else [float(w) for w in range(max(first - _NEAR, 1), first + 2)]
        near += _kept(local.structure.by_token) if number.method == "first-right" else []
        return near + starts  # "the last token" has a number of its own too, which says more
    if number.log and expected > 0:
        return starts + [expected * factor for factor in (0.1, 0.5, 1.01, 2.0, 10.0)]
    return [*starts, expected - 1, expected + 1]
