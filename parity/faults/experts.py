"""The experts of a mixture, and the experts that all tokens share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import Change, Fault, Scope, fault
from parity.faults.patches.modules import forward, mlp_of
from parity.faults.patches.router import (
    BLOCK,
    Swapped,
    experts_of,
    gate_and_up,
    given_otherwise,
    has_gate_and_up,
    is_interleaved,
    takes_choice,
    weighed_before,
    weighed_behind,
    weighs_before,
)
from parity.record.experts import experts_in


@fault(
    id="moe-weights-ignored",
    title="the outputs of the chosen experts are added without their weights",
    sites=BLOCK,
    fix="multiply each expert's output by its weight",
    applies=takes_choice,
)
def moe_weights_ignored(scope: Scope) -> Change:
    return given_otherwise(scope, lambda index, weights: (index, torch.ones_like(weights)))


@fault(
    id="moe-weighted-twice",
    title="the outputs of the chosen experts are multiplied by their weights twice",
    sites=BLOCK,
    fix="multiply each expert's output by its weight once",
    source="MaxText 014fc4985",
    applies=takes_choice,
)
def moe_weighted_twice(scope: Scope) -> Change:
    return given_otherwise(scope, lambda index, weights: (index, weights * weights))


@fault(
    id="moe-weighted-input",
    title="the input of each expert is multiplied by its weight; in the reference the output",
    sites=BLOCK,
    fix="multiply what the expert returns",
    source="llm-compressor#1907",
    applies=takes_choice,
)
def moe_weighted_input(scope: Scope) -> Change:
    return weighed_before(scope)


@fault(
    id="moe-weighted-output",
    title="the output of each expert is multiplied by its weight; in the reference the input",
    sites=("experts.act_fn.input", "experts.act_fn", *BLOCK),
    fix="multiply what goes into the expert",
    applies=weighs_before,
)
def moe_weighted_output(scope: Scope) -> Change:
    return weighed_behind(scope)


@fault(
    id="moe-experts-as-text",
    title="experts are stacked in the order of their names as text (0, 1, 10, 11, 2, …), not of their numbers",
    sites=BLOCK,
    fix="sort experts by their numbers when stacking their weights",
    applies=lambda s: takes_choice(s) and (experts_in(experts_of(s)) or 0) > 10,
)
def moe_experts_as_text(scope: Scope) -> Change:
    order = sorted(range(experts_in(experts_of(scope)) or 0), key=str)
    return given_otherwise(scope, lambda index, weights: (torch.tensor(order, device=index.device)[index], weights))


def _halves(both: Tensor) -> tuple[Tensor, Tensor]:
    first, second = both.chunk(2, -1)
    return first, second


def _alternating(both: Tensor) -> tuple[Tensor, Tensor]:
    return both[..., 0::2], both[..., 1::2]


@fault(
    id="moe-gate-up-halves",
    title="the experts' gate and up are taken as halves of their fused weight; in the reference they alternate",
    sites=BLOCK,
    fix="take the even rows of gate_up_proj as gate, the odd ones as up",
    source="vllm#29273",
    applies=lambda s: has_gate_and_up(s) and is_interleaved(s),
)
def moe_gate_up_halves(scope: Scope) -> Change:
    return gate_and_up(scope, _halves)


@fault(
    id="moe-gate-up-alternating",
    title="the experts' gate and up are taken to alternate in their fused weight; in the reference they are halves",
    sites=BLOCK,
    fix="take the first half of gate_up_proj as gate, the second as up",
    applies=lambda s: has_gate_and_up(s) and not is_interleaved(s),
)
def moe_gate_up_alternating(scope: Scope) -> Change:
    return gate_and_up(scope, _alternating)


@fault(
    id="moe-gate-up-swapped",
    title="the experts' gate is taken for up, and up for gate",
    sites=BLOCK,
    fix="apply the activation to gate (w1), and multiply by up (w3)",
    applies=has_gate_and_up,
)
def moe_gate_up_swapped(scope: Scope) -> Change:
    def swapped(both: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = _alternating(both) if is_interleaved(scope) else _halves(both)
        return up, gate

    return gate_and_up(scope, swapped)


# -- shared experts ------------------------------------------------------------------------------------------


def _shared(scope: Scope) -> Any:
    mlp = mlp_of(scope)
    return next(
        (m for name in ("shared_expert", "shared_experts") if (m := getattr(mlp, name, None)) is not None), None
    )


@fault(
    id="moe-shared-ungated",
    title="the shared expert's output is added as it is; the reference multiplies it by the sigmoid of its gate",
    sites=("mlp", "feed_forward"),
    fix="multiply by sigmoid(shared_expert_gate(x))",
    source="torchtitan#36",
    applies=lambda s: hasattr(mlp_of(s), "shared_expert_gate"),
)
def moe_shared_ungated(scope: Scope) -> Change:
    mlp = mlp_of(scope)
    plain = mlp.forward

    def open_gate(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return torch.ones_like(args[0]) if args[0].shape[-1] == 1 else func(*args, **kwargs)

    def compute(*args: Any, **kwargs: Any) -> Any:
        with Swapped("sigmoid", open_gate):
            return plain(*args, **kwargs)

    return forward(mlp, compute)


@fault(
    id="moe-shared-missing",
    title="the shared experts are left out",
    sites=("mlp", "feed_forward"),
    fix="add the output of the shared experts to that of the chosen ones",
    applies=lambda s: _shared(s) is not None,
)
def moe_shared_missing(scope: Scope) -> Change:
    return forward(_shared(scope), torch.zeros_like)


FAULTS: tuple[Fault, ...] = (
    moe_weights_ignored,
    moe_weighted_twice,
    moe_weighted_input,
    moe_weighted_output,
    moe_experts_as_text,
    moe_gate_up_halves,
    moe_gate_up_alternating,
    moe_gate_up_swapped,
    moe_shared_ungated,
    moe_shared_missing,
)
