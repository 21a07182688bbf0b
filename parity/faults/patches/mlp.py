"""The gated MLP, down(act(gate) * up), and how its product is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from parity.faults.fault import Change, Scope
from parity.faults.patches.modules import activation_of, forward, mlp_of


def is_gated(scope: Scope) -> bool:
    """Whether the MLP is down(act(gate) * up)."""
    mlp = mlp_of(scope)
    has_gate = hasattr(mlp, "gate_up_proj") or (hasattr(mlp, "gate_proj") and hasattr(mlp, "up_proj"))
    return has_gate and hasattr(mlp, "down_proj") and activation_of(scope) is not None


def gated(scope: Scope, product: Callable[[Any, Tensor, Tensor], Tensor]) -> Change:
    """The MLP is down(product(activation, gate, up)); gate, up and the product are (b, t, i)."""
    mlp, act = mlp_of(scope), activation_of(scope)

    def compute(x: Tensor) -> Tensor:
        fused = hasattr(mlp, "gate_up_proj")
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1) if fused else (mlp.gate_proj(x), mlp.up_proj(x))
        out: Tensor = mlp.down_proj(product(act, gate, up))
        return out

    return forward(mlp, compute)
