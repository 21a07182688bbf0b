"""Activations, and the gated MLP, down(act(gate) * up): how they are changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parity.faults.fault import Change, Scope
from parity.faults.patches.modules import activation_of, activations_of, forward, mlp_of

# GELU by erf and by tanh are 5e-4 apart.
_SAME = 1e-5


def computes(act: nn.Module, formula: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation is this formula, from and to any shape: tried on some numbers."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    try:
        with torch.no_grad():
            return torch.allclose(act.forward(x), formula(x), rtol=0, atol=_SAME)
    except (RuntimeError, TypeError):
        # It has parameters, in another dtype or on another device: no formula has.
        return False


def other_activation(formula: Callable[[Tensor], Tensor]) -> Callable[[Scope], bool]:
    """Whether the layer has an activation that is not this formula, from and to any shape."""
    return lambda scope: any(not computes(act, formula) for act in activations_of(scope))


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
