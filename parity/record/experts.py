"""Seeing and steering a mixture of experts without editing transformers.

There a router makes logits, takes the top k of what it makes of them, and a module of experts gets hidden states,
the chosen indices and their weights. Three values stand for that:

* the router's logits, under the router's own name, or `router.logits` where that returns something else first;
* `experts.chosen`: 1 for the experts that a token goes to, 0 for the others;
* `experts.weights`: what each expert's output is multiplied with, 0 for those that were not chosen. A router that
  returns just that (Llama 4) has it under its own name.

The order in which the chosen experts are listed means nothing, so all three have a column for each expert. A tap that
replaces the logits changes the choice; one that replaces the choice changes whose weights the router computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity.sites import Dims, Site

Tap = Callable[[str, Tensor], Tensor]

DIMS: Dims = ("batch*token", "expert")
# How a site is reached: inside the router, or among what the experts are given. A router may choose by one top-k, or
# by two maxima in turn (Phi-MoE's sparse mixer).
IN_ROUTER = ("router logits", "router choice", "router maxima")
CHOICES = IN_ROUTER[1:]
GIVEN = ("experts choice", "experts weights")
ROUTED = ("chosen", "weights")


@dataclass(frozen=True)
class Routing:
    """What a module of experts is given: indices and weights of the chosen ones, both (token, choice)."""

    index: Tensor
    weights: Tensor


def routing_of(args: Iterable[Any], kwargs: dict[str, Any]) -> Routing | None:
    """Which of the arguments of a module are a routing; None if it is not a module of experts."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if len(tensors) != 3 or any(value.dim() != 2 for value in tensors):
        return None
    _hidden, index, weights = tensors
    is_routing = index.shape == weights.shape and weights.is_floating_point() and index.dtype is torch.int64
    return Routing(index, weights) if is_routing else None


def experts_in(module: nn.Module) -> int | None:
    """How many experts a module holds: the first size of the weights that it stacks."""
    sizes = {weight.shape[0] for weight in module._parameters.values() if weight is not None and weight.dim() == 3}
    return sizes.pop() if len(sizes) == 1 else None


def makes_logits(router: nn.Module, count: int) -> bool:
    """Whether a router multiplies with a weight of its own, so that no module inside it returns the logits."""
    weight = router._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.shape[0] == count


