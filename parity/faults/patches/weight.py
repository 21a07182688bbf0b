"""The ways in which a weight can be wrong: its order, its place, its numbers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from parity.faults.fault import Change, Scope, weight
from parity.faults.patches.modules import (
    HEAD_SITES,
    elsewhere,
    head_dim_of,
    kv_heads_of,
    linear,
    linears_of,
    together,
)
from parity.faults.patches.numbers import as_written

_QKV = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
_MLP = ("gate_proj", "up_proj", "gate_up_proj", "down_proj", "dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2")
LAYER = (*_QKV, "o_proj", "dense", *_MLP)
LINEARS = (*LAYER, *HEAD_SITES)
QK_PROJECTIONS = ("q_proj", "k_proj")


def each(scope: Scope, make: Callable[[Tensor], Tensor]) -> Change:
    """Every linear weight (o, i) becomes `make(weight)`, of the same shape."""
    with as_written():
        return together(*(weight(m, "weight", make(m.weight.data).to(m.weight)) for m in linears_of(scope).values()))


def has_linears(scope: Scope) -> bool:
    """Whether there is anything to change."""
    return bool(linears_of(scope))


# -- order ---------------------------------------------------------------------------------------------------


def rows_permuted(scope: Scope, heads: dict[str, int], into_pairs: bool) -> Change:
    """Rows of each head of a projection (h * d, i) permuted: halves next to each other, or neighbours into halves.

    `heads` of each projection by its name; those that the layer lacks are passed over.
    """

    def permuted(x: Tensor, count: int) -> Tensor:
        shape = (count, 2, -1, *x.shape[1:]) if into_pairs else (count, x.shape[0] // count // 2, 2, *x.shape[1:])
        return x.reshape(shape).transpose(1, 2).reshape(x.shape)

    changes = []
    for name, count in heads.items():
        module = linear(scope, name)
        if module is not None:
            for parameter in ("weight", "bias") if module.bias is not None else ("weight",):
                changes.append(weight(module, parameter, permuted(getattr(module, parameter).data, count)))
    return together(*changes)


def heads_by_projection(scope: Scope) -> dict[str, int]:
    """How many heads q_proj and k_proj have."""
    return {"q_proj": int(scope.config.num_attention_heads), "k_proj": kv_heads_of(scope)}


def has_pairs(scope: Scope) -> bool:
    """Whether q_proj and k_proj have rows that RoPE pairs in two ways."""
    q, k = linear(scope, "q_proj"), linear(scope, "k_proj")
    return q is not None and k is not None and head_dim_of(scope) % 2 == 0 and head_dim_of(scope) > 2


def splits_by_query_heads(scope: Scope) -> bool:
    """Whether k_proj could be taken for one of as many heads as q_proj has."""
    k = linear(scope, "k_proj")
    heads = scope.config.num_attention_heads
    return k is not None and kv_heads_of(scope) != heads and k.weight.shape[0] % (2 * heads) == 0


# -- place ---------------------------------------------------------------------------------------------------


def exchanged(scope: Scope, one: str, other: str) -> Change:
    """Two projections of the same shape have each other's weights."""
    a, b = linear(scope, one), linear(scope, other)
    assert a is not None, "unreachable because the fault applies only where there are both"
    assert b is not None, "unreachable for the same reason"
    return together(weight(a, "weight", b.weight.data), weight(b, "weight", a.weight.data))


def exchangeable(one: str, other: str) -> Callable[[Scope], bool]:
    """Whether the layer has both projections, of the same shape."""

    def test(scope: Scope) -> bool:
        a, b = linear(scope, one), linear(scope, other)
        return a is not None and b is not None and a.weight.shape == b.weight.shape

    return test


def from_layer(scope: Scope, step: int) -> Change:
    """Linear weights of the layer `step` layers on."""
    found = [(m, elsewhere(scope, f"{name}.weight", step)) for name, m in linears_of(scope).items()]
    same = [(m, w) for m, w in found if w is not None and w.shape == m.weight.shape]
    return together(*(weight(m, "weight", w.to(m.weight)) for m, w in same))


def has_layer(step: int) -> Callable[[Scope], bool]:
    """Whether the checkpoint has this layer's linear weights `step` layers on."""
    return lambda scope: any(elsewhere(scope, f"{name}.weight", step) is not None for name in linears_of(scope))
