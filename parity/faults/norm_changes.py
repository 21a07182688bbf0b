"""Norms: which there are, their formula step by step, and the ways of changing them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parity.faults.fault import Scope, weight
from parity.faults.parts import elsewhere, eps_name, forward, norms_of, together, wide

QK = ("q_norm", "k_norm")
IN_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
FINAL = ("norm", "final_layernorm", "final_layer_norm")
STREAM = (*IN_LAYER, *FINAL)
ALL = (*IN_LAYER, *QK, *FINAL)
Change = AbstractContextManager[None]


# -- which norms ---------------------------------------------------------------------------------------------


def eps_of(norm: nn.Module) -> float:
    """The eps of a norm."""
    return float(getattr(norm, eps_name(norm) or "eps"))


def is_centred(norm: Any) -> bool:
    """Whether a norm subtracts the mean (LayerNorm): tried on a vector that has nothing but a mean."""
    if isinstance(norm, nn.LayerNorm) or getattr(norm, "bias", None) is not None:
        return True
    return "LayerNorm" in type(norm).__name__ and "RMS" not in type(norm).__name__


def adds_one(norm: Any) -> bool:
    """Whether a norm multiplies by 1 + weight: tried with a weight of zero."""
    own = getattr(norm, "weight", None)
    if own is None or own.is_meta or is_centred(norm):
        return False
    with weight(norm, "weight", torch.zeros_like(own)), torch.no_grad():
        return bool(type(norm).forward(norm, torch.ones_like(own)[None]).any())


def rms_norms(scope: Scope, names: tuple[str, ...] = ALL) -> dict[str, Any]:
    """The RMS norms of the scope whose names end so."""
    return {
        name: norm
        for name, norm in norms_of(scope).items()
        if name.split(".")[-1] in names and not is_centred(norm) and getattr(norm, "weight", None) is not None
    }


def has(names: tuple[str, ...] = ALL, test: Callable[[Any], bool] = lambda _norm: True) -> Callable[[Scope], bool]:
    """Whether the scope has an RMS norm of these names that passes a test."""
    return lambda scope: any(test(norm) for norm in rms_norms(scope, names).values())


def each(names: tuple[str, ...], compute: Callable[[Any, Tensor], Tensor]) -> Callable[[Scope], Change]:
    """All RMS norms of these names compute `compute(norm, x)`."""
    return lambda scope: together(*(forward(n, partial(compute, n)) for n in rms_norms(scope, names).values()))


# -- the norm, step by step ----------------------------------------------------------------------------------


def widened(x: Tensor) -> Tensor:
    """The input in the dtype that careful code computes in."""
    return x.to(wide(x.dtype))


def mean_square(x: Tensor) -> Tensor:
    """Over the last axis, which stays."""
    return x.pow(2).mean(-1, keepdim=True)


def normalized(x: Tensor, eps: float) -> Tensor:
    """The input over its root mean square."""
    return x * torch.rsqrt(mean_square(x) + eps)


def weighted(norm: Any, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """The last step, in the order in which the reference rounds."""
    own: Tensor = norm.weight
    return (unit * (1.0 + own.to(unit.dtype))).to(dtype) if adds_one(norm) else own * unit.to(dtype)


def left_out(_norm: Any, x: Tensor) -> Tensor:
    """No norm at all."""
    return x.clone()


# -- weights from elsewhere ------------------------------------------------------------------------------------


def from_layer(step: int) -> Callable[[Scope], Change]:
    """The weights of the layer `step` layers on."""

    def change(scope: Scope) -> Change:
        found = {n: (norm, elsewhere(scope, f"{n}.weight", step)) for n, norm in norms_of(scope).items()}
        pairs = [(norm, w) for norm, w in found.values() if w is not None and w.shape == norm.weight.shape]
        return together(*(weight(norm, "weight", w.to(norm.weight)) for norm, w in pairs))

    return change


def has_layer(step: int) -> Callable[[Scope], bool]:
    """Whether the checkpoint has this layer's norms `step` layers on."""
    return lambda scope: any(elsewhere(scope, f"{n}.weight", step) is not None for n in norms_of(scope))


def exchanged(one: str, other: str) -> Callable[[Scope], Change]:
    """Two norms of the layer have each other's weights."""

    def change(scope: Scope) -> Change:
        a, b = _pair(scope, one, other)
        return together(weight(a, "weight", b.weight.data), weight(b, "weight", a.weight.data))

    return change


def _pair(scope: Scope, one: str, other: str) -> list[Any]:
    last = {name.split(".")[-1]: norm for name, norm in norms_of(scope).items()}
    return [last[name] for name in (one, other) if name in last]


def exchangeable(one: str, other: str) -> Callable[[Scope], bool]:
    """Whether the layer has both norms, of the same size."""

    def test(scope: Scope) -> bool:
        pair = _pair(scope, one, other)
        return len(pair) == 2 and pair[0].weight.shape == pair[1].weight.shape

    return test
