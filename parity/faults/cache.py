"""The cache of keys and values: the numbers in which they are kept, and which of them a later call sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from parity.faults.cache_rows import SITES
from parity.faults.fault import LAST, START, TWO_TOKENS, Change, Fault, Scope, fault, first_token
from parity.faults.patches.attention import INSIDE, has_attention, reading, seeing, softmax_as, window_of
from parity.faults.patches.modules import together
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


# (visible (b, 1, t, s), query number (t, 1), key number (s), first token) -> visible, for tokens from that one on
_Later = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _seeing(scope: Scope, start: float, rule: _Later) -> Change:
    def seen(mask: Tensor, i: Tensor, j: Tensor) -> Tensor:
        first = first_token(start, sum(scope.calls))
        return torch.where(i >= first, rule(mask, i, j, first), mask)

    return seeing(scope, seen)


@fault(
    id="cache-unused",
    title="a decoded token sees itself alone: the cache is not read",
    sites=INSIDE,
    fix="join the keys and values of the cache to those of the new token",
    needs=TWO_TOKENS,
    applies=has_attention,
    number=START,
)
def cache_unused(scope: Scope, start: float) -> Change:
    return _seeing(scope, start, lambda mask, i, j, _first: mask & (j == i))


@fault(
    id="cache-lost",
    title="from a token on nothing before it is seen: what an earlier call put into the cache is gone",
    sites=INSIDE,
    fix="hand the cache of one call to the next",
    needs=TWO_TOKENS,
    applies=has_attention,
    number=START,
)
def cache_lost(scope: Scope, start: float) -> Change:
    return _seeing(scope, start, lambda mask, _i, j, first: mask & (j >= first))


@fault(
    id="cache-not-extended",
    title="decoded tokens see the prompt and themselves, but no other decoded token",
    sites=INSIDE,
    fix="put the keys and values of every decoded token into the cache",
    needs="three tokens or more",
    applies=has_attention,
    number=replace(START, typical=(2 * LAST,)),
)
def cache_not_extended(scope: Scope, start: float) -> Change:
    return _seeing(scope, start, lambda mask, i, j, first: mask & ((j < first) | (j == i)))


@fault(
    id="cache-hides-self",
    title="a decoded token does not see itself: the mask in decoding is one too short",
    sites=INSIDE,
    fix="the mask of a decoded token has room for the cached tokens and for the token itself",
    needs=TWO_TOKENS,
    applies=has_attention,
    number=START,
)
def cache_hides_self(scope: Scope, start: float) -> Change:
    return _seeing(scope, start, lambda mask, i, j, _first: mask & (j != i))


@fault(
    id="cache-overwrites-last",
    title="decoded tokens do not see the token before the first of them: its place in the cache is overwritten",
    sites=INSIDE,
    fix="write the first decoded token behind the last of the prompt",
    needs=TWO_TOKENS,
    applies=has_attention,
    number=START,
)
def cache_overwrites_last(scope: Scope, start: float) -> Change:
    return _seeing(scope, start, lambda mask, _i, j, first: mask & (j != first - 1))


@fault(
    id="cache-window-stands",
    title="the window stands where the prompt ended, so that decoded tokens see too much",
    sites=INSIDE,
    fix="let the window slide with every decoded token",
    needs="a prompt longer than the window",
    applies=lambda s: has_attention(s) and window_of(s) is not None,
    number=START,
)
def cache_window_stands(scope: Scope, start: float) -> Change:
    window = window_of(scope) or 0
    return _seeing(
        scope,
        start,
        lambda mask, i, j, first: mask | ((j <= i) & (j > first - 1 - window) & mask.any(-2, keepdim=True)),
    )


FAULTS: tuple[Fault, ...] = (
    kv_cache_fp8,
    kv_cache_int8,
    kv_cache_fp16,
    attention_operands_fp16,
    cache_unused,
    cache_lost,
    cache_not_extended,
    cache_hides_self,
    cache_overwrites_last,
    cache_window_stands,
)
