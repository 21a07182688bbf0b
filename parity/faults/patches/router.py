"""Routers and experts of any mixture that transformers has, and how what passes between them is changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity.faults.fault import Change, Scope, weight
from parity.faults.patches.modules import forward, mlp_of
from parity.faults.patches.numbers import wide
from parity.record.experts import experts_in, makes_logits

# Where the outputs of experts have been added.
BLOCK = ("experts", "mlp", "feed_forward", "block_sparse_moe")
# Tokens that a router is tried on, to see what it does; any will do.
_TOKENS = 16
# How far the sum of weights in half precision may be from one.
_ONE = 0.03


def experts_of(scope: Scope) -> Any:
    """The module of experts in the layer; None if there is none."""
    mlp = mlp_of(scope)
    return next((m for m in mlp.modules() if experts_in(m)), None) if mlp else None


def router_of(scope: Scope) -> Any:
    """The router of the layer's mixture, if it multiplies with a weight of its own; None if there is none."""
    experts = experts_of(scope)
    count = experts_in(experts) if experts is not None else None
    return next((m for m in mlp_of(scope).modules() if makes_logits(m, count)), None) if count else None


def weighs_before(scope: Scope) -> bool:
    """Whether what goes into experts is weighed, so that they get no choice and no weights (Llama 4)."""
    experts = experts_of(scope)
    return experts is not None and len(inspect.signature(type(experts).forward).parameters) == 2


def takes_choice(scope: Scope) -> bool:
    """Whether there are experts that are given a choice and weights."""
    return experts_of(scope) is not None and not weighs_before(scope)


def is_sparse_mixer(scope: Scope) -> bool:
    """Whether the router takes two maxima in turn, each weighed among the experts that come near it (Phi-MoE)."""
    return isinstance(getattr(router_of(scope), "router_jitter_noise", None), float)


def has_bias(scope: Scope) -> bool:
    """Whether a correction bias decides with the scores which experts are chosen."""
    return isinstance(getattr(router_of(scope), "e_score_correction_bias", None), Tensor)


def has_groups(scope: Scope) -> bool:
    """Whether experts are chosen from the best groups only."""
    router = router_of(scope)
    return getattr(router, "num_group", 1) > 1 and getattr(router, "topk_method", "") != "greedy"


def scores_of(scope: Scope, logits: Tensor) -> Tensor:
    """What the weights are taken from, for logits (token, expert): their sigmoid or softmax."""
    return logits.sigmoid() if has_bias(scope) or weighs_before(scope) else logits.softmax(-1)


def factor_of(scope: Scope) -> float:
    """What all weights are multiplied with."""
    return float(getattr(router_of(scope), "routed_scaling_factor", 1.0))


