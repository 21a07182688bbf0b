"""Replay: the reference's operations on the candidate's own inputs.

In every piece the reference computes each site afresh; what it computed goes to the comparison, and the
candidate's recorded value goes on. So each site is f(candidate's inputs), and what an earlier operation
did wrong is not held against a later one. A site that the candidate did not record is not replaced.

Six passes over each piece while its weights are in memory:

* truth    the replay in a precision whose own error does not matter;
* floor    the replay in the working dtype: the reference's own rounding error on the same inputs;
* jitter   the truth again, on inputs moved by less than their rounding: what a fused operation may have seen;
* plain    the reference's own run on its own activations, in the working dtype;
* own      the same, with tokens sent to the candidate's experts where these were tied (parity.reference.routing);
* ideal    that in a precision whose own error does not matter.

`own` is computed apart from `plain` only once a tie was resolved differently, or in a regime, which `plain` has not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parity.record.tap import Tap
from parity.reference.batch import Batch
from parity.reference.compared import compared_rows
from parity.reference.legal_ways import straying
from parity.reference.one_operation import LoadedPiece, Regime, no_regime
from parity.reference.passes import Pass, mean_square
from parity.reference.pieces import Piece, PiecewiseModel
from parity.reference.precision import jittered, stochastically_rounded, truth_dtype
from parity.reference.products import V, Values, rows_of
from parity.reference.routing import Route, choices_of, route_of, router_at
from parity.reference.sharing import shares
from parity.sites import Site

_JITTER_SEED = 20240


@dataclass(frozen=True)
class Replayed:
    """One site after all passes; every tensor in the reference's layout, in its own dtype.

    Of large logits those in the precision of the truth are computed row by row (parity.reference.products).
    `candidate` is None where it did not record the site; the others are the passes of that name, `apart` is `plain`.
    `summands` is the length of the sums behind each number (PiecewiseModel.summands); `allowed` is the square of how
    far each row may be off the truth in another legal way, (…) for values (…, features); `text` (…) those not padding.
    """

    site: Site
    own: Tensor
    ideal: Values
    candidate: Tensor | None
    truth: Values
    floor: Tensor
    jitter: Values
    summands: int
    noise: tuple[Values, ...] = ()
    allowed: Tensor | None = None
    apart: Tensor | None = None
    text: Tensor | None = None

    @classmethod
    def on_its_own(
        cls, site: Site, candidate: Tensor, truth: Tensor, floor: Tensor, summands: int, allowed: Tensor | None = None
    ) -> Replayed:
        """A site computed on the candidate's inputs, all values (…, features), with no plain run beside it."""
        return cls(site, truth, truth, candidate, truth, floor, truth, summands, allowed=allowed)

    @property
    def plain(self) -> Tensor:
        """The reference's own run, routed as it routes itself: (b, t, d) at most sites."""
        return self.own if self.apart is None else self.apart

    def compared(self, value: V) -> V:
        """Of a value of the site's shape the rows (n, features) that are compared; all of it where all are."""
        return value if self.text is None else rows_of(value, self.text)


