"""The cache of keys and values: the numbers in which they are kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parity.faults.cache_rows import SITES
from parity.faults.fault import Change, Fault, Scope, fault
from parity.faults.input_blocks import in_q8_0
from parity.faults.patches.attention import has_attention, reading, softmax_as
from parity.faults.patches.modules import head_dim_of, together
from parity.faults.patches.numbers import stored_as, wide
from parity.record.cache import reading_edited


def _in_fp8(x: Tensor) -> Tensor:
    return stored_as(x.clamp(-448.0, 448.0), torch.float8_e4m3fn)


def _cache_in(store: Callable[[Tensor], Tensor]) -> Change:
    return reading_edited(lambda k, v, _start: (store(k), store(v)))


@fault(
    id="kv-cache-fp8",
    title="keys and values are kept in float8 (e4m3)",
    sites=SITES,
    fix="keep the cache in the dtype of the model, or compare with a reference that does the same",
    applies=has_attention,
    regime=True,
)
def kv_cache_fp8(_scope: Scope) -> Change:
    return _cache_in(_in_fp8)


def _in_int8(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, (x / step).round() * step, x)


@fault(
    id="kv-cache-int8",
    title="keys and values are kept in 8-bit integers, one step for each head and token",
    sites=SITES,
    fix="keep the cache in the dtype of the model, or compare with a reference that does the same",
    applies=has_attention,
    regime=True,
)
def kv_cache_int8(_scope: Scope) -> Change:
    return _cache_in(_in_int8)


def _in_fp16(x: Tensor) -> Tensor:
    return stored_as(x, torch.float16)


@fault(
    id="kv-cache-fp16",
    title="keys and values are kept in float16",
    sites=SITES,
    fix="keep the cache in the dtype of the model (llama.cpp: --cache-type-k f32 --cache-type-v f32), or accept it",
    source="llama.cpp keeps its cache in F16 unless told otherwise",
    needs="float32",
    applies=has_attention,
    regime=True,
)
def kv_cache_fp16(_scope: Scope) -> Change:
    return _cache_in(_in_fp16)


@fault(
    id="attention-operands-fp16",
    title="attention multiplies float16: queries, keys, values and probabilities are rounded to it",
    sites=("scores", "probs", "context"),
    fix="keep cache and products of attention in float32 (llama.cpp: cache types f32), or accept it",
    source="llama.cpp: a product with an F16 cache rounds the other operand to F16",
    needs="float32",
    applies=has_attention,
    regime=True,
)
def attention_operands_fp16(scope: Scope) -> Change:
    operands = reading(scope, lambda q, k, v: (_in_fp16(q), _in_fp16(k), _in_fp16(v)))
    return together(operands, softmax_as(lambda scores: _in_fp16(scores.to(wide(scores.dtype)).softmax(-1))))


@fault(
    id="kv-cache-q8-0",
    title="keys and values are kept in 8-bit blocks of 32 (ggml's Q8_0), and queries are rounded to them",
    sites=SITES,
    fix="keep the cache in float32 (llama.cpp: --cache-type-k f32 --cache-type-v f32), or accept it",
    source="llama.cpp: --cache-type-k q8_0 --cache-type-v q8_0, with flash attention",
    needs="float32",
    applies=lambda scope: has_attention(scope) and head_dim_of(scope) % 32 == 0,
    regime=True,
)
def kv_cache_q8_0(scope: Scope) -> Change:
    return together(reading(scope, lambda q, k, v: (in_q8_0(q), k, v)), _cache_in(in_q8_0))


FAULTS: tuple[Fault, ...] = (
    kv_cache_fp8,
    kv_cache_int8,
    kv_cache_fp16,
    kv_cache_q8_0,
    attention_operands_fp16,
)