def chosen(index: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """1 at each index (token, choice), 0 elsewhere: (token, expert)."""
    return torch.zeros(index.shape[0], experts, dtype=dtype, device=index.device).scatter(1, index, 1.0)


def spread(routing: Routing, experts: int) -> Tensor:
    """The weights (token, choice), each in the column of its expert: (token, expert)."""
    weights = routing.weights
    return torch.zeros(weights.shape[0], experts, dtype=weights.dtype, device=weights.device).scatter(
        1, routing.index, weights
    )


def indices(choice: Tensor, scores: Tensor, count: int | None = None) -> Tensor:
    """The chosen experts (token, choice) of a choice (token, expert), the best score (token, expert) first.

    `count`, or as many as the token with most has: one with fewer is filled up with the best of the others.
    """
    taken = choice > 0.5
    rank = scores.argsort(-1).argsort(-1) + scores.shape[-1] * taken
    return rank.topk(count or max(int(taken.sum(-1).max()), 1), dim=-1).indices


@dataclass
class RouterTaps(TorchFunctionMode):
    """While it is entered, `tap` sees the logits and the choice of routers, and may replace them.

    `sites` gives for each router the names of values of IN_ROUTER, and `experts` how many there are.
    """

    sites: dict[nn.Module, dict[str, str]]
    experts: dict[nn.Module, int]
    tap: Tap
    inside: list[nn.Module] = field(default_factory=list)
    # Scores before whole groups of experts were masked: weights of a masked expert are read from them.
    whole: Tensor | None = None
    # How many maxima were taken, and which experts (token, choice) they shall be; None if those that they are.
    turn: int = 0
    found: Tensor | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def enter(self, module: nn.Module, *_args: Any) -> None:
        """A router begins."""
        self.inside.append(module)
        self.whole = self.found = None
        self.turn = 0

    def leave(self, *_args: Any) -> None:
        """It has ended."""
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            return result
        router = self.inside[-1]
        names, count, what = self.sites[router], self.experts[router], getattr(func, "__name__", "")
        if what == "linear" and IN_ROUTER[0] in names and result.shape[-1] == count:
            return self.tap(names[IN_ROUTER[0]], result)
        if what == "masked_fill" and args[0].shape[-1] == count:
            self.whole = args[0]
        if what == "topk" and CHOICES[0] in names and args[0].dim() == 2 and args[0].shape[-1] == count:
            return self._chosen(names[CHOICES[0]], args[0], result)
        if what == "max" and CHOICES[1] in names and is_maximum(result) and args[0].shape[-1] == count:
            return self._maximum(names[CHOICES[1]], args[0], result)
        return result

    def _chosen(self, site: str, scores: Tensor, top: Any) -> Any:
        fresh = chosen(top[1], scores.shape[-1], scores.dtype)
        new = self.tap(site, fresh)
        if new is fresh:
            return top
        index = indices(new, scores)
        return torch.return_types.topk(((scores if self.whole is None else self.whole).gather(1, index), index))

    def _maximum(self, site: str, scores: Tensor, top: Any) -> Any:
        if self.turn == 0:
            second = scores.scatter(1, top[1], -torch.inf).max(-1, keepdim=True)
            own = torch.cat((top[1], second[1]), -1)
            fresh = chosen(own, scores.shape[-1], scores.dtype)
            new = self.tap(site, fresh)
            # Of two experts that are equally good the first comes first, and their order decides on their weights.
            same = (new == fresh).all(-1, keepdim=True)
            self.found = None if bool(same.all()) else torch.where(same, own, indices(new, scores, 2))
        turn, self.turn = self.turn, self.turn + 1
        if self.found is None or turn > 1:
            return top
        index = self.found[:, turn : turn + 1]
        return torch.return_types.max((scores.gather(1, index), index))


def is_maximum(result: Any) -> bool:
    """Whether a function has returned the largest score of each token and its index, both (token, 1)."""
    return isinstance(result, torch.return_types.max) and result[1].dim() == 2 and result[1].shape[-1] == 1


@contextmanager
def routing_taps(model: nn.Module, sites: Iterable[Site], tap: Tap) -> Iterator[None]:
    """Bring `tap` to the sites of routers and of what their experts are given, for the duration of the block."""
    inside: dict[nn.Module, dict[str, str]] = {}
    count: dict[nn.Module, int] = {}
    given: dict[nn.Module, dict[str, Site]] = {}
    for site in sites:
        module = model.get_submodule(site.module)
        if site.where in IN_ROUTER:
            inside.setdefault(module, {})[site.where] = site.name
            count[module] = site.shape[-1]
        else:
            given.setdefault(module, {})[site.where] = site
    with ExitStack() as stack:
        for module, names in given.items():
            stack.callback(module.register_forward_pre_hook(_given(names, tap), with_kwargs=True).remove)
        if inside:
            taps = RouterTaps(inside, count, tap)
            for module in inside:
                stack.callback(module.register_forward_pre_hook(taps.enter).remove)
                stack.callback(module.register_forward_hook(taps.leave).remove)
            stack.enter_context(taps)
        yield


def _given(sites: dict[str, Site], tap: Tap) -> Callable[[nn.Module, Any, dict[str, Any]], Any]:
    # A compiled candidate must not compile the recorder into itself.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        routing = routing_of(args, kwargs)
        if routing is None:
            return None
        if (site := sites.get(GIVEN[0])) is not None:
            tap(site.name, chosen(routing.index, site.shape[-1], routing.weights.dtype))
        if (site := sites.get(GIVEN[1])) is None:
            return None
        fresh = spread(routing, site.shape[-1])
        new = tap(site.name, fresh)
        if new is fresh:
            return None
        weights = new.gather(1, routing.index)

        def swapped(value: Any) -> Any:
            return weights if value is routing.weights else value

        return tuple(map(swapped, args)), {name: swapped(value) for name, value in kwargs.items()}

    plain: Callable[[nn.Module, Any, dict[str, Any]], Any] = hook
    return plain