def renormalizes(scope: Scope) -> bool | None:
    """Whether the weights of a token add up to one, but for a factor; None where there is no router.

    A router that has no switch for it is tried.
    """
    router = router_of(scope)
    if router is None or router.weight.is_meta:
        return None
    switch = getattr(router, "norm_topk_prob", None)
    if isinstance(switch, bool):
        return switch
    hidden = torch.randn(_TOKENS, router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, weights, _ = _read(router.forward(hidden.to(router.weight)))
    return bool(((weights.float().sum(-1) / factor_of(scope) - 1).abs() < _ONE).all())


def _read(returned: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (token, expert), weights and indices (token, choice) in what a router returned, in whatever order.

    One that returns no indices has a weight for every expert, 0 for those that were not chosen.
    """
    index = next((value for value in returned if value.dtype is torch.int64), None)
    if index is None:
        scores, logits = returned
        values, index = scores.topk(int((scores != 0).sum(-1).max()), dim=-1)
        return logits, values, index
    first, second = (value for value in returned if value is not index)
    return (second, first, index) if returned[0] is index else (first, second, index)


def reweighted(scope: Scope, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Change:
    """The router's weights are `change(logits, index, weights)`: (token, expert) and twice (token, choice)."""
    router = router_of(scope)
    plain = router.forward

    def compute(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        returned = plain(*args, **kwargs)
        logits, weights, index = _read(returned)
        new = change(logits.to(wide(logits.dtype)), index, weights).to(weights.dtype)
        if all(value is not index for value in returned):
            return torch.zeros_like(returned[0]).scatter(1, index, new), logits
        return tuple(new if value is weights else value for value in returned)

    return forward(router, compute)


def finished(scope: Scope) -> Callable[[Tensor], Tensor]:
    """How the reference finishes weights (token, choice): made to add up to one where it does so, and scaled."""
    summed, factor = renormalizes(scope), factor_of(scope)
    return lambda weights: (weights / weights.sum(-1, keepdim=True) if summed else weights) * factor


def with_other(scope: Scope, name: str, instead: Callable[..., Any]) -> Change:
    """In the router, the function of this name is `instead(function, args, kwargs)`."""
    router = router_of(scope)
    plain = router.forward

    def compute(*args: Any, **kwargs: Any) -> Any:
        with Swapped(name, instead):
            return plain(*args, **kwargs)

    return forward(router, compute)


class Swapped(TorchFunctionMode):
    """Calls of the function of this name are answered by `instead(call, args, kwargs)`."""

    def __init__(self, name: str, instead: Callable[..., Any]) -> None:
        super().__init__()
        self.name, self.instead = name, instead

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == self.name:
            return self.instead(func, args, kwargs)
        return func(*args, **kwargs)


# -- experts -------------------------------------------------------------------------------------------------


def given_otherwise(scope: Scope, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Change:
    """The experts get `change(index, weights)` of what the router gave them, both (token, choice)."""
    experts = experts_of(scope)
    plain = experts.forward
    return forward(experts, lambda hidden, index, weights: plain(hidden, *change(index, weights)))


def weighed_behind(scope: Scope) -> Change:
    """Each expert's output, not its input, is multiplied with its weight, in a block that weighs before."""
    block = mlp_of(scope)

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        scores, logits = block.router(flat)
        rows = scores.T.reshape(-1, 1)
        routed = block.experts(flat.repeat(scores.shape[1], 1) * (rows != 0)) * rows
        return block.shared_expert(flat) + routed.view(scores.shape[1], *flat.shape).sum(0), logits

    return forward(block, compute)


def weighed_before(scope: Scope) -> Change:
    """Each expert's input, not its output, is multiplied with its weight."""
    experts = experts_of(scope)
    plain = experts.forward

    def compute(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        one = torch.ones_like(weights[:, :1])
        choices = range(index.shape[1])
        parts = [
            plain((hidden * weights[:, i : i + 1]).to(hidden.dtype), index[:, i : i + 1].contiguous(), one)
            for i in choices
        ]
        return torch.stack(parts).sum(0)

    return forward(experts, compute)


def gate_and_up(scope: Scope, read: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Change:
    """Gate and up are `read` out of the fused rows (…, 2 i) of every expert's first weight, and of its bias."""
    experts = experts_of(scope)
    interleaved = is_interleaved(scope)
    transposed = experts.gate_up_proj.shape[-1] == 2 * experts.down_proj.shape[1]  # rows of inputs, not of outputs

    def reordered(both: Tensor) -> Tensor:
        gate, up = read(both)
        # In the places where the reference looks for them.
        return torch.stack((gate, up), -1).flatten(-2) if interleaved else torch.cat((gate, up), -1)

    stacked = experts.gate_up_proj.data
    new = reordered(stacked) if transposed else reordered(stacked.mT).mT.contiguous()
    bias = getattr(experts, "gate_up_proj_bias", None)
    return _both(experts, new, None if bias is None else reordered(bias.data))


@contextmanager
def _both(experts: nn.Module, new: Tensor, bias: Tensor | None) -> Iterator[None]:
    with weight(experts, "gate_up_proj", new):
        if bias is None:
            yield
            return
        with weight(experts, "gate_up_proj_bias", bias):
            yield


def has_gate_and_up(scope: Scope) -> bool:
    """Whether the experts' gate and up are fused in one weight."""
    return isinstance(getattr(experts_of(scope), "gate_up_proj", None), nn.Parameter)


def is_interleaved(scope: Scope) -> bool:
    """Whether gate and up alternate in the fused weight, as gpt-oss has them; elsewhere they are halves."""
    return not getattr(experts_of(scope), "is_concatenated", True)
