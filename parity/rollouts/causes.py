"""What would give the rollout's log-probabilities: each hypothesis is computed, and taken if only rounding is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parity.diagnose.workbench import Workbench
from parity.faults import CATALOGUE, Fault, by_id, shows_at
from parity.reference.pieces import Piece, PiecewiseModel
from parity.results import ROUNDING
from parity.rollout_report import Cause
from parity.rollouts.figures import Floats, Floor, Storage, floor_of, ratio_of, rms
from parity.rollouts.scores import SHIFTS, Changing, Question, Scores, Tokens, logprobs, score_changed

Indices = NDArray[np.int64]

# Ways in which an engine rounds more than the model's dtype asks for: too costly to try the whole catalogue.
FAULTS = ("kv-cache-fp16", "kv-cache-fp8", "kv-cache-int8", "attention-operands-fp16")
# A cause has to explain so much of the error's energy.
_EXPLAINS = 0.9
# Temperatures that are tried, as factors of the one that was asked for.
_FACTORS = (0.2, 5.0)
_STEPS = 60
_SIGMAS = 7.0
_LEAST_CHANGE = 1e-3
_FEWEST = 16  # tokens that a temperature is read from
_MOST_TOP = 256
_SHARES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)


@dataclass(frozen=True)
class Judged:
    """The tokens of a rollout (n), what the reference says of them, and what rounding makes of that."""

    tokens: Tokens
    scores: Scores
    floor: Floor
    storage: Storage

    @property
    def error(self) -> Floats:
        """Distance from the exact log-probabilities (n)."""
        return self.tokens.engine - self.scores.ideal

    def explained(self, cause: Cause, predicted: Floats, floor: Floor, among: Indices | None = None) -> Cause | None:
        """The cause, if it predicts log-probabilities (m, those `among` the tokens) up to rounding; None otherwise."""
        engine, error = self.tokens.engine, self.error
        if among is not None:
            engine, error = engine[among], error[among]
        left = engine - predicted
        energy = float(np.square(error).sum())
        share = 1 - float(np.square(left).sum()) / energy if energy else 0.0
        remainder = ratio_of(left, floor)
        if remainder > ROUNDING or share < _EXPLAINS:
            return None
        return replace(cause, explained=share, remainder=remainder)


def shifts(judged: Judged, lengths: Sequence[int]) -> Iterator[Cause | None]:
    """Each log-probability is that of another token of its row; `lengths` are those of the completions."""
    tokens, ideal = judged.tokens, judged.scores.ideal
    place = {(int(r), int(a)): i for i, (r, a) in enumerate(zip(tokens.row, tokens.at, strict=True))}
    for by in SHIFTS:
        pairs = [(i, place.get((r, a + by))) for (r, a), i in place.items()]
        known = [(i, other) for i, other in pairs if other is not None]
        # At the end of a row there is none to take; a row alone tells nothing then.
        if len(known) < max(2, len(place) - len(lengths)):
            continue
        mine, theirs = (np.array(side, dtype=np.int64) for side in zip(*known, strict=True))
        floor = Floor(judged.floor.draws[:, theirs])
        yield judged.explained(Cause("shift", 0, 0, value=float(by)), ideal[theirs], floor, mine)


def temperature(judged: Judged, asked: float) -> Cause | None:
    """The one temperature at which the exact logits give the log-probabilities, if it is not the one asked for.

    It is read by least squares, tokens weighted by their floor, and believed where it is off by more than `_SIGMAS`
    standard errors; these come from what is left, so that they hold whatever made it.
    """
    scores, engine = judged.scores, judged.tokens.engine[judged.scores.sampled]
    token = torch.from_numpy(scores.token)
    usual = Floor(judged.floor.draws[:, scores.sampled]).usual

    def predicted(at: float) -> Floats:
        return logprobs(scores.logits, token, at)

    def loss(logarithm: float) -> float:
        return float(np.square((engine - predicted(math.exp(logarithm))) / usual).sum())

    low, high = (math.log(factor * asked) for factor in _FACTORS)
    grid = np.linspace(low, high, _STEPS)
    losses = [loss(float(x)) for x in grid]
    middle = int(np.clip(np.argmin(losses), 1, _STEPS - 2))
    best = math.exp(_least(loss, float(grid[middle - 1]), float(grid[middle + 1])))
    slope = (predicted(best * 1.001) - predicted(best * 0.999)) / (0.002 * best) / usual
    left = (engine - predicted(best)) / usual
    size, freedom = float(np.square(slope).sum()), len(left) - 1
    if freedom < _FEWEST or not size:
        return None
    stderr = float(np.sqrt(np.square(slope * left).sum() * len(left) / freedom)) / size
    # Rounding of logits over another temperature is as much larger as that is smaller.
    floor = Floor(judged.floor.draws[:, scores.sampled] * max(1.0, asked / best))
    remainder = ratio_of(engine - predicted(best), floor)
    if abs(best - asked) <= max(_SIGMAS * stderr, _LEAST_CHANGE * asked) or remainder > ROUNDING:
        return None
    before = loss(math.log(asked))
    return Cause("temperature", 1 - float(np.square(left).sum()) / before, remainder, value=best, stderr=stderr)


def _least(loss: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one number is smallest between two: golden section."""
    golden = (5**0.5 - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    at_a, at_b = loss(a), loss(b)
    for _ in range(60):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - golden * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + golden * (high - low)
            at_b = loss(b)
    return (low + high) / 2


def truncations(judged: Judged, asked: float) -> Iterator[Cause | None]:
    """Probabilities renormalized over the likeliest tokens: the k first of them, or those that make up a share p."""
    scores = judged.scores
    likely = (scores.logits.double() / asked).softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    exact, floor = scores.ideal[scores.sampled], Floor(judged.floor.draws[:, scores.sampled])
    for k in range(1, min(_MOST_TOP, likely.shape[-1] - 1) + 1):
        kept = likely[:, k - 1]
        yield judged.explained(Cause("top-k", 0, 0, value=float(k)), exact - _log(kept), floor, scores.sampled)
    for share in _SHARES:
        count = (likely < share).sum(-1, keepdim=True).clamp_max(likely.shape[-1] - 1)
        kept = likely.gather(-1, count)[:, 0]
        yield judged.explained(Cause("top-p", 0, 0, value=share), exact - _log(kept), floor, scores.sampled)


def _log(kept: Tensor) -> Floats:
    result: Floats = kept.log().cpu().numpy()
    return result


def faults(judged: Judged, question: Question) -> Iterator[Cause | None]:
    """Faults of the catalogue that an engine makes in every layer on purpose."""
    bench = Workbench(question.reference, torch.zeros(1, 1, dtype=torch.long), lambda _site: None)
    for fault in (by_id(id, CATALOGUE) for id in FAULTS):
        changed = score_changed(question, _everywhere(fault, bench))
        floor = _of_changed(changed, judged)
        yield judged.explained(Cause("fault", 0, 0, id=fault.id, title=fault.title), changed.ideal, floor)


def _everywhere(fault: Fault, bench: Workbench) -> Changing:
    def change(model: PiecewiseModel, piece: Piece) -> AbstractContextManager[None]:
        scope = bench.scope(model, piece)
        here = any(shows_at(fault, site.name) for site in model.sites_of(piece)) and fault.applies(scope)
        return fault.patch(scope, 0.0) if here else nullcontext()

    return change


def checkpoint(judged: Judged, name: str, scores: Scores) -> Cause | None:
    """Other weights: the scores of another checkpoint."""
    return judged.explained(Cause("checkpoint", 0, 0, id=name), scores.ideal, _of_changed(scores, judged))


def _of_changed(changed: Scores, judged: Judged) -> Floor:
    """What rounding makes where the reference is another: as much as before, or as its own two passes differ."""
    ours = judged.scores
    noise = ours.noise - ours.ideal + changed.ideal
    floor = floor_of(changed.own, changed.ideal, noise, judged.storage)
    own = rms(changed.own - changed.ideal)
    return Floor(floor.draws * max(1.0, float(own / rms(floor.rms)) if rms(floor.rms) else 1.0))
