"""Precision: right formulas in the wrong numbers.

Where a bug lies in how the dtype of the model is used (sums, for example), its formula is that of the
reference, and only its rounding is larger: in higher precision it vanishes. Where it lies in a dtype of its
own (TF32, a cut instead of a rounding), it stays, and can be told to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from parity.faults.fault import ANY_ACTIVATION, Change, Fault, Scope, fault
from parity.faults.patches.attention import has_attention, original, replaced
from parity.faults.patches.mlp import gated, is_gated
from parity.faults.patches.modules import ACTIVATION_NAMES, activations_of, forward, linears_of, norms_of, together
from parity.faults.patches.norm import NORMS
from parity.faults.patches.numbers import as_written, rounded, stored_as, truncated, wide
from parity.faults.patches.residual import is_sequential, summed
from parity.faults.patches.rope import has_rope, original_rotation, with_rotation
from parity.faults.patches.weight import LINEARS, has_linears

_AT_ONCE = 16


def _linears(scope: Scope, compute: Callable[[Any, Tensor], Tensor]) -> Change:
    """Every linear module computes `compute(module, x)`, x (…, i) to (…, o)."""
    return together(*(forward(m, partial(compute, m)) for m in linears_of(scope).values()))


def _sums_low(module: Any, x: Tensor) -> Tensor:
    """The running sum is stored in the model's dtype after every 16 terms."""
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    parts = zip(torch.split(x, _AT_ONCE, -1), torch.split(module.weight, _AT_ONCE, -1), strict=True)
    for part, columns in parts:
        total = total + F.linear(part, columns)
    return total if module.bias is None else total + module.bias


@fault(
    id="sums-low",
    title="matrix products are summed in the dtype of the model; the reference sums in float32",
    sites=LINEARS,
    fix="accumulate in float32 and round once at the end",
    needs="bfloat16 or float16",
    applies=has_linears,
    only_rounds=True,
)
def sums_low(scope: Scope) -> Change:
    return _linears(scope, _sums_low)


def _cut_linear(module: Any, x: Tensor) -> Tensor:
    up = wide(x.dtype)
    with as_written():
        bias = None if module.bias is None else module.bias.to(up)
        return truncated(F.linear(x.to(up), module.weight.to(up), bias)).to(x.dtype)


def _cut_after(module: Any) -> Change:
    """What a norm or an activation returns is computed in float32 and cut."""
    before = module.forward
    return forward(module, lambda x: truncated(before(x.to(wide(x.dtype)))).to(x.dtype))


def _cut_rope(scope: Scope) -> Change:
    rotate = original_rotation(scope)

    def turned(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        up = wide(q.dtype)
        wide_q, wide_k = rotate(q.to(up), k.to(up), *args, **kwargs)
        return truncated(wide_q).to(q.dtype), truncated(wide_k).to(k.dtype)

    return with_rotation(scope, turned)


def _cut_attention(scope: Scope) -> Change:
    attend = original(scope)

    def new(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        up = wide(q.dtype)
        context, probs = attend(module, q.to(up), k.to(up), v.to(up), mask, **kwargs)
        return truncated(context).to(q.dtype), probs

    return replaced(scope, new)


def _cut_product(act: Any, gate: Tensor, up: Tensor) -> Tensor:
    return truncated(act(gate).to(wide(up.dtype)) * up).to(up.dtype)


_ACTIVATIONS = (*ACTIVATION_NAMES, ANY_ACTIVATION)


def _cut_sum(stream: Tensor, branch: Tensor, _read: Tensor) -> Tensor:
    return truncated(stream.to(wide(stream.dtype)) + branch).to(stream.dtype)


@fault(
    id="outputs-truncated",
    title="results are cut to bfloat16 by dropping their low bits; the reference rounds them to nearest",
    sites=(*LINEARS, *NORMS, *_ACTIVATIONS, "q_rope", "k_rope", "context", "product", "resid_mid", ""),
    fix="round to nearest even when storing bfloat16, do not shift the bits",
    source="ROCm/aiter#5151",
    applies=has_linears,
)
def outputs_truncated(scope: Scope) -> Change:
    changes = [_cut_after(m) for m in (*norms_of(scope).values(), *activations_of(scope))]
    changes.append(_linears(scope, _cut_linear))
    for applies, change in (
        (has_rope, _cut_rope),
        (has_attention, _cut_attention),
        (is_gated, partial(gated, product=_cut_product)),
        (is_sequential, partial(summed, attention=_cut_sum, mlp=_cut_sum)),
    ):
        if applies(scope):
            changes.append(change(scope))
    return together(*changes)


def _inputs(scope: Scope, store: Callable[[Tensor], Tensor]) -> Change:
    return _linears(scope, lambda m, x: F.linear(store(x), store(m.weight), m.bias))


@fault(
    id="products-tf32",
    title="matrix products are computed in TF32: inputs and weights rounded to 11 bits",
    sites=LINEARS,
    fix="switch TF32 off (torch.backends.cuda.matmul.allow_tf32 = False) for float32 comparisons",
    source="ROCm/pytorch#2844",
    needs="float32",
    applies=has_linears,
    regime=True,
)
def products_tf32(scope: Scope) -> Change:
    return _inputs(scope, lambda x: rounded(x, 11))


@fault(
    id="products-bf16-inputs",
    title="matrix products take their inputs in bfloat16 and sum in float32",
    sites=LINEARS,
    fix="keep inputs in the dtype of the model",
    needs="float32 or float16",
    applies=has_linears,
    regime=True,
)
def products_bf16_inputs(scope: Scope) -> Change:
    return _inputs(scope, lambda x: stored_as(x, torch.bfloat16))


def _throughout(scope: Scope, dtype: torch.dtype) -> Change:
    """Inputs, weights and outputs of linear modules in `dtype`."""

    def compute(module: Any, x: Tensor) -> Tensor:
        bias = None if module.bias is None else stored_as(module.bias, dtype)
        return stored_as(F.linear(stored_as(x, dtype), stored_as(module.weight, dtype), bias), dtype)

    return _linears(scope, compute)


@fault(
    id="products-bf16",
    title="matrix products take and return bfloat16 in a model of higher precision (autocast)",
    sites=LINEARS,
    fix="switch autocast off, or compare with a reference in bfloat16",
    needs="float32 or float16",
    applies=has_linears,
    regime=True,
)
def products_bf16(scope: Scope) -> Change:
    return _throughout(scope, torch.bfloat16)


@fault(
    id="products-fp16",
    title="matrix products take and return float16 in a model of higher precision or range",
    sites=LINEARS,
    fix="keep matrix products in the dtype of the model",
    source="transformers#36832",
    needs="float32",
    applies=has_linears,
    regime=True,
)
def products_fp16(scope: Scope) -> Change:
    return _throughout(scope, torch.float16)


FAULTS: tuple[Fault, ...] = (
    sums_low,
    outputs_truncated,
    products_tf32,
    products_bf16_inputs,
    products_bf16,
    products_fp16,
)
