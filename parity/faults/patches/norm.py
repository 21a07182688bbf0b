"""Norms: which there are, their formula step by step, and the ways of changing them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parity.faults.fault import ANY_NORM, Change, Scope, weight
from parity.faults.patches.modules import elsewhere, eps_name, forward, head_dim_of, kv_heads_of, norms_of, together
from parity.faults.patches.numbers import wide

QK_NORMS = ("q_norm", "k_norm")
IN_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
FINAL = ("norm", "final_layernorm", "final_layer_norm")
STREAM = (*IN_LAYER, *FINAL)
NORMS = (*IN_LAYER, *QK_NORMS, *FINAL, ANY_NORM)


# -- which norms ---------------------------------------------------------------------------------------------


def eps_of(norm: nn.Module) -> float:
    """The eps of a norm."""
    return float(getattr(norm, eps_name(norm) or "eps"))


def is_centred(norm: Any) -> bool:
    """Whether a norm subtracts the mean (LayerNorm), to judge by its class, its name or its having a bias."""
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


def rms_norms(scope: Scope, names: tuple[str, ...] = NORMS) -> dict[str, Any]:
    """The RMS norms of the scope whose names end so; all of them where ANY_NORM is among the names."""
    return {
        name: norm
        for name, norm in norms_of(scope).items()
        if (ANY_NORM in names or name.split(".")[-1] in names) and not is_centred(norm) and _has_weight(norm)
    }


def _has_weight(norm: Any) -> bool:
    return getattr(norm, "weight", None) is not None


def has(names: tuple[str, ...] = NORMS, test: Callable[[Any], bool] = lambda _norm: True) -> Callable[[Scope], bool]:
    """Whether the scope has an RMS norm of these names that passes a test."""
    return lambda scope: any(test(norm) for norm in rms_norms(scope, names).values())


def heads_of(scope: Scope, name: str) -> int:
    """Heads that the norm of this name sees."""
    return int(scope.config.num_attention_heads) if name.endswith("q_norm") else kv_heads_of(scope)


def head_axis(x: Tensor, heads: int) -> int:
    """Where the heads of x (b, t, h, d) or (b, h, t, d) are."""
    if x.shape[1] == x.shape[2] == heads:
        # A view of a projection has its heads behind the tokens; transposed, it is no longer contiguous.
        return 2 if x.is_contiguous() else 1
    return 2 if x.shape[2] == heads else 1


def per_head_norms(scope: Scope) -> dict[str, Any]:
    """QK-norms with one weight for each number of a head."""
    return {n: m for n, m in rms_norms(scope, QK_NORMS).items() if m.weight.numel() == head_dim_of(scope)}


def each(scope: Scope, names: tuple[str, ...], compute: Callable[[Any, Tensor], Tensor]) -> Change:
    """All RMS norms of these names compute `compute(norm, x)`, on x (…, d) and to its shape."""
    return together(*(forward(n, partial(compute, n)) for n in rms_norms(scope, names).values()))


# -- the norm, step by step ----------------------------------------------------------------------------------


def widened(x: Tensor) -> Tensor:
    """The input, of any shape, in the dtype that careful code computes in."""
    return x.to(wide(x.dtype))


def mean_square(x: Tensor) -> Tensor:
    """Of x (…, d) over its last axis, which stays: (…, 1)."""
    return x.pow(2).mean(-1, keepdim=True)


def normalized(x: Tensor, eps: float) -> Tensor:
    """x (…, d) over its root mean square, eps added to the mean: x / sqrt(mean(x²) + eps)."""
    return x * torch.rsqrt(mean_square(x) + eps)


def weighted(norm: Any, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """The last step, of unit (…, d) to its shape, in the order in which the reference rounds."""
    own: Tensor = norm.weight
    return (unit * (1.0 + own.to(unit.dtype))).to(dtype) if adds_one(norm) else own * unit.to(dtype)


def left_out(_norm: Any, x: Tensor) -> Tensor:
    """No norm at all: x (…, d) again."""
    return x.clone()


# -- weights from elsewhere ------------------------------------------------------------------------------------


def from_layer(scope: Scope, step: int) -> Change:
    """The weights of the layer `step` layers on."""
    found = {n: (norm, elsewhere(scope, f"{n}.weight", step)) for n, norm in norms_of(scope).items()}
    pairs = [(norm, w) for norm, w in found.values() if w is not None and w.shape == norm.weight.shape]
    return together(*(weight(norm, "weight", w.to(norm.weight)) for norm, w in pairs))


def has_layer(step: int) -> Callable[[Scope], bool]:
    """Whether the checkpoint has this layer's norms `step` layers on."""
    return lambda scope: any(elsewhere(scope, f"{n}.weight", step) is not None for n in norms_of(scope))


def exchanged(scope: Scope, one: str, other: str) -> Change:
    """Two norms of the layer have each other's weights."""
    a, b = _pair(scope, one, other)
    return together(weight(a, "weight", b.weight.data), weight(b, "weight", a.weight.data))


def _pair(scope: Scope, one: str, other: str) -> list[Any]:
    last = {name.split(".")[-1]: norm for name, norm in norms_of(scope).items()}
    return [last[name] for name in (one, other) if name in last]


def exchangeable(one: str, other: str) -> Callable[[Scope], bool]:
    """Whether the layer has both norms, of the same size."""

    def test(scope: Scope) -> bool:
        pair = _pair(scope, one, other)
        return len(pair) == 2 and pair[0].weight.shape == pair[1].weight.shape

    return test
