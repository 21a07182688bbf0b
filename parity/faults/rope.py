"""Rotary position embeddings: which pairs turn, by which angles, and how these are kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import IN_ATTENTION, ROPE_TABLES, TWO_TOKENS, Change, Fault, Number, Scope, fault
from parity.faults.patches.modules import head_dim_of, hidden_per_head
from parity.faults.patches.rope import (
    ROTATED,
    each_by,
    first_dims,
    frequencies,
    has_rope,
    has_tables,
    is_plain,
    is_scaled,
    original_rotation,
    pairs_halves,
    plain_frequencies,
    rotary_fraction,
    tables,
    theta_of,
    turning_by,
    with_rotation,
    with_tables,
)


@fault(
    id="rope-interleaved",
    title="RoPE rotates interleaved pairs (2i, 2i+1); the reference rotates halves (i, i + d/2)",
    sites=ROTATED,
    fix="pair x[i] with x[i + head_dim/2], or permute the rows of q_proj and k_proj when converting the checkpoint",
    source="candle#3411",
    needs=TWO_TOKENS,
    applies=pairs_halves,
)
def rope_interleaved(scope: Scope) -> Change:
    """Neighbours (2i, 2i+1) turn together."""
    pairs = frequencies(scope)[0].numel()

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos[..., :pairs], sin[..., :pairs]
        even, odd = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        return torch.cat([turned.to(x.dtype), x[..., 2 * pairs :]], dim=-1)

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **_: Any
    ) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return turn(q, cos, sin), turn(k, cos, sin)

    return with_rotation(scope, rotate)


@fault(
    id="rope-theta",
    title="RoPE uses another theta than config.json",
    sites=(*ROTATED, IN_ATTENTION, ROPE_TABLES),
    fix="read rope_theta from config.json instead of a default",
    source="vllm#9503",
    needs=TWO_TOKENS,
    applies=has_tables,
    number=Number(name="theta", expected=theta_of, typical=(1e4, 5e5, 1e5, 1e6)),
)
def rope_theta(scope: Scope, theta: float) -> Change:
    return turning_by(scope, *frequencies(scope, rope_theta=theta))


@fault(
    id="rope-partial",
    title="RoPE rotates only the first part of each head; the reference rotates all of it",
    sites=ROTATED,
    fix="rotate all head_dim numbers of a head",
    source="MaxText 942563445",
    needs=TWO_TOKENS,
    applies=lambda s: is_plain(s) and rotary_fraction(s) == 1.0,
    number=Number(name="fraction", expected=rotary_fraction, typical=(0.5, 0.25, 0.4, 0.75), discrete=True),
)
def rope_partial(scope: Scope, fraction: float) -> Change:
    return first_dims(scope, fraction)


@fault(
    id="rope-partial-sliced",
    title="RoPE rotates only the first part of each head, by the first of the whole head's angles",
    sites=ROTATED,
    fix="rotate all head_dim numbers of a head",
    needs=TWO_TOKENS,
    applies=lambda s: is_plain(s) and rotary_fraction(s) == 1.0,
    number=Number(name="fraction", expected=rotary_fraction, typical=(0.5, 0.25, 0.4, 0.75), discrete=True),
)
def rope_partial_sliced(scope: Scope, fraction: float) -> Change:
    return first_dims(scope, fraction, sliced=True)


@fault(
    id="rope-full",
    title="RoPE rotates the whole head; the reference rotates only its first part",
    sites=ROTATED,
    fix="rotate partial_rotary_factor * head_dim numbers of each head and leave the rest as they are",
    source="llama.cpp#12957",
    needs=TWO_TOKENS,
    applies=lambda s: is_plain(s) and rotary_fraction(s) < 1.0,
)
def rope_full(scope: Scope) -> Change:
    return first_dims(scope, 1.0)


@fault(
    id="rope-scaling-ignored",
    title="RoPE uses unscaled frequencies; the config asks for scaled ones (linear, llama3, YaRN, …)",
    sites=ROTATED,
    fix="apply rope_scaling of config.json to the frequencies",
    source="mlx-vlm#1710",
    needs="a prompt of some hundred tokens, for only slow frequencies differ",
    applies=is_scaled,
)
def rope_scaling_ignored(scope: Scope) -> Change:
    return with_tables(scope, tables(scope, *frequencies(scope, rope_type="default")))


@fault(
    id="rope-stretched",
    title="RoPE divides positions by a factor, as linear scaling would; the config asks for none",
    sites=ROTATED,
    fix="leave the positions undivided unless rope_scaling says `linear`",
    needs=TWO_TOKENS,
    applies=is_plain,
    number=Number(name="factor", expected=lambda _s: 1.0, typical=(2.0, 4.0, 8.0, 32.0)),
)
def rope_stretched(scope: Scope, stretch: float) -> Change:
    angles, factor = frequencies(scope)
    return with_tables(scope, tables(scope, angles / stretch, factor))


@fault(
    id="rope-attention-factor",
    title="the RoPE tables carry another factor than the reference's (YaRN's attention_factor, mscale)",
    sites=ROTATED,
    fix="multiply cosines and sines by the attention factor that belongs to the scaling, once",
    source="exllamav3#259",
    applies=has_rope,
    # None at all, and 0.1 ln(s) + 1 for YaRN's usual s.
    number=Number(
        name="factor",
        expected=lambda s: frequencies(s)[1],
        typical=(1.0, *(0.1 * math.log(s) + 1 for s in (4, 8, 32, 40, 16, 2, 64))),
    ),
)
def rope_attention_factor(scope: Scope, factor: float) -> Change:
    return with_tables(scope, tables(scope, frequencies(scope)[0], factor))


@fault(
    id="rope-sin-sign",
    title="RoPE rotates backwards: the sign of its sine is wrong",
    sites=ROTATED,
    fix="compute x * cos + rotate_half(x) * sin with rotate_half(x) = (-x2, x1)",
    needs=TWO_TOKENS,
    applies=has_rope,
)
def rope_sin_sign(scope: Scope) -> Change:
    cos, sin = scope.kwargs["position_embeddings"]
    return with_tables(scope, (cos, -sin))


@fault(
    id="rope-sin-sign-k",
    title="RoPE rotates the keys backwards",
    sites=("k_rope",),
    fix="turn queries and keys the same way",
    needs=TWO_TOKENS,
    applies=has_rope,
)
def rope_sin_sign_k(scope: Scope) -> Change:
    cos, sin = scope.kwargs["position_embeddings"]
    return each_by(scope, q=None, k=(cos, -sin))


@fault(
    id="rope-sin-cos-exchanged",
    title="RoPE's sine and cosine change places",
    sites=ROTATED,
    fix="check the order in which the tables are handed over: cosine first",
    applies=has_rope,
)
def rope_sin_cos_exchanged(scope: Scope) -> Change:
    cos, sin = scope.kwargs["position_embeddings"]
    return with_tables(scope, (sin, cos))


def _not_turned(scope: Scope, q: bool, k: bool) -> Change:
    """Queries or keys stay as they are."""
    original = original_rotation(scope)

    def rotate(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        turned = original(query, key, *args, **kwargs)
        return query.clone() if q else turned[0], key.clone() if k else turned[1]

    return with_rotation(scope, rotate)


@fault(
    id="rope-skipped",
    title="no RoPE on queries and keys",
    sites=ROTATED,
    fix="rotate queries and keys after their projection (and QK-norm, if there is one)",
    needs=TWO_TOKENS,
    applies=has_rope,
)
def rope_skipped(scope: Scope) -> Change:
    return _not_turned(scope, q=True, k=True)


@fault(
    id="rope-skipped-q",
    title="no RoPE on the queries",
    sites=("q_rope",),
    fix="rotate the queries as well as the keys",
    needs=TWO_TOKENS,
    applies=has_rope,
)
def rope_skipped_q(scope: Scope) -> Change:
    return _not_turned(scope, q=True, k=False)


@fault(
    id="rope-skipped-k",
    title="no RoPE on the keys",
    sites=("k_rope",),
    fix="rotate the keys before they enter the cache",
    needs=TWO_TOKENS,
    applies=has_rope,
)
def rope_skipped_k(scope: Scope) -> Change:
    return _not_turned(scope, q=False, k=True)


@fault(
    id="rope-head-dim",
    title="RoPE's frequencies are those of a head of hidden / heads numbers; head_dim is another number",
    sites=ROTATED,
    fix="divide the exponents by head_dim of config.json, not by hidden_size / num_attention_heads",
    source="marin#2098",
    needs=TWO_TOKENS,
    applies=lambda s: is_plain(s) and rotary_fraction(s) == 1.0 and head_dim_of(s) != hidden_per_head(s),
)
def rope_head_dim(scope: Scope) -> Change:
    angles = plain_frequencies(theta_of(scope), hidden_per_head(scope), frequencies(scope)[0].numel())
    return with_tables(scope, tables(scope, angles, 1.0))


FAULTS: tuple[Fault, ...] = (
    rope_interleaved,
    rope_theta,
    rope_partial,
    rope_partial_sliced,
    rope_full,
    rope_scaling_ignored,
    rope_stretched,
    rope_attention_factor,
    rope_sin_sign,
    rope_sin_sign_k,
    rope_sin_cos_exchanged,
    rope_skipped,
    rope_skipped_q,
    rope_skipped_k,
    rope_head_dim,
)
