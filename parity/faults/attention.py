"""Attention: scale, and which heads meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parity.faults.fault import IN_ATTENTION, TWO_TOKENS, Change, Fault, Number, Scope, attribute, fault
from parity.faults.patches.attention import INSIDE, has_attention, has_scale, reading, scale_of, scaled
from parity.faults.patches.modules import attention_of, forward, head_dim_of, kv_heads_of, linear, together
from parity.faults.patches.norm import head_axis, heads_of, per_head_norms
from parity.faults.patches.rope import has_rope, original_rotation, with_rotation
from parity.record.scans import source_of

_SCALED = (*INSIDE, IN_ATTENTION)


@fault(
    id="attention-scale",
    title="scores are multiplied by another factor than the reference's",
    sites=_SCALED,
    fix="multiply q·k by head_dim ** -0.5, or by what the config says in its place",
    source="emmy#412",
    needs=TWO_TOKENS,
    applies=has_scale,
    number=Number(name="scale", expected=scale_of, typical=(1.0, 0.125, 128**-0.5, 0.0625), in_dtype=True),
)
def attention_scale(scope: Scope, scale: float) -> Change:
    return scaled(scope, scale)


def _scale_is_not(value: Callable[[Scope], float]) -> Callable[[Scope], bool]:
    return lambda scope: has_scale(scope) and abs(value(scope) / scale_of(scope) - 1) > 1e-6


def _by_hidden(scope: Scope) -> float:
    # As a fraction: some ports round this head_dim, some do not.
    return float((scope.config.hidden_size / scope.config.num_attention_heads) ** -0.5)


@fault(
    id="attention-scale-hidden",
    title="scores are scaled by (hidden / heads) ** -0.5; the reference uses another head_dim",
    sites=_SCALED,
    fix="take head_dim from config.json, not hidden_size / num_attention_heads",
    source="marin#2098",
    needs=TWO_TOKENS,
    applies=_scale_is_not(_by_hidden),
)
def attention_scale_hidden(scope: Scope) -> Change:
    return scaled(scope, _by_hidden(scope))


def _by_head_dim(scope: Scope) -> float:
    return float(head_dim_of(scope) ** -0.5)


@fault(
    id="attention-scale-head-dim",
    title="scores are scaled by head_dim ** -0.5; the reference takes the scale from the config",
    sites=_SCALED,
    fix="use query_pre_attn_scalar or attention_multiplier of config.json",
    source="llama.cpp#8197",
    needs=TWO_TOKENS,
    applies=_scale_is_not(_by_head_dim),
)
def attention_scale_head_dim(scope: Scope) -> Change:
    return scaled(scope, _by_head_dim(scope))


@fault(
    id="attention-scale-missing",
    title="scores are not scaled",
    sites=_SCALED,
    fix="multiply q·k by head_dim ** -0.5",
    needs=TWO_TOKENS,
    applies=_scale_is_not(lambda _s: 1.0),
)
def attention_scale_missing(scope: Scope) -> Change:
    return scaled(scope, 1.0)


@fault(
    id="attention-scale-twice",
    title="scores are scaled twice, as when q is scaled beforehand and the attention function scales again",
    sites=_SCALED,
    fix="scale either q or the scores",
    needs=TWO_TOKENS,
    applies=_scale_is_not(lambda s: scale_of(s) ** 2),
)
def attention_scale_twice(scope: Scope) -> Change:
    return scaled(scope, scale_of(scope) ** 2)


# -- heads ---------------------------------------------------------------------------------------------------


def _is_grouped(scope: Scope) -> bool:
    attention = attention_of(scope)
    grouped = attention is not None and 1 < kv_heads_of(scope) < scope.config.num_attention_heads
    return grouped and hasattr(source_of(attention), "repeat_kv")


@fault(
    id="gqa-tile",
    title="query head h reads key/value head h % kv_heads; in the reference it reads h // (heads / kv_heads)",
    sites=INSIDE,
    fix="repeat each key/value head in place (repeat_interleave), not the row of heads (tile)",
    source="onnx#7274",
    applies=_is_grouped,
)
def gqa_tile(scope: Scope) -> Change:
    return attribute(source_of(attention_of(scope)), "repeat_kv", lambda x, group: x.repeat(1, group, 1, 1))


def _several_kv(scope: Scope) -> bool:
    return has_attention(scope) and kv_heads_of(scope) > 1


@fault(
    id="kv-heads-reversed",
    title="key/value heads are in reverse order",
    sites=INSIDE,
    fix="keep the order of heads when splitting them over devices",
    source="GenerelSchwerz/llama.cpp#48",
    applies=_several_kv,
)
def kv_heads_reversed(scope: Scope) -> Change:
    return reading(scope, lambda q, k, v: (q, k.flip(1), v.flip(1)))


@fault(
    id="v-head-shifted",
    title="each query head reads the values of the next key/value head",
    sites=("context",),
    fix="use the same index for keys and values",
    applies=_several_kv,
)
def v_head_shifted(scope: Scope) -> Change:
    return reading(scope, lambda q, k, v: (q, k, v.roll(-1, dims=1)))


def _first_from_second(v: Tensor) -> Tensor:
    return torch.cat([v[:, 1:2], v[:, 1:]], dim=1)


@fault(
    id="v-first-head",
    title="the first value head holds the values of the second",
    sites=("context",),
    fix="check the offset at which the first head is read",
    applies=_several_kv,
)
def v_first_head(scope: Scope) -> Change:
    return reading(scope, lambda q, k, v: (q, k, _first_from_second(v)))


@fault(
    id="kv-exchanged",
    title="keys and values change places in attention",
    sites=INSIDE,
    fix="hand over keys before values",
    applies=has_attention,
)
def kv_exchanged(scope: Scope) -> Change:
    return reading(scope, lambda q, k, v: (q, v, k))


@fault(
    id="v-is-k",
    title="the keys are used as values",
    sites=("context",),
    fix="give the cache of values a buffer of its own",
    applies=has_attention,
)
def v_is_k(scope: Scope) -> Change:
    return reading(scope, lambda q, k, v: (q, k, k))


@fault(
    id="v-rope",
    title="RoPE turns the values as well",
    sites=("context",),
    fix="rotate queries and keys only",
    needs=TWO_TOKENS,
    applies=lambda s: has_attention(s) and has_rope(s),
)
def v_rope(scope: Scope) -> Change:
    rotate = original_rotation(scope)
    return reading(scope, lambda q, k, v: (q, k, rotate(v, v, *scope.kwargs["position_embeddings"])[0]))


@fault(
    id="heads-split-wrong",
    title="the outputs of q_proj and k_proj are split as (head_dim, heads); in the reference heads come first",
    sites=("q_norm", "k_norm", "q_rope", "k_rope"),
    fix="view the last axis as (heads, head_dim)",
    applies=lambda s: linear(s, "q_proj") is not None and has_rope(s),
)
def heads_split_wrong(scope: Scope) -> Change:
    """q's and k's projections split as (head_dim, heads), where a per-head norm or else RoPE takes them."""

    def split(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], x.shape[3], x.shape[2]).transpose(2, 3)

    def of(norm: nn.Module, heads: int) -> Callable[[Tensor], Tensor]:
        before: Callable[[Tensor], Tensor] = norm.forward

        def forwarded(x: Tensor) -> Tensor:
            behind = head_axis(x, heads) == 2
            return before(split(x) if behind else split(x.transpose(1, 2)).transpose(1, 2))

        return forwarded

    norms = per_head_norms(scope)
    if norms:
        return together(*(forward(norm, of(norm, heads_of(scope, name))) for name, norm in norms.items()))
    rotate = original_rotation(scope)

    def turned(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = (split(x.transpose(1, 2)).transpose(1, 2) for x in (q, k))
        return rotate(q, k, *args, **kwargs)

    return with_rotation(scope, turned)


@fault(
    id="heads-merged-wrong",
    title="the heads are merged as (head_dim, heads) before o_proj; in the reference heads come first",
    sites=("o_proj",),
    fix="move the heads behind the tokens before flattening them",
    applies=lambda s: linear(s, "o_proj") is not None,
)
def heads_merged_wrong(scope: Scope) -> Change:
    out = linear(scope, "o_proj")
    assert out is not None, "unreachable because the fault applies only where there is one"
    before, size = out.forward, head_dim_of(scope)
    return forward(out, lambda x: before(x.reshape(*x.shape[:-1], -1, size).transpose(-1, -2).flatten(-2)))


FAULTS: tuple[Fault, ...] = (
    attention_scale,
    attention_scale_hidden,
    attention_scale_head_dim,
    attention_scale_missing,
    attention_scale_twice,
    gqa_tile,
    kv_heads_reversed,
    v_head_shifted,
    v_first_head,
    kv_exchanged,
    v_is_k,
    v_rope,
    heads_split_wrong,
    heads_merged_wrong,
)
