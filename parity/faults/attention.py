"""Attention: scale, and which heads meet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from parity.faults.attend import (
    has_attention,
    reading,
    scale_of,
    with_options,
)
from parity.faults.fault import Fault, Number, Scope, attribute, source_of
from parity.faults.parts import (
    attention_of,
    forward,
    head_dim_of,
    kv_heads_of,
    linear,
    plain,
    together,
)
from parity.faults.qk_norm import head_axis, heads_of, per_head_norms
from parity.faults.tables import has_rope, original_rotation, with_rotation

INSIDE = ("scores", "context")
TWO_TOKENS = "two tokens or more"
Change = AbstractContextManager[None]


def _scaled(value: Callable[[Scope], float]) -> Callable[[Scope], Change]:
    return lambda scope: with_options(scope, scaling=value(scope))


def _scale_is_not(value: Callable[[Scope], float]) -> Callable[[Scope], bool]:
    return lambda scope: has_attention(scope) and abs(value(scope) / scale_of(scope) - 1) > 1e-6


def _by_hidden(scope: Scope) -> float:
    # As a fraction: some ports round this head_dim, some do not.
    return float((scope.config.hidden_size / scope.config.num_attention_heads) ** -0.5)


def _by_head_dim(scope: Scope) -> float:
    return float(head_dim_of(scope) ** -0.5)


# -- heads ---------------------------------------------------------------------------------------------------


def _is_grouped(scope: Scope) -> bool:
    attention = attention_of(scope)
    grouped = attention is not None and 1 < kv_heads_of(scope) < scope.config.num_attention_heads
    return grouped and hasattr(source_of(attention), "repeat_kv")


def _several_kv(scope: Scope) -> bool:
    return has_attention(scope) and kv_heads_of(scope) > 1


def _tiled(scope: Scope) -> Change:
    return attribute(source_of(attention_of(scope)), "repeat_kv", lambda x, group: x.repeat(1, group, 1, 1))


def _first_from_second(v: Tensor) -> Tensor:
    return torch.cat([v[:, 1:2], v[:, 1:]], dim=1)


def _values_turned(scope: Scope) -> Change:
    rotate = original_rotation(scope)
    return reading(scope, lambda q, k, v: (q, k, rotate(v, v, *scope.kwargs["position_embeddings"])[0]))


def _heads_permuted(scope: Scope) -> Change:
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


def _merged_wrong(scope: Scope) -> Change:
    out = linear(scope, "o_proj")
    assert out is not None, "unreachable because the fault applies only where there is one"
    before, size = out.forward, head_dim_of(scope)
    return forward(out, lambda x: before(x.reshape(*x.shape[:-1], -1, size).transpose(-1, -2).flatten(-2)))


FAULTS: tuple[Fault, ...] = (
    Fault(
        "attention-scale",
        "scores are multiplied by another factor than the reference's",
        INSIDE,
        "multiply q·k by head_dim ** -0.5, or by what the config says in its place",
        "emmy#412",
        TWO_TOKENS,
        lambda scope, scale: with_options(scope, scaling=scale),
        has_attention,
        Number("scale", scale_of, (1.0, 0.125, 128**-0.5, 0.0625)),
    ),
    Fault(
        "attention-scale-hidden",
        "scores are scaled by (hidden / heads) ** -0.5; the reference uses another head_dim",
        INSIDE,
        "take head_dim from config.json, not hidden_size / num_attention_heads",
        "marin#2098",
        TWO_TOKENS,
        plain(_scaled(_by_hidden)),
        _scale_is_not(_by_hidden),
    ),
    Fault(
        "attention-scale-head-dim",
        "scores are scaled by head_dim ** -0.5; the reference takes the scale from the config",
        INSIDE,
        "use query_pre_attn_scalar or attention_multiplier of config.json",
        "llama.cpp#8197",
        TWO_TOKENS,
        plain(_scaled(_by_head_dim)),
        _scale_is_not(_by_head_dim),
    ),
    Fault(
        "attention-scale-missing",
        "scores are not scaled",
        INSIDE,
        "multiply q·k by head_dim ** -0.5",
        "",
        TWO_TOKENS,
        plain(_scaled(lambda _s: 1.0)),
        _scale_is_not(lambda _s: 1.0),
    ),
    Fault(
        "attention-scale-twice",
        "scores are scaled twice, as when q is scaled beforehand and the attention function scales again",
        INSIDE,
        "scale either q or the scores",
        "",
        TWO_TOKENS,
        plain(_scaled(lambda s: scale_of(s) ** 2)),
        _scale_is_not(lambda s: scale_of(s) ** 2),
    ),
    Fault(
        "gqa-tile",
        "query head h reads key/value head h % kv_heads; in the reference it reads h // (heads / kv_heads)",
        INSIDE,
        "repeat each key/value head in place (repeat_interleave), not the row of heads (tile)",
        "onnx#7274",
        "",
        plain(_tiled),
        _is_grouped,
    ),
    Fault(
        "kv-heads-reversed",
        "key/value heads are in reverse order",
        INSIDE,
        "keep the order of heads when splitting them over devices",
        "GenerelSchwerz/llama.cpp#48",
        "",
        plain(lambda s: reading(s, lambda q, k, v: (q, k.flip(1), v.flip(1)))),
        _several_kv,
    ),
    Fault(
        "v-head-shifted",
        "each query head reads the values of the next key/value head",
        ("context",),
        "use the same index for keys and values",
        "",
        "",
        plain(lambda s: reading(s, lambda q, k, v: (q, k, v.roll(-1, dims=1)))),
        _several_kv,
    ),
    Fault(
        "v-first-head",
        "the first value head holds the values of the second",
        ("context",),
        "check the offset at which the first head is read",
        "",
        "",
        plain(lambda s: reading(s, lambda q, k, v: (q, k, _first_from_second(v)))),
        _several_kv,
    ),
    Fault(
        "kv-exchanged",
        "keys and values change places in attention",
        INSIDE,
        "hand over keys before values",
        "",
        "",
        plain(lambda s: reading(s, lambda q, k, v: (q, v, k))),
        has_attention,
    ),
    Fault(
        "v-is-k",
        "the keys are used as values",
        ("context",),
        "give the cache of values a buffer of its own",
        "",
        "",
        plain(lambda s: reading(s, lambda q, k, v: (q, k, k))),
        has_attention,
    ),
    Fault(
        "v-rope",
        "RoPE turns the values as well",
        ("context",),
        "rotate queries and keys only",
        "",
        TWO_TOKENS,
        plain(_values_turned),
        lambda s: has_attention(s) and has_rope(s),
    ),
    Fault(
        "heads-split-wrong",
        "the outputs of q_proj and k_proj are split as (head_dim, heads); in the reference heads come first",
        ("q_norm", "k_norm", "q_rope", "k_rope"),
        "view the last axis as (heads, head_dim)",
        "",
        "",
        plain(_heads_permuted),
        lambda s: linear(s, "q_proj") is not None and has_rope(s),
    ),
    Fault(
        "heads-merged-wrong",
        "the heads are merged as (head_dim, heads) before o_proj; in the reference heads come first",
        ("o_proj",),
        "move the heads behind the tokens before flattening them",
        "",
        "",
        plain(_merged_wrong),
        lambda s: linear(s, "o_proj") is not None,
    ),
)
