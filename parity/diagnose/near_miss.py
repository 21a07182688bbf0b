"""A fitted number may come near a bug that is another: what it leaves then leans in a direction that it cannot take.

Another theta bends all of RoPE's frequencies along one curve. Where the candidate bends them along another, a theta
may still be fitted that leaves little more than rounding, above all across operations that were not recorded. So what
is left is regressed on the frequency of each pair by itself, as weak constants are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from parity.diagnose.lean import sums_of
from parity.diagnose.trial import Case, Trial
from parity.faults import Fault, Scope
from parity.faults.patches.rope import ROTATED, frequencies, positions_of, with_tables
from parity.reference.pieces import PiecewiseModel

# The change of a pair's frequency to whose effect what is left is compared.
_STEP = 0.02
# The pairs together lean farther than chance by so many standard deviations of a chi-square, and by so many times what
# the reference's own rounding leans. A number that is refused costs a name, and accuses nobody.
_SIGMAS, _TIMES_NULL = 6.0, 2.0
# Legal tables stray by up to 1.4e-6 of a frequency (parity.reference.rope_phases), and a fitted number with them.
_LEAST_TURN = 1e-5
# A number this near to one seen in the wild has not been fitted to something else.
_USUAL = 1e-3


def is_near_miss(trial: Trial, case: Case) -> bool:
    """Whether a number fitted to RoPE leaves frequencies of single pairs that lean: then it is not the cause."""
    number = trial.fault.number
    if number is None or number.discrete or not set(ROTATED) <= set(trial.fault.sites):
        return False
    if is_usual(trial):
        return False
    precise, working = case.bench.reference.precise, case.bench.reference.working
    scope = case.bench.scope(precise, case.at.piece)
    if not _are_halves(scope.kwargs.get("position_embeddings")):
        return False
    exact, rounded = (_computed(case, trial.fault, trial.value, model) for model in (precise, working))
    count = frequencies(scope)[0].numel()
    moved = (_computed(case, _also_turned(trial.fault, pair, count), trial.value, precise) for pair in range(count))
    sums = [sums_of(case.site, case.candidate, exact, rounded, other, working.dtype) for other in moved]
    left = sum(s.candidate**2 / s.noise for s in sums if s.noise and abs(s.slope) * _STEP > _LEAST_TURN)
    own = sum(s.reference**2 / s.noise for s in sums if s.noise)
    return left > max(count + _SIGMAS * math.sqrt(2 * count), _TIMES_NULL * own)


def is_usual(trial: Trial) -> bool:
    """Whether the number of a fault came out as one that ports have had."""
    number = trial.fault.number
    return number is not None and any(abs(trial.value - seen) <= _USUAL * abs(seen) for seen in number.typical)


def _are_halves(tables: object) -> bool:
    """Whether a layer is given cosines and sines (b, t, d) of the pairs (i, i + d/2).

    Where tables are complex, or those of neighbouring channels, nothing is asked.
    """
    if not isinstance(tables, tuple) or len(tables) != 2 or not all(isinstance(table, Tensor) for table in tables):
        return False
    return all(torch.equal(*table.chunk(2, dim=-1)) for table in tables if table.shape[-1] % 2 == 0)


def _computed(case: Case, fault: Fault, value: float, model: PiecewiseModel) -> Tensor:
    return case.bench.compute(case.at, [case.site], model, fault, value)[case.site]


def _also_turned(fault: Fault, pair: int, count: int) -> Fault:
    """The fault, with the frequency of one pair of `count` larger by a step."""

    @contextmanager
    def patch(scope: Scope, value: float) -> Iterator[None]:
        with fault.patch(scope, value):
            cos, sin = scope.kwargs["position_embeddings"]
            angle = frequencies(scope)[0].to(cos)[pair] * _STEP
            more = torch.zeros_like(cos)
            more[..., pair::count] = (positions_of(scope).to(cos) * angle)[..., None]
            turned = (cos * more.cos() - sin * more.sin(), sin * more.cos() + cos * more.sin())
            with with_tables(scope, turned):
                yield

    return replace(fault, patch=patch)
