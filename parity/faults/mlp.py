"""The MLP: its activation, gate and up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from parity.faults.fault import ANY_ACTIVATION, Change, Fault, Scope, fault
from parity.faults.patches.mlp import computes, gated, is_gated, other_activation
from parity.faults.patches.modules import ACTIVATION_NAMES, activation_of, activations_of, forward, mlp_of, together

# A mixture of experts applies its activation inside, where no site is.
ACT = (*ACTIVATION_NAMES, "experts", "mlp", ANY_ACTIVATION)

_gelu_tanh = partial(F.gelu, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _activation(scope: Scope, compute: Callable[[Tensor], Tensor]) -> Change:
    return together(*(forward(act, compute) for act in activations_of(scope)))


@fault(
    id="act-gelu",
    title="the activation is GELU (erf)",
    sites=ACT,
    fix="use hidden_act of config.json",
    source="Megatron-Bridge#4661",
    applies=other_activation(F.gelu),
)
def act_gelu(scope: Scope) -> Change:
    return _activation(scope, F.gelu)


@fault(
    id="act-gelu-tanh",
    title="the activation is GELU in its tanh approximation",
    sites=ACT,
    fix="use hidden_act of config.json: gelu is the erf form, gelu_pytorch_tanh the approximation",
    source="pocket-tts#278",
    needs="float32 to be told from GELU (erf)",
    applies=other_activation(_gelu_tanh),
)
def act_gelu_tanh(scope: Scope) -> Change:
    return _activation(scope, _gelu_tanh)


@fault(
    id="act-quick-gelu",
    title="the activation is x sigmoid(1.702 x)",
    sites=ACT,
    fix="use hidden_act of config.json",
    applies=other_activation(_quick_gelu),
)
def act_quick_gelu(scope: Scope) -> Change:
    return _activation(scope, _quick_gelu)


@fault(
    id="act-silu",
    title="the activation is SiLU",
    sites=ACT,
    fix="use hidden_act of config.json",
    applies=other_activation(F.silu),
)
def act_silu(scope: Scope) -> Change:
    return _activation(scope, F.silu)


@fault(
    id="act-relu",
    title="the activation is ReLU",
    sites=ACT,
    fix="use hidden_act of config.json",
    applies=other_activation(F.relu),
)
def act_relu(scope: Scope) -> Change:
    return _activation(scope, F.relu)


@fault(
    id="act-sigmoid",
    title="the activation is sigmoid: the factor x of SiLU is forgotten",
    sites=ACT,
    fix="compute x * sigmoid(x)",
    applies=lambda s: any(computes(act, F.silu) for act in activations_of(s)),
)
def act_sigmoid(scope: Scope) -> Change:
    return _activation(scope, torch.sigmoid)


@fault(
    id="act-missing",
    title="there is no activation",
    sites=ACT,
    fix="apply hidden_act of config.json to the gate",
    applies=other_activation(lambda x: x),
)
def act_missing(scope: Scope) -> Change:
    return _activation(scope, lambda x: x.clone())


# -- gate and up ---------------------------------------------------------------------------------------------


@fault(
    id="act-on-up",
    title="the activation is applied to up and multiplied with gate; in the reference to gate, multiplied with up",
    sites=(*ACTIVATION_NAMES, "product"),
    fix="compute act(gate) * up",
    applies=is_gated,
)
def act_on_up(scope: Scope) -> Change:
    return gated(scope, lambda act, gate, up: gate * act(up))


@fault(
    id="mlp-no-up",
    title="up is never multiplied in",
    sites=("product",),
    fix="compute act(gate) * up",
    applies=is_gated,
)
def mlp_no_up(scope: Scope) -> Change:
    return gated(scope, lambda act, gate, up: act(gate).clone())


@fault(
    id="mlp-sum",
    title="the activated gate and up are added; the reference multiplies them",
    sites=("product",),
    fix="compute act(gate) * up",
    applies=is_gated,
)
def mlp_sum(scope: Scope) -> Change:
    return gated(scope, lambda act, gate, up: act(gate) + up)


@fault(
    id="gate-up-interleaved",
    title="the fused projection is split into even and odd numbers; the reference splits it into halves",
    sites=(*ACTIVATION_NAMES, "product"),
    fix="take the first half of gate_up_proj as gate, the second as up",
    applies=lambda s: is_gated(s) and hasattr(mlp_of(s), "gate_up_proj"),
)
def gate_up_interleaved(scope: Scope) -> Change:
    """The even numbers of the fused projection are taken for gate, the odd ones for up."""
    mlp, act = mlp_of(scope), activation_of(scope)

    def compute(x: Tensor) -> Tensor:
        both = mlp.gate_up_proj(x)
        out: Tensor = mlp.down_proj(act(both[..., 0::2]) * both[..., 1::2])
        return out

    return forward(mlp, compute)


FAULTS: tuple[Fault, ...] = (
    act_gelu,
    act_gelu_tanh,
    act_quick_gelu,
    act_silu,
    act_relu,
    act_sigmoid,
    act_missing,
    act_on_up,
    mlp_no_up,
    mlp_sum,
    gate_up_interleaved,
)
