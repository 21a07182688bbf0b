"""The ways in which a weight can be wrong: its order, its place, its numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from parity.faults.fault import Scope, weight
from parity.faults.parts import (
    as_written,
    elsewhere,
    forward,
    head_dim_of,
    kv_heads_of,
    linear,
    linears_of,
    together,
)

Change = AbstractContextManager[None]


def each(make: Callable[[Tensor], Tensor], names: tuple[str, ...] = ()) -> Callable[[Scope], Change]:
    """Every linear weight of these names (all, if none are given) becomes `make(weight)`."""

    def change(scope: Scope) -> Change:
        chosen = [m for n, m in linears_of(scope).items() if not names or n.split(".")[-1] in names]
        with as_written():
            return together(*(weight(m, "weight", make(m.weight.data).to(m.weight)) for m in chosen))

    return change


def has_linears(scope: Scope) -> bool:
    """Whether there is anything to change."""
    return bool(linears_of(scope))


# -- order ---------------------------------------------------------------------------------------------------


def column_major(w: Tensor) -> Tensor:
    """The numbers in memory taken column by column: the transpose, where the weight is square."""
    return w.reshape(w.shape[::-1]).t().contiguous()


def rows_permuted(
    heads: Callable[[Scope, str], int], into_pairs: bool, names: tuple[str, ...]
) -> Callable[[Scope], Change]:
    """Rows of each head of a projection permuted: halves next to each other, or neighbours into halves."""

    def permuted(x: Tensor, count: int) -> Tensor:
        shape = (count, 2, -1, *x.shape[1:]) if into_pairs else (count, x.shape[0] // count // 2, 2, *x.shape[1:])
        return x.reshape(shape).transpose(1, 2).reshape(x.shape)

    def change(scope: Scope) -> Change:
        changes = []
        for name in names:
            module = linear(scope, name)
            if module is not None:
                for part in ("weight", "bias") if module.bias is not None else ("weight",):
                    changes.append(weight(module, part, permuted(getattr(module, part).data, heads(scope, name))))
        return together(*changes)

    return change


def row_major(w: Tensor) -> Tensor:
    """The numbers of the transpose in the shape of the weight."""
    return w.t().reshape(w.shape)


def own_heads(scope: Scope, name: str) -> int:
    """Heads of q_proj or k_proj."""
    return int(scope.config.num_attention_heads) if name == "q_proj" else kv_heads_of(scope)


def query_heads(scope: Scope, _name: str) -> int:
    """Heads of q_proj, whatever is asked for."""
    return int(scope.config.num_attention_heads)


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


def exchanged(one: str, other: str) -> tuple[Callable[[Scope], Change], Callable[[Scope], bool]]:
    """Two projections of the same shape have each other's weights; and whether there are such."""

    def change(scope: Scope) -> Change:
        a, b = linear(scope, one), linear(scope, other)
        assert a is not None, "unreachable because the fault applies only where there are both"
        assert b is not None, "unreachable for the same reason"
        return together(weight(a, "weight", b.weight.data), weight(b, "weight", a.weight.data))

    def applies(scope: Scope) -> bool:
        a, b = linear(scope, one), linear(scope, other)
        return a is not None and b is not None and a.weight.shape == b.weight.shape

    return change, applies


def from_layer(step: int) -> Callable[[Scope], Change]:
    """Linear weights of the layer `step` layers on."""

    def change(scope: Scope) -> Change:
        found = [(m, elsewhere(scope, f"{name}.weight", step)) for name, m in linears_of(scope).items()]
        same = [(m, w) for m, w in found if w is not None and w.shape == m.weight.shape]
        return together(*(weight(m, "weight", w.to(m.weight)) for m, w in same))

    return change


def has_layer(step: int) -> Callable[[Scope], bool]:
    """Whether the checkpoint has this layer's linear weights `step` layers on."""
    return lambda scope: any(elsewhere(scope, f"{name}.weight", step) is not None for name in linears_of(scope))


# -- numbers -------------------------------------------------------------------------------------------------


def _storage(w: Tensor) -> torch.dtype:
    """The narrowest dtype that holds a weight exactly: what the checkpoint stores it in."""
    return next((d for d in (torch.bfloat16, torch.float16) if torch.equal(w.to(d).to(w.dtype), w)), torch.float32)


def as_float16(w: Tensor) -> Tensor:
    """The bits of bfloat16 numbers taken for float16."""
    return w.to(torch.bfloat16).contiguous().view(torch.float16)


def bytes_swapped(w: Tensor) -> Tensor:
    """The bytes of each stored number in reverse."""
    stored = w.to(_storage(w)).contiguous()
    size = stored.element_size()
    swapped = stored.view(torch.uint8).reshape(*stored.shape, size).flip(-1).contiguous()
    return swapped.view(stored.dtype).reshape(w.shape)


def int8_rows(w: Tensor) -> Tensor:
    """Rounded to whole steps, 127 of them up to the largest number of each row."""
    # In float32 as in the wild: where a weight lies halfway, the rounding of the quotient decides.
    w = w.float()
    step = w.abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, (w / step).round() * step, w)


def in_blocks(levels: int) -> Callable[[Tensor], Tensor]:
    """As GGUF: blocks of 32 along a row, each with a step of its own, kept in float16."""

    def make(w: Tensor) -> Tensor:
        blocks = w.float().reshape(w.shape[0], -1, 32)
        step = (blocks.abs().amax(-1, keepdim=True) / levels).to(torch.float16).float()
        return torch.where(step > 0, (blocks / step).round() * step, blocks).flatten(-2)

    return make


def fp8(w: Tensor) -> Tensor:
    """float8 e4m3 with one step for each row, as most 8-bit checkpoints have it."""
    w = w.float()
    step = w.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
    return (w / step).to(torch.float8_e4m3fn).float() * step


def fits_blocks(scope: Scope) -> bool:
    """Whether every row is a number of whole blocks."""
    return has_linears(scope) and all(m.weight.shape[-1] % 32 == 0 for m in linears_of(scope).values())


def is_finer_than(dtype: torch.dtype) -> Callable[[Scope], bool]:
    """Whether the checkpoint holds numbers that `dtype` does not."""

    def test(scope: Scope) -> bool:
        with as_written():
            return any(_storage(m.weight.data) != dtype for m in linears_of(scope).values())

    return test


# -- biases --------------------------------------------------------------------------------------------------


def biases(change: Callable[[Any, Tensor], Tensor]) -> Callable[[Scope], Change]:
    """Linear modules with a bias compute `change(module, x)`."""

    def of(module: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: change(module, x)

    return lambda scope: together(*(forward(m, of(m)) for m in linears_of(scope).values() if m.bias is not None))


def has_bias(scope: Scope) -> bool:
    """Whether any linear module has a bias."""
    return any(m.bias is not None for m in linears_of(scope).values())


def gain_of(scope: Scope, gain: float) -> Change:
    """The output of every linear module times `gain`."""

    def of(module: nn.Linear) -> Callable[[Tensor], Tensor]:
        before = module.forward
        return lambda x: before(x) * gain

    return together(*(forward(m, of(m)) for m in linears_of(scope).values()))
