"""The MLP: its activation, gate and up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from parity.faults.fault import Fault, Scope, attribute
from parity.faults.parts import ACTIVATION_NAMES, activation_of, forward, mlp_of, plain

# A mixture of experts applies its activation inside, where no site is.
ACT = (*ACTIVATION_NAMES, "experts", "mlp")
Change = AbstractContextManager[None]

_SAME = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


def _kind(scope: Scope) -> str:
    """Which activation the config asks for, under one name for each formula."""
    config = scope.config
    name = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))
    return _SAME.get(name, name)


def _activation(compute: Callable[[Tensor], Tensor]) -> Callable[[Scope], Change]:
    return lambda scope: forward(activation_of(scope), compute)


def _asks_for_other(*kinds: str) -> Callable[[Scope], bool]:
    return lambda scope: activation_of(scope) is not None and _kind(scope) not in kinds


def _asks_for(kind: str) -> Callable[[Scope], bool]:
    return lambda scope: activation_of(scope) is not None and _kind(scope) == kind


# -- gate and up ---------------------------------------------------------------------------------------------


def is_gated(scope: Scope) -> bool:
    """Whether the MLP is down(act(gate) * up)."""
    mlp = mlp_of(scope)
    has_gate = hasattr(mlp, "gate_up_proj") or (hasattr(mlp, "gate_proj") and hasattr(mlp, "up_proj"))
    return has_gate and hasattr(mlp, "down_proj") and activation_of(scope) is not None


def gated(product: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Scope], Change]:
    """The MLP is down(product(activation, gate, up))."""

    def change(scope: Scope) -> Change:
        mlp, act = mlp_of(scope), activation_of(scope)

        def compute(x: Tensor) -> Tensor:
            fused = hasattr(mlp, "gate_up_proj")
            gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1) if fused else (mlp.gate_proj(x), mlp.up_proj(x))
            out: Tensor = mlp.down_proj(product(act, gate, up))
            return out

        return forward(mlp, compute)

    return change


def _interleaved(scope: Scope) -> Change:
    """The even numbers of the fused projection are taken for gate, the odd ones for up."""
    mlp, act = mlp_of(scope), activation_of(scope)

    def compute(x: Tensor) -> Tensor:
        both = mlp.gate_up_proj(x)
        out: Tensor = mlp.down_proj(act(both[..., 0::2]) * both[..., 1::2])
        return out

    return forward(mlp, compute)


# -- mixture of experts ----------------------------------------------------------------------------------------


def _router(scope: Scope) -> Any:
    mlp = mlp_of(scope)
    found = (m for m in mlp.modules() if isinstance(getattr(m, "norm_topk_prob", None), bool)) if mlp else iter(())
    return next(found, None)


def _renormalized(on: bool) -> tuple[Callable[[Scope], Change], Callable[[Scope], bool]]:
    return (
        lambda scope: attribute(_router(scope), "norm_topk_prob", on),
        lambda scope: (router := _router(scope)) is not None and router.norm_topk_prob is not on,
    )


_WITH, _WITHOUT = _renormalized(on=True), _renormalized(on=False)

FAULTS: tuple[Fault, ...] = (
    Fault(
        "act-gelu",
        "the activation is GELU (erf)",
        ACT,
        "use hidden_act of config.json",
        "Megatron-Bridge#4661",
        "",
        plain(_activation(F.gelu)),
        _asks_for_other("gelu"),
    ),
    Fault(
        "act-gelu-tanh",
        "the activation is GELU in its tanh approximation",
        ACT,
        "use hidden_act of config.json: gelu is the erf form, gelu_pytorch_tanh the approximation",
        "pocket-tts#278",
        "float32 to be told from GELU (erf)",
        plain(_activation(lambda x: F.gelu(x, approximate="tanh"))),
        _asks_for_other("gelu_tanh"),
    ),
    Fault(
        "act-quick-gelu",
        "the activation is x sigmoid(1.702 x)",
        ACT,
        "use hidden_act of config.json",
        "",
        "",
        plain(_activation(lambda x: x * torch.sigmoid(1.702 * x))),
        _asks_for_other("quick_gelu"),
    ),
    Fault(
        "act-silu",
        "the activation is SiLU",
        ACT,
        "use hidden_act of config.json",
        "",
        "",
        plain(_activation(F.silu)),
        _asks_for_other("silu"),
    ),
    Fault(
        "act-relu",
        "the activation is ReLU",
        ACT,
        "use hidden_act of config.json",
        "",
        "",
        plain(_activation(F.relu)),
        _asks_for_other("relu"),
    ),
    Fault(
        "act-sigmoid",
        "the activation is sigmoid: the factor x of SiLU is forgotten",
        ACT,
        "compute x * sigmoid(x)",
        "",
        "",
        plain(_activation(torch.sigmoid)),
        _asks_for("silu"),
    ),
    Fault(
        "act-missing",
        "there is no activation",
        ACT,
        "apply hidden_act of config.json to the gate",
        "",
        "",
        plain(_activation(lambda x: x.clone())),
        _asks_for_other("linear"),
    ),
    Fault(
        "act-on-up",
        "the activation is applied to up and multiplied with gate; in the reference to gate, multiplied with up",
        (*ACTIVATION_NAMES, "product"),
        "compute act(gate) * up",
        "",
        "",
        plain(gated(lambda act, gate, up: gate * act(up))),
        is_gated,
    ),
    Fault(
        "mlp-no-up",
        "up is never multiplied in",
        ("product",),
        "compute act(gate) * up",
        "",
        "",
        plain(gated(lambda act, gate, up: act(gate).clone())),
        is_gated,
    ),
    Fault(
        "mlp-sum",
        "the activated gate and up are added; the reference multiplies them",
        ("product",),
        "compute act(gate) * up",
        "",
        "",
        plain(gated(lambda act, gate, up: act(gate) + up)),
        is_gated,
    ),
    Fault(
        "gate-up-interleaved",
        "the fused projection is split into even and odd numbers; the reference splits it into halves",
        (*ACTIVATION_NAMES, "product"),
        "take the first half of gate_up_proj as gate, the second as up",
        "",
        "",
        plain(_interleaved),
        lambda s: is_gated(s) and hasattr(mlp_of(s), "gate_up_proj"),
    ),
    Fault(
        "moe-not-renormalized",
        "the chosen experts' weights are used as they are; the reference makes them add up to one",
        ("experts", "mlp"),
        "divide the top-k weights by their sum where config.json says norm_topk_prob",
        "",
        "",
        plain(_WITHOUT[0]),
        _WITHOUT[1],
    ),
    Fault(
        "moe-renormalized",
        "the chosen experts' weights are made to add up to one; the reference uses them as they are",
        ("experts", "mlp"),
        "leave the top-k weights as they are where config.json says norm_topk_prob is false",
        "",
        "",
        plain(_WITH[0]),
        _WITH[1],
    ),
)
