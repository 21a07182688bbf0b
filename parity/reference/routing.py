"""Which experts a candidate chose, against what the reference chooses on the candidate's own inputs.

A choice is not continuous: where two experts are nearly tied, the rounding of their logits decides. So the question
is how far the logits would have to move for the reference's own rule, whatever it is, to choose as the candidate did:
those of its experts up, all others down. Up to LIMIT times their noise it is a tie, and both choices are right.

The noise of a token's logits is the largest of

    RMS over experts of reference in the working dtype − truth, and of truth on jittered inputs − truth;
    0.3 u and 2⁻²⁴ √(n / 6) of the largest logit (see parity.reference.floor)

and only 0.3 u of the largest where the candidate recorded its logits, u being that of the grid they lie on.

A candidate that did not record its choice must have made one all the same. Where the reference's is a tie, the next
site that was recorded shows which: it is compared with each, and the nearest is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parity.record.experts import CHOICES, ROUTED
from parity.reference import one_operation
from parity.reference.one_operation import LoadedPiece
from parity.reference.pieces import PiecewiseModel
from parity.reference.precision import PRECISION_BITS, unit_roundoff
from parity.sites import Site

# A choice is a tie if logits moved by at most so many times their noise would have made it.
LIMIT = 8.0
_LEAST_SHARE = 0.3
# Margins are measured from here, in units of the noise, to LIMIT times two to so many, by doublings.
_FIRST, _DOUBLINGS = 0.25, 12

Choose = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Route:
    """The choice of experts at one site; every tensor has a row for each token.

    choice   (token, expert) 1 for what the candidate chose, recorded or shown by what it computed
    differs  (token) whether the reference, on the candidate's inputs, chooses otherwise
    margin   (token) how far its logits would have to move to choose likewise, in units of the noise; 0 where it does
    coarse   (token) the same in units of what the working dtype would round the logits by
    experts  (token) how many experts the candidate chose less how many the reference does
    is_told  whether the candidate recorded its choice, or the weights of the chosen
    """

    choice: Tensor
    differs: Tensor
    margin: Tensor
    coarse: Tensor
    experts: Tensor
    is_told: bool

    @property
    def is_right(self) -> Tensor:
        """Which tokens (token) are routed as the reference would, or might have."""
        return self.margin <= LIMIT


@dataclass(frozen=True)
class Router:
    """A router on the candidate's own inputs: what goes into its piece, and the values that flow there.

    `weights` is the site of the weights of the chosen (token, expert), `before` are the values that come before the
    router's logits, `recorded` all that the candidate recorded.
    """

    model: PiecewiseModel
    at: LoadedPiece
    logits: Site
    chosen: Site
    weights: str
    before: Mapping[str, Tensor]
    recorded: Mapping[str, Tensor]

    def choose(self, logits: Tensor) -> Tensor:
        """What the reference's rule chooses (token, expert) by logits (token, expert)."""
        known = {**self.before, self.logits.name: logits}
        return self._run(known, self.chosen.name)

    def beyond(self, choice: Tensor, site: str) -> Tensor:
        """What the reference computes at a later site if tokens are routed by `choice` (token, expert)."""
        return self._run({**self.before, **self.recorded, self.chosen.name: choice}, site)

    def shown_at(self) -> Site | None:
        """The first recorded site behind the choice."""
        sites = self.model.sites_of(self.at.piece)
        later = sites[sites.index(self.chosen) + 1 :]
        return next((site for site in later if site.name in self.recorded and site.name != self.weights), None)

    def _run(self, known: Mapping[str, Tensor], wanted: str) -> Tensor:
        return one_operation.run(self.model, replace(self.at, recorded=known), [wanted])[wanted]


def choices_of(sites: Sequence[Site]) -> list[Site]:
    """The sites where experts are chosen."""
    return [site for site in sites if site.where in CHOICES]


def router_at(
    model: PiecewiseModel, at: LoadedPiece, chosen: Site, values: Mapping[str, Tensor], recorded: Mapping[str, Tensor]
) -> Router | None:
    """The router that makes a choice; None if no site holds its logits.

    values    those of the truth by site, the logits and the choice (token, expert) among them
    recorded  the candidate's, likewise
    """
    sites = model.sites_of(at.piece)
    inside = (s for s in sites if s.module == chosen.module or s.module.startswith(f"{chosen.module}."))
    logits = next((s for s in inside if s.shape[-1] == chosen.shape[-1] and s != chosen), None)
    if logits is None:
        return None
    names = [site.name for site in sites[: sites.index(logits)]]
    before = {name: recorded.get(name, values[name]) for name in names}
    # A router that gives no experts a choice returns the weights itself.
    weights = chosen.name.removesuffix(ROUTED[0]) + ROUTED[1]
    weights = weights if any(site.name == weights for site in sites) else chosen.module
    return Router(model, at, logits, chosen, weights, before, recorded)


def route_of(
    router: Router,
    truth: Mapping[str, Tensor],
    floor: Mapping[str, Tensor],
    jitter: Mapping[str, Tensor],
    *,
    working: torch.dtype,
) -> Route:
    """The choice that a candidate made, from what three passes computed on its own inputs, by site.

    Of these the logits and the choice are (token, expert).
    """
    name = router.logits.name
    noise, coarse = _noise(router, truth[name], [floor[name], jitter[name]], working)
    choice = _recorded_choice(router)
    if choice is None:
        return _shown(router, truth, floor[router.chosen.name], noise)
    return _judged(router, choice, truth, (noise, coarse))


def _recorded_choice(router: Router) -> Tensor | None:
    """The choice (token, expert) as it was recorded, or as the recorded weights tell."""
    weights = router.recorded.get(router.weights)
    return router.recorded.get(router.chosen.name, None if weights is None else (weights != 0).float())


