"""The cache of keys and values: the numbers in which they are kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parity.faults.fault import Change, Fault, Scope, fault
from parity.faults.patches.attention import INSIDE, has_attention, reading
from parity.faults.patches.numbers import stored_as


def _in_fp8(x: Tensor) -> Tensor:
    return stored_as(x.clamp(-448.0, 448.0), torch.float8_e4m3fn)


def _cache_in(scope: Scope, store: Callable[[Tensor], Tensor]) -> Change:
    return reading(scope, lambda q, k, v: (q, store(k), store(v)))


@fault(
    id="kv-cache-fp8",
    title="keys and values are kept in float8 (e4m3)",
    sites=INSIDE,
    fix="keep the cache in the dtype of the model, or compare with a reference that does the same",
    applies=has_attention,
)
def kv_cache_fp8(scope: Scope) -> Change:
    return _cache_in(scope, _in_fp8)


def _in_int8(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, (x / step).round() * step, x)


@fault(
    id="kv-cache-int8",
    title="keys and values are kept in 8-bit integers, one step for each head and token",
    sites=INSIDE,
    fix="keep the cache in the dtype of the model, or compare with a reference that does the same",
    applies=has_attention,
)
def kv_cache_int8(scope: Scope) -> Change:
    return _cache_in(scope, _in_int8)


FAULTS: tuple[Fault, ...] = (
    kv_cache_fp8,
    kv_cache_int8,
)
