"""The MLP: its activation, gate and up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from parity.faults.fault import Change, Fault, Scope, fault
from parity.faults.patches.mlp import gated, is_gated
from parity.faults.patches.modules import ACTIVATION_NAMES, activation_of, forward, mlp_of

# A mixture of experts applies its activation inside, where no site is.
ACT = (*ACTIVATION_NAMES, "experts", "mlp")
_SAME = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


def _activation(scope: Scope, compute: Callable[[Tensor], Tensor]) -> Change:
    return forward(activation_of(scope), compute)


def _kind(scope: Scope) -> str:
    """Which activation the config asks for, under one name for each formula."""
    config = scope.config
    name = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))
    return _SAME.get(name, name)


def _asks_for_other(*kinds: str) -> Callable[[Scope], bool]:
    return lambda scope: activation_of(scope) is not None and _kind(scope) not in kinds


@fault(
    id="act-gelu",
    title="the activation is GELU (erf)",
    sites=ACT,
    fix="use hidden_act of config.json",
    source="Megatron-Bridge#4661",
    applies=_asks_for_other("gelu"),
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
    applies=_asks_for_other("gelu_tanh"),
)
def act_gelu_tanh(scope: Scope) -> Change:
    return _activation(scope, lambda x: F.gelu(x, approximate="tanh"))


@fault(
    id="act-quick-gelu",
    title="the activation is x sigmoid(1.702 x)",
    sites=ACT,
    fix="use hidden_act of config.json",
    applies=_asks_for_other("quick_gelu"),
)
def act_quick_gelu(scope: Scope) -> Change:
    return _activation(scope, lambda x: x * torch.sigmoid(1.702 * x))


@fault(
    id="act-silu",
    title="the activation is SiLU",
    sites=ACT,
    fix="use hidden_act of config.json",
    applies=_asks_for_other("silu"),
)
def act_silu(scope: Scope) -> Change:
    return _activation(scope, F.silu)


@fault(
    id="act-relu",
    title="the activation is ReLU",
    sites=ACT,
    fix="use hidden_act of config.json",
    applies=_asks_for_other("relu"),
)
def act_relu(scope: Scope) -> Change:
    return _activation(scope, F.relu)


def _asks_for(kind: str) -> Callable[[Scope], bool]:
    return lambda scope: activation_of(scope) is not None and _kind(scope) == kind


@fault(
    id="act-sigmoid",
    title="the activation is sigmoid: the factor x of SiLU is forgotten",
    sites=ACT,
    fix="compute x * sigmoid(x)",
    applies=_asks_for("silu"),
)
def act_sigmoid(scope: Scope) -> Change:
    return _activation(scope, torch.sigmoid)


@fault(
    id="act-missing",
    title="there is no activation",
    sites=ACT,
    fix="apply hidden_act of config.json to the gate",
    applies=_asks_for_other("linear"),
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