def _noise(router: Router, truth: Tensor, others: Sequence[Tensor], working: torch.dtype) -> tuple[Tensor, Tensor]:
    """Noise (token, 1) of the logits (token, expert), and what rounding to the working dtype would make of them.

    `others` are the logits of the reference in the working dtype and on jittered inputs.
    """
    recorded = router.recorded.get(router.logits.name)
    base = truth if recorded is None else recorded.to(truth.device, truth.dtype)
    largest = base.abs().amax(-1, keepdim=True)
    coarse = _LEAST_SHARE * unit_roundoff(working) * largest.clamp_min(1.0)
    if recorded is not None:
        return _LEAST_SHARE * unit_roundoff(_grid(recorded)) * largest, coarse
    spread = [(other.to(truth.dtype) - truth).square().mean(-1, keepdim=True).sqrt() for other in others]
    summed = unit_roundoff(torch.float32) * math.sqrt(
        router.model.summands(router.logits, router.at.input_ids.shape[-1]) / 6
    )
    least = max(_LEAST_SHARE * unit_roundoff(others[0].dtype), summed) * largest
    return torch.stack([*spread, least]).amax(0), coarse


def _grid(recorded: Tensor) -> torch.dtype:
    """The narrowest dtype that has all of the numbers."""
    narrow = (d for d in (torch.bfloat16, torch.float16) if torch.equal(recorded.to(d).to(recorded.dtype), recorded))
    found = next(narrow, recorded.dtype)
    return found if found in PRECISION_BITS else torch.float32


def _judged(router: Router, choice: Tensor, truth: Mapping[str, Tensor], noise: tuple[Tensor, Tensor]) -> Route:
    """A recorded choice (token, expert) against the reference's; `truth` holds the reference's values."""
    expected = truth[router.chosen.name]
    choice = (choice.to(expected.device) > 0.5).to(expected.dtype)
    differs = (choice != expected).any(-1)
    more = (choice.sum(-1) - expected.sum(-1)).long()
    margin = torch.zeros_like(differs, dtype=torch.float64)
    if bool(differs.any()):
        margin[differs] = math.inf
        base = _base(router, truth)
        step = _FIRST
        while step <= LIMIT * 2**_DOUBLINGS and bool((open_rows := margin.isinf() & (more == 0)).any()):
            alike = (router.choose(base + step * noise[0] * (2 * choice - 1)) == choice).all(-1)
            margin[open_rows & alike] = step
            step *= 2
    scale = (noise[0] / noise[1]).squeeze(-1).double()
    return Route(choice, differs, margin, torch.where(margin == 0, 0.0, margin * scale), more, is_told=True)


def _base(router: Router, truth: Mapping[str, Tensor]) -> Tensor:
    fresh = truth[router.logits.name]
    recorded = router.recorded.get(router.logits.name)
    return fresh if recorded is None else recorded.to(fresh.device, fresh.dtype)


def _shown(router: Router, truth: Mapping[str, Tensor], working_choice: Tensor, noise: Tensor) -> Route:
    """The choice of a candidate that did not record it: the reference's, or of tied ones what its values show.

    `working_choice` is that of the reference in the working dtype.
    """
    expected = truth[router.chosen.name]
    nothing = torch.zeros(len(expected), dtype=torch.float64, device=expected.device)
    choice, site = expected, router.shown_at()
    if site is not None:
        rivals = _rivals(router, expected, _base(router, truth), LIMIT * noise)
        if rivals:
            choice = _nearest(router, site, expected, [working_choice.to(expected), *rivals])
    return Route(choice, (choice != expected).any(-1), nothing, nothing, nothing.long(), is_told=False)


def _rivals(router: Router, expected: Tensor, base: Tensor, reach: Tensor) -> list[Tensor]:
    """Other choices that logits moved by at most `reach` lead to; none if there is no tie at any token."""
    worst = router.choose(base + reach * (1 - 2 * expected))
    if torch.equal(worst, expected):
        return []
    rank = (base.masked_fill(expected < 0.5, -math.inf)).argsort(-1, descending=True)
    rivals = [worst]
    for place in range(int(expected.sum(-1).max())):
        # Each of the chosen against all that were not.
        sign = torch.ones_like(base).scatter(1, rank[:, place : place + 1], -1.0)
        rivals.append(router.choose(base + reach * torch.where(expected > 0.5, sign, 1.0)))
    return rivals


def _nearest(router: Router, site: Site, expected: Tensor, rivals: list[Tensor]) -> Tensor:
    """Of several choices the one, token by token, that comes nearest to what was recorded at a site."""
    best, choice = _distance(router, expected, site), expected
    for rival in _distinct(expected, rivals):
        distance = _distance(router, rival, site)
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        choice = torch.where(nearer[:, None], rival, choice)
    return choice


def _distinct(expected: Tensor, rivals: list[Tensor]) -> list[Tensor]:
    """As few choices as hold, token by token, every rival that differs from the expected choice and from the others."""
    packed: list[Tensor] = []
    for rival in rivals:
        left = (rival != expected).any(-1)
        for number, earlier in enumerate(packed):
            left &= (rival != earlier).any(-1)
            free = left & (earlier == expected).all(-1)
            packed[number] = torch.where(free[:, None], rival, earlier)
            left &= ~free
        if bool(left.any()):
            packed.append(torch.where(left[:, None], rival, expected))
    return packed


def _distance(router: Router, choice: Tensor, site: Site) -> Tensor:
    """How far (token) the reference, routed so, is from what the candidate recorded at a site."""
    fresh = router.beyond(choice, site.name)
    recorded = router.recorded[site.name].to(fresh.device, fresh.dtype)
    return (fresh - recorded).reshape(len(choice), -1).square().sum(-1)
