"""Replay: the reference's operations on the candidate's own inputs.

In every piece the reference computes each site afresh; what it computed goes to the comparison, and the
candidate's recorded value goes on. So each site is f(candidate's inputs), and what an earlier operation
did wrong is not held against a later one. A site that the candidate did not record is not replaced.

Five passes over each piece while its weights are in memory:

* own      the reference's plain run on its own activations, in the working dtype;
* ideal    the same in a precision whose own error does not matter;
* truth    the replay in a precision whose own error does not matter;
* floor    the replay in the working dtype: the reference's own rounding error on the same inputs;
* jitter   the truth again, on inputs moved by less than their rounding: what a fused operation may have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from parity.record.tap import Tap
from parity.reference.legal_ways import straying
from parity.reference.pieces import Piece, PiecewiseModel
from parity.reference.precision import jittered, stochastically_rounded, truth_dtype
from parity.sites import Site

_JITTER_SEED = 20240


@dataclass(frozen=True)
class Replayed:
    """One site after all passes; every tensor in the reference's layout, in its own dtype.

    `candidate` is None where the candidate did not record the site; `own` is the reference's plain run.
    `summands` is the length of the sums behind each number (PiecewiseModel.summands); `allowed` is the square of how
    far each row may be off the truth in another legal way, (…) for values (…, features).
    """

    site: Site
    own: Tensor
    ideal: Tensor
    candidate: Tensor | None
    truth: Tensor
    floor: Tensor
    jitter: Tensor
    summands: int
    noise: tuple[Tensor, ...] = ()
    allowed: Tensor | None = None


class Reference:
    """The reference model in its working dtype and, beside it, in the precision of the truth."""

    def __init__(self, working: PiecewiseModel) -> None:
        self.working = working
        self.precise = working.twin(truth_dtype(working.dtype))

    def prepare(self, input_ids: Tensor) -> None:
        """Capture what the layers of both models get beside hidden states, for token ids (b, t)."""
        self.working.prepare(input_ids)
        self.precise.prepare(input_ids)

    def replay(
        self, input_ids: Tensor, candidate: Callable[[Site], Tensor | None], noise: int = 0, ways: int = 0
    ) -> Iterator[tuple[Piece, list[Replayed]]]:
        """The sites of one piece after another, each piece in order of execution.

        `candidate(site)` gives the recorded activation in the reference's layout, or None. `noise` more passes
        round every site stochastically: what rounding may add up to, in no particular implementation. `ways` more
        replays stray as legal ways may (parity.reference.legal_ways): how far is in `allowed`.
        """
        recorded: dict[str, Tensor] = {}
        passes = self._passes(recorded)
        noisy = [_Pass(self.precise, self._noisy(seed)) for seed in range(noise)]
        strayed = [_Pass(self.precise, _replacing(recorded)) for _ in range(ways)]
        for piece in self.working.pieces:
            sites = self.working.sites_of(piece)
            recorded.clear()
            recorded.update({s.name: v for s in sites if (v := candidate(s)) is not None})
            with self.working.loaded(piece), self.precise.loaded(piece):
                for one in (*passes.values(), *noisy):
                    one.run(piece, input_ids)
                for seed, one in enumerate(strayed):
                    with straying(piece, seed)(self.precise):
                        one.run(piece, input_ids)
            gathered = [_gather(s, recorded.get(s.name), passes, self.working.summands(s), noisy) for s in sites]
            if strayed:
                gathered = [
                    replace(s, allowed=mean_square(s.truth, (w.values[s.site.name] for w in strayed))) for s in gathered
                ]
            yield piece, gathered

    def _noisy(self, seed: int) -> Tap:
        generator = torch.Generator(self.working.device).manual_seed(seed)
        dtype = self.working.dtype
        return lambda _site, fresh: stochastically_rounded(fresh, dtype, generator)

    def _passes(self, recorded: dict[str, Tensor]) -> dict[str, _Pass]:
        generator = torch.Generator(self.working.device).manual_seed(_JITTER_SEED)
        working = self.working.dtype

        def as_computed(_site: str, fresh: Tensor) -> Tensor:
            return fresh

        def moved(site: str, fresh: Tensor) -> Tensor:
            if site not in recorded:
                return fresh
            return jittered(recorded[site].to(fresh.device, fresh.dtype), working, generator)

        return {
            "own": _Pass(self.working, as_computed),
            "ideal": _Pass(self.precise, as_computed),
            "truth": _Pass(self.precise, _replacing(recorded)),
            "floor": _Pass(self.working, _replacing(recorded)),
            "jitter": _Pass(self.precise, moved),
        }


def _replacing(recorded: dict[str, Tensor]) -> Tap:
    """What the candidate recorded flows on."""
    return lambda site, fresh: recorded[site].to(fresh.device, fresh.dtype) if site in recorded else fresh


@dataclass
class _Pass:
    """One walk through the pieces: what flows on from each site is `feed(site, fresh value)`."""

    model: PiecewiseModel
    feed: Tap
    values: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None

    def run(self, piece: Piece, input_ids: Tensor) -> None:
        """Compute a loaded piece from where this pass stands."""
        self.values.clear()
        self.hidden = self.model.run(piece, input_ids, self.hidden, self._tap)

    def _tap(self, site: str, fresh: Tensor) -> Tensor:
        # Nothing follows the last site, and it is the largest.
        onward = fresh if site == self.model.sites[-1].name else self.feed(site, fresh)
        # A replaced input is overwritten in place, so the fresh value must be kept apart.
        self.values[site] = fresh if onward is fresh else fresh.clone()
        return onward


def mean_square(truth: Tensor, others: Iterable[Tensor]) -> Tensor:
    """How far other values are off the truth (…, features), row by row: the mean over them of the sums of squares."""
    squares = [torch.where(truth.isfinite(), other - truth, 0).square().sum(-1) for other in others]
    return torch.stack(squares).mean(0)


def _allowing(site: Replayed, strayed: list[_Pass]) -> Replayed:
    return replace(site, allowed=mean_square(site.truth, (one.values[site.site.name] for one in strayed)))


def _gather(
    site: Site, candidate: Tensor | None, passes: dict[str, _Pass], summands: int, noisy: list[_Pass]
) -> Replayed:
    values = {name: one.values[site.name] for name, one in passes.items()}
    return Replayed(
        site,
        candidate=candidate,
        summands=summands,
        noise=tuple(one.values[site.name] for one in noisy),
        **values,
    )
