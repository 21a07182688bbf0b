"""Norms: the right formula, rounded elsewhere than in the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import Change, Fault, Scope, fault
from parity.faults.patches.norm import (
    NORMS,
    adds_one,
    each,
    eps_of,
    has,
    mean_square,
    normalized,
    weighted,
    widened,
)
from parity.faults.patches.numbers import stored_as

_LOW = "bfloat16 or float16"


def _low_throughout(norm: Any, x: Tensor) -> Tensor:
    unit = x * torch.rsqrt(mean_square(x) + eps_of(norm))
    product: Tensor = unit * (1.0 + norm.weight) if adds_one(norm) else unit * norm.weight
    return product


@fault(
    id="norm-not-upcast",
    title="the norm is computed in the dtype of the model; the reference computes it in float32",
    sites=NORMS,
    fix="cast to float32 before squaring",
    needs=_LOW,
    applies=has(),
    only_rounds=True,
)
def norm_not_upcast(scope: Scope) -> Change:
    return each(scope, NORMS, _low_throughout)


def _inverse_rounded(norm: Any, x: Tensor) -> Tensor:
    up = widened(x)
    inverse = stored_as(torch.rsqrt(mean_square(up) + eps_of(norm)), torch.bfloat16)
    return weighted(norm, up * inverse, x.dtype)


@fault(
    id="norm-inverse-bf16",
    title="the norm rounds the inverse root mean square to bfloat16, one error for a whole row",
    sites=NORMS,
    fix="keep rsqrt(mean(x²) + eps) in float32 until it has been multiplied",
    source="AMD/IRON#139",
    applies=has(),
)
def norm_inverse_bf16(scope: Scope) -> Change:
    return each(scope, NORMS, _inverse_rounded)


def _other_order(norm: Any, x: Tensor) -> Tensor:
    unit = normalized(widened(x), eps_of(norm))
    own: Tensor = norm.weight
    return unit.to(x.dtype) * (1.0 + own) if adds_one(norm) else (unit * own.to(unit.dtype)).to(x.dtype)


@fault(
    id="norm-rounding-order",
    title="the norm rounds before or after its weight where the reference does the other",
    sites=NORMS,
    fix="legal unless bit-equality is wanted: round to the model's dtype where the reference does",
    source="vllm#42379",
    needs=_LOW,
    applies=has(),
    only_rounds=True,
)
def norm_rounding_order(scope: Scope) -> Change:
    return each(scope, NORMS, _other_order)


FAULTS: tuple[Fault, ...] = (
    norm_not_upcast,
    norm_inverse_bf16,
    norm_rounding_order,
)
