"""Weights: read in the wrong order, from the wrong place, as the wrong numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parity.faults.fault import Change, Fault, Number, Scope, fault
from parity.faults.patches.modules import forward, linears_of, together
from parity.faults.patches.weight import (
    LAYER,
    LINEARS,
    QK_PROJECTIONS,
    each,
    exchangeable,
    exchanged,
    from_layer,
    has_layer,
    has_linears,
    has_pairs,
    heads_by_projection,
    rows_permuted,
    splits_by_query_heads,
)


def _column_major(w: Tensor) -> Tensor:
    """The numbers in memory taken column by column: the transpose, where the weight is square."""
    return w.reshape(w.shape[::-1]).t().contiguous()


@fault(
    id="weight-transposed",
    title="the weight is read column by column: its transpose, where it is square",
    sites=LINEARS,
    fix="a torch weight is stored as (out, in), row by row; a Conv1D of GPT-2 as (in, out)",
    source="candle#321",
    applies=has_linears,
)
def weight_transposed(scope: Scope) -> Change:
    return each(scope, _column_major)


def _row_major(w: Tensor) -> Tensor:
    """The numbers of the transpose in the shape of the weight."""
    return w.t().reshape(w.shape)


@fault(
    id="weight-stored-transposed",
    title="the weight was stored column by column and is read row by row: its transpose, where it is square",
    sites=LINEARS,
    fix="store torch weights as (out, in), contiguous; a transposed view must be copied first",
    source="transformers#40609",
    applies=lambda s: any(m.weight.shape[0] != m.weight.shape[1] for m in linears_of(s).values()),
)
def weight_stored_transposed(scope: Scope) -> Change:
    return each(scope, _row_major)


@fault(
    id="weight-rows-for-interleaved",
    title="the rows of q_proj and k_proj are permuted for a RoPE of interleaved pairs",
    sites=QK_PROJECTIONS,
    fix="leave the rows as they are for a RoPE of halves, or change the RoPE with them",
    source="llama.cpp#2376",
    applies=has_pairs,
)
def weight_rows_for_interleaved(scope: Scope) -> Change:
    return rows_permuted(scope, heads_by_projection(scope), into_pairs=True)


@fault(
    id="weight-rows-for-halves",
    title="the rows of q_proj and k_proj are permuted as if they came from interleaved pairs",
    sites=QK_PROJECTIONS,
    fix="permute the rows of checkpoints for interleaved RoPE only, and only once",
    applies=has_pairs,
)
def weight_rows_for_halves(scope: Scope) -> Change:
    return rows_permuted(scope, heads_by_projection(scope), into_pairs=False)


@fault(
    id="weight-k-rows-by-query-heads",
    title="the rows of k_proj are permuted as if it had as many heads as q_proj",
    sites=("k_proj",),
    fix="permute k_proj by the number of key/value heads",
    source="llama.cpp#3364",
    applies=splits_by_query_heads,
)
def weight_k_rows_by_query_heads(scope: Scope) -> Change:
    return rows_permuted(scope, {"k_proj": int(scope.config.num_attention_heads)}, into_pairs=True)


@fault(
    id="weight-kv-exchanged",
    title="k_proj and v_proj have each other's weights",
    sites=("k_proj", "v_proj"),
    fix="check the order in a fused projection: q, k, v",
    source="tt-mlir#8958",
    applies=exchangeable("k_proj", "v_proj"),
)
def weight_kv_exchanged(scope: Scope) -> Change:
    return exchanged(scope, "k_proj", "v_proj")


@fault(
    id="weight-qk-exchanged",
    title="q_proj and k_proj have each other's weights",
    sites=QK_PROJECTIONS,
    fix="check the order in a fused projection: q, k, v",
    applies=exchangeable(*QK_PROJECTIONS),
)
def weight_qk_exchanged(scope: Scope) -> Change:
    return exchanged(scope, *QK_PROJECTIONS)


@fault(
    id="weight-gate-up-exchanged",
    title="gate_proj and up_proj have each other's weights",
    sites=("gate_proj", "up_proj"),
    fix="check the order in a fused projection: gate, up; w1 is gate and w3 is up in Meta's names",
    applies=exchangeable("gate_proj", "up_proj"),
)
def weight_gate_up_exchanged(scope: Scope) -> Change:
    return exchanged(scope, "gate_proj", "up_proj")


@fault(
    id="weight-next-layer",
    title="the weight is that of the next layer",
    sites=LAYER,
    fix="check how the checkpoint's layers are numbered",
    source="TorchSpec#89",
    applies=has_layer(1),
)
def weight_next_layer(scope: Scope) -> Change:
    return from_layer(scope, 1)


@fault(
    id="weight-previous-layer",
    title="the weight is that of the layer before",
    sites=LAYER,
    fix="check how the checkpoint's layers are numbered",
    source="TorchSpec#89",
    applies=has_layer(-1),
)
def weight_previous_layer(scope: Scope) -> Change:
    return from_layer(scope, -1)


@fault(
    id="weight-zero",
    title="the weight is zero: it was never loaded",
    sites=LINEARS,
    fix="fail when a tensor of the checkpoint is left over, or one of the model stays without numbers",
    source="raven#81",
    applies=has_linears,
)
def weight_zero(scope: Scope) -> Change:
    return each(scope, torch.zeros_like)


def _biases(scope: Scope, compute: Callable[[Any, Tensor], Tensor]) -> Change:
    """Linear modules with a bias compute `compute(module, x)`, x (…, i) to (…, o)."""
    return together(*(forward(m, partial(compute, m)) for m in linears_of(scope).values() if m.bias is not None))


def _has_bias(scope: Scope) -> bool:
    """Whether any linear module has a bias."""
    return any(m.bias is not None for m in linears_of(scope).values())


@fault(
    id="bias-missing",
    title="the bias is not added",
    sites=LINEARS,
    fix="load and add the bias (attention_bias, Qwen2's q, k and v)",
    source="ANEForge#253",
    applies=_has_bias,
)
def bias_missing(scope: Scope) -> Change:
    return _biases(scope, lambda m, x: torch.nn.functional.linear(x, m.weight))


@fault(
    id="bias-twice",
    title="the bias is added twice",
    sites=LINEARS,
    fix="add the bias in the product or after it",
    applies=_has_bias,
)
def bias_twice(scope: Scope) -> Change:
    return _biases(scope, lambda m, x: torch.nn.functional.linear(x, m.weight, m.bias) + m.bias)


@fault(
    id="weight-gain",
    title="the projection carries another factor",
    sites=LINEARS,
    fix="check scales that are multiplied into the weight or its output",
    applies=has_linears,
    number=Number(name="factor", expected=lambda _s: 1.0, typical=(2.0, 0.5)),
)
def weight_gain(scope: Scope, gain: float) -> Change:
    def of(module: nn.Linear) -> Callable[[Tensor], Tensor]:
        before = module.forward
        return lambda x: before(x) * gain

    return together(*(forward(m, of(m)) for m in linears_of(scope).values()))


FAULTS: tuple[Fault, ...] = (
    weight_transposed,
    weight_stored_transposed,
    weight_rows_for_interleaved,
    weight_rows_for_halves,
    weight_k_rows_by_query_heads,
    weight_kv_exchanged,
    weight_qk_exchanged,
    weight_gate_up_exchanged,
    weight_next_layer,
    weight_previous_layer,
    weight_zero,
    bias_missing,
    bias_twice,
    weight_gain,
)
