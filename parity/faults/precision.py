"""Precision: right formulas in the wrong numbers.

Where a bug lies in how the dtype of the model is used (sums, for example), its formula is that of the
reference, and only its rounding is larger: in higher precision it vanishes. Where it lies in a dtype of its
own (TF32, a cut instead of a rounding), it stays, and can be told to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.faults.attend import has_attention, original, replaced
from parity.faults.fault import Fault, Scope
from parity.faults.mlp import gated, is_gated
from parity.faults.norm_changes import ALL as NORMS
from parity.faults.parts import (
    ACTIVATION_NAMES,
    activation_of,
    as_written,
    forward,
    linears_of,
    norms_of,
    plain,
    rounded,
    stored_as,
    together,
    truncated,
    wide,
)
from parity.faults.residual import cut_sums, is_sequential
from parity.faults.tables import has_rope, original_rotation, with_rotation
from parity.faults.weight_changes import has_linears
from parity.faults.weights import LINEARS

_AT_ONCE = 16
Change = AbstractContextManager[None]


def _linears(compute: Callable[[Any, Tensor], Tensor]) -> Callable[[Scope], Change]:
    """Every linear module computes `compute(module, x)`."""

    def of(module: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: compute(module, x)

    return lambda scope: together(*(forward(m, of(m)) for m in linears_of(scope).values()))


def _sums_low(module: Any, x: Tensor) -> Tensor:
    """The running sum is stored in the model's dtype after every 16 terms."""
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    parts = zip(torch.split(x, _AT_ONCE, -1), torch.split(module.weight, _AT_ONCE, -1), strict=True)
    for part, columns in parts:
        total = total + F.linear(part, columns)
    return total if module.bias is None else total + module.bias


def _inputs(store: Callable[[Tensor], Tensor]) -> Callable[[Scope], Change]:
    return _linears(lambda m, x: F.linear(store(x), store(m.weight), m.bias))


def _throughout(dtype: torch.dtype) -> Callable[[Scope], Change]:
    """Inputs, weights and outputs of linear modules in `dtype`."""

    def compute(module: Any, x: Tensor) -> Tensor:
        bias = None if module.bias is None else stored_as(module.bias, dtype)
        return stored_as(F.linear(stored_as(x, dtype), stored_as(module.weight, dtype), bias), dtype)

    return _linears(compute)


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


def _cut_outputs(scope: Scope) -> Change:
    act = activation_of(scope)
    changes = [_cut_after(m) for m in (*norms_of(scope).values(), *([act] if act is not None else []))]
    changes.append(_linears(_cut_linear)(scope))
    for applies, change in (
        (has_rope, _cut_rope),
        (has_attention, _cut_attention),
        (is_gated, gated(_cut_product)),
        (is_sequential, cut_sums),
    ):
        if applies(scope):
            changes.append(change(scope))
    return together(*changes)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "sums-low",
        "matrix products are summed in the dtype of the model; the reference sums in float32",
        LINEARS,
        "accumulate in float32 and round once at the end",
        "",
        "bfloat16 or float16",
        plain(_linears(_sums_low)),
        has_linears,
    ),
    Fault(
        "outputs-truncated",
        "results are cut to bfloat16 by dropping their low bits; the reference rounds them to nearest",
        (*LINEARS, *NORMS, *ACTIVATION_NAMES, "q_rope", "k_rope", "context", "product", "resid_mid", ""),
        "round to nearest even when storing bfloat16, do not shift the bits",
        "ROCm/aiter#5151",
        "",
        plain(_cut_outputs),
        has_linears,
    ),
    Fault(
        "products-tf32",
        "matrix products are computed in TF32: inputs and weights rounded to 11 bits",
        LINEARS,
        "switch TF32 off (torch.backends.cuda.matmul.allow_tf32 = False) for float32 comparisons",
        "ROCm/pytorch#2844",
        "float32",
        plain(_inputs(lambda x: rounded(x, 11))),
        has_linears,
    ),
    Fault(
        "products-bf16-inputs",
        "matrix products take their inputs in bfloat16 and sum in float32",
        LINEARS,
        "keep inputs in the dtype of the model",
        "",
        "float32 or float16",
        plain(_inputs(lambda x: stored_as(x, torch.bfloat16))),
        has_linears,
    ),
    Fault(
        "products-bf16",
        "matrix products take and return bfloat16 in a model of higher precision (autocast)",
        LINEARS,
        "switch autocast off, or compare with a reference in bfloat16",
        "",
        "float32 or float16",
        plain(_throughout(torch.bfloat16)),
        has_linears,
    ),
    Fault(
        "products-fp16",
        "matrix products take and return float16 in a model of higher precision or range",
        LINEARS,
        "keep matrix products in the dtype of the model",
        "transformers#36832",
        "float32",
        plain(_throughout(torch.float16)),
        has_linears,
    ),
)