class Reference:
    """The reference model in its working dtype and, beside it, in the precision of the truth.

    `routes` holds the choice of experts at each site that the last replay came to; the reference computes in the
    `regime`, which changes the sites `changed`.
    """

    def __init__(self, working: PiecewiseModel) -> None:
        self.working = working
        self.precise = working.twin(truth_dtype(working.dtype))
        self.routes: dict[str, Route] = {}
        self.regime: Regime = no_regime
        self.changed: frozenset[str] = frozenset()

    def within(self, regime: Regime, sites: frozenset[str]) -> Reference:
        """The same models, computing in a regime, which changes these sites on recorded inputs."""
        other = copy.copy(self)
        other.routes, other.regime, other.changed = {}, regime, sites
        return other

    def prepare(self, input_ids: Tensor | Batch) -> None:
        """Capture what the layers of both models get beside hidden states, for token ids (b, t)."""
        self.working.prepare(input_ids)
        self.precise.prepare(input_ids)

    def replay(
        self,
        input_ids: Tensor | Batch,
        candidate: Callable[[Site], Tensor | None],
        noise: int = 0,
        ways: int = 0,
        wanted: Collection[Piece] | None = None,
        *,
        jitter: bool = False,
    ) -> Iterator[tuple[Piece, list[Replayed]]]:
        """The sites of one piece after another, each piece in order of execution.

        `candidate(site)` gives the recorded activation in the reference's layout, or None. `noise` more passes
        round every site stochastically: what rounding may add up to, in no particular implementation. `ways` more
        replays stray as legal ways may: in float32 those of parity.reference.legal_ways, in narrower dtypes by
        rounding what was not recorded, or with `jitter` by moving what was. How far each row strays is in `allowed`.

        Only the `wanted` pieces are given, all if None; the values are the same. Before these, passes on the
        candidate's own inputs are run only where its record does not say what comes of them.
        """
        batch, recorded = Batch.of(input_ids), dict[str, Tensor]()
        self.routes.clear()
        passes = self._passes(recorded)
        noisy = [Pass(self.precise, self._noisy(seed), self.regime) for seed in range(noise)]
        feed, withhold = (self._jittering if jitter else self._straying), not self._sums_show
        # An order of summation of its own is one of the last product too.
        strayed = [Pass(self.precise, feed(recorded, n), self.regime, may_withhold=withhold) for n in range(ways)]
        for piece in self._up_to_last(wanted):
            sites = self.working.sites_of(piece)
            recorded.clear()
            recorded.update({s.name: v.to(self.working.device) for s in sites if (v := candidate(s)) is not None})
            with self.working.loaded(piece), self.precise.loaded(piece):
                needed = wanted is None or piece in wanted or bool(strayed)
                if needed or not self._pass_over(passes, piece, recorded):
                    self._on_inputs(passes, piece, batch, recorded)
                for one in (passes["plain"], passes["ideal"], *noisy):
                    one.run(piece, batch)
                self._run_own(passes, piece, batch)
                for seed, one in enumerate(strayed):
                    with straying(piece, seed)(self.precise) if self._sums_show else nullcontext():
                        one.run(piece, batch)
            if wanted is not None and piece not in wanted:
                continue
            summands = {s.name: self.working.summands(s, batch.shape[-1]) for s in sites}
            gathered = (_gather(s, recorded.get(s.name), passes, summands[s.name], noisy) for s in sites)
            yield piece, [self._given(s, batch, strayed, jitter) for s in gathered]
            for one in (*passes.values(), *noisy, *strayed):
                one.forget()

    def _up_to_last(self, wanted: Collection[Piece] | None) -> list[Piece]:
        """The pieces that have to be run for the sake of some."""
        every = self.working.pieces
        return every if wanted is None else every[: max((every.index(piece) + 1 for piece in wanted), default=0)]

    def _pass_over(self, passes: dict[str, Pass], piece: Piece, recorded: dict[str, Tensor]) -> bool:
        """Bring the passes on the candidate's inputs to the end of a piece without running it; False if that needs it.

        What flows on is what was recorded. Where it is moved at random, all draws of the piece are made.
        """
        pieces, sites = self.working.pieces, self.working.sites_of(piece)
        source = None if piece == pieces[-1] else self.working.source_of(pieces[pieces.index(piece) + 1])
        names = [site.name for site in sites if site.name in recorded]
        shared = isinstance(piece, int) and shares(self.working.arguments(piece))  # later layers need more of it
        if source not in names or choices_of(sites) or shared:
            return False
        for one in (passes[name] for name in ("truth", "floor", "jitter")):
            fresh = torch.empty(0, dtype=one.model.dtype, device=self.working.device)
            for name in names:
                value = one.feed(name, fresh)
                one.hidden = value if name == source else one.hidden
        return True

    def _on_inputs(self, passes: dict[str, Pass], piece: Piece, batch: Batch, recorded: dict[str, Tensor]) -> None:
        """Run the passes on the candidate's own inputs, all of them routed as the candidate was."""
        on_inputs = [passes[name] for name in ("truth", "floor", "jitter")]
        for one in on_inputs:
            one.run(piece, batch)
        for site in choices_of(self.working.sites_of(piece)):
            truth = passes["truth"]
            at = LoadedPiece(piece, batch, truth.start, {}, self.regime)
            router = router_at(self.precise, at, site, truth.values, recorded)
            if router is None:
                continue
            route = route_of(router, *(one.values for one in on_inputs), working=self.working.dtype)
            self.routes[site.name] = route
            if site.name not in recorded and any((one.values[site.name] != route.choice).any() for one in on_inputs):
                for one in on_inputs:
                    one.run(piece, batch, again=True)

    def _run_own(self, passes: dict[str, Pass], piece: Piece, batch: Batch) -> None:
        own, plain = passes["own"], passes["plain"]
        fresh = {site.name: plain.values[site.name] for site in choices_of(self.working.sites_of(piece))}
        same = own.hidden is plain.start and self.regime is no_regime
        if same and all(torch.equal(self._routed(name, v), v) for name, v in fresh.items()):
            own.values, own.hidden = plain.values, plain.hidden
            own.shared = {name: dict(given) for name, given in plain.shared.items()}
        else:
            own.run(piece, batch)

    def _routed(self, site: str, fresh: Tensor) -> Tensor:
        """What flows on from a site of a run on its own activations: the candidate's choice where it is right."""
        route = self.routes.get(site)
        if route is None:
            return fresh
        return torch.where(route.is_right[:, None], route.choice.to(fresh.device, fresh.dtype), fresh)

    def _noisy(self, seed: int) -> Tap:
        generator = torch.Generator(self.working.device).manual_seed(seed)
        dtype = self.working.dtype
        return lambda site, fresh: stochastically_rounded(self._routed(site, fresh), dtype, generator)

    @property
    def _sums_show(self) -> bool:
        """Whether the order of a sum shows: narrower dtypes than float32 drown it."""
        return self.working.dtype is torch.float32

    def _straying(self, recorded: dict[str, Tensor], seed: int) -> Tap:
        replaced = self._replacing(recorded)
        if self._sums_show:
            return replaced
        generator = torch.Generator(self.working.device).manual_seed(seed)

        def rounded(site: str, fresh: Tensor) -> Tensor:
            value = replaced(site, fresh)
            kept = site in recorded or site in self.routes
            return value if kept else stochastically_rounded(value, self.working.dtype, generator)

        return rounded

    def _given(self, site: Replayed, batch: Batch, strayed: list[Pass], jitter: bool) -> Replayed:
        text = compared_rows(self.working, site.site, batch, site.truth.shape)
        # Where a regime rounds coarsely, the smallest move may flip it: fusing would excuse anything.
        site = replace(site, text=text, jitter=site.truth if site.site.name in self.changed else site.jitter)
        if not strayed:
            return site
        allowed = mean_square(site.truth, [one.at(site.site.name) for one in strayed])
        # The square of a stochastic rounding is twice that of one to nearest.
        return replace(site, allowed=allowed if self._sums_show or jitter else allowed / 2)

    def _replacing(self, recorded: dict[str, Tensor]) -> Tap:
        """What the candidate recorded flows on, and its tokens go to the experts that it chose."""

        def replaced(site: str, fresh: Tensor) -> Tensor:
            route = self.routes.get(site)
            value = recorded.get(site) if route is None else route.choice
            return fresh if value is None else value.to(fresh.device, fresh.dtype)

        return replaced

    def _jittering(self, recorded: dict[str, Tensor], seed: int) -> Tap:
        """What the candidate recorded flows on, moved by less than its rounding."""
        generator = torch.Generator(self.working.device).manual_seed(seed)
        replaced = self._replacing(recorded)

        def moved(site: str, fresh: Tensor) -> Tensor:
            value = replaced(site, fresh)
            kept = site in self.routes or site not in recorded
            return value if kept else jittered(value, self.working.dtype, generator)

        return moved

    def _passes(self, recorded: dict[str, Tensor]) -> dict[str, Pass]:
        def as_computed(_site: str, fresh: Tensor) -> Tensor:
            return fresh

        as_recorded = self._replacing(recorded)
        return {
            "truth": Pass(self.precise, as_recorded, self.regime, is_recorded=True),
            "floor": Pass(self.working, as_recorded, self.regime, may_withhold=False, is_recorded=True),
            "jitter": Pass(self.precise, self._jittering(recorded, _JITTER_SEED), self.regime),
            "plain": Pass(self.working, as_computed, may_withhold=False),
            "own": Pass(self.working, self._routed, self.regime, may_withhold=False),
            "ideal": Pass(self.precise, self._routed, self.regime),
        }


def _gather(
    site: Site, candidate: Tensor | None, passes: dict[str, Pass], summands: int, noisy: list[Pass]
) -> Replayed:
    return Replayed(
        site,
        candidate=candidate,
        summands=summands,
        noise=tuple(one.at(site.name) for one in noisy),
        own=passes["own"].fired(site.name),
        floor=passes["floor"].fired(site.name),
        apart=passes["plain"].fired(site.name),
        ideal=passes["ideal"].at(site.name),
        truth=passes["truth"].at(site.name),
        jitter=passes["jitter"].at(site.name),
    )
