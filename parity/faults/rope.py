"""Rotary position embeddings: which pairs turn, by which angles, and how these are kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from parity.faults.fault import Fault, Number, Scope
from parity.faults.parts import head_dim_of, hidden_per_head, plain, stored_as
from parity.faults.tables import (
    each_by,
    first_dims,
    frequencies,
    has_rope,
    interleaved,
    is_plain,
    is_scaled,
    not_turned,
    pairs_halves,
    plain_frequencies,
    rotary_fraction,
    tables,
    theta_of,
    with_tables,
)

BOTH = ("q_rope", "k_rope")
TWO_TOKENS = "two tokens or more"
Change = AbstractContextManager[None]


def _theta(scope: Scope, theta: float) -> Change:
    return with_tables(scope, tables(scope, *frequencies(scope, rope_theta=theta)))


def _unscaled(scope: Scope) -> Change:
    return with_tables(scope, tables(scope, *frequencies(scope, rope_type="default")))


def _stretched(scope: Scope, by: float) -> Change:
    angles, factor = frequencies(scope)
    return with_tables(scope, tables(scope, angles / by, factor))


def _gain(scope: Scope, factor: float) -> Change:
    return with_tables(scope, tables(scope, frequencies(scope)[0], factor))


def _sin_sign(scope: Scope) -> Change:
    cos, sin = scope.kwargs["position_embeddings"]
    return with_tables(scope, (cos, -sin))


def _exchanged(scope: Scope) -> Change:
    cos, sin = scope.kwargs["position_embeddings"]
    return with_tables(scope, (sin, cos))


def _other_head_dim(scope: Scope) -> Change:
    angles = plain_frequencies(theta_of(scope), hidden_per_head(scope), frequencies(scope)[0].numel())
    return with_tables(scope, tables(scope, angles, 1.0))


def _phases_in(dtype: torch.dtype) -> Callable[[Scope], Change]:
    return lambda scope: with_tables(scope, tables(scope, *frequencies(scope), store=lambda x: stored_as(x, dtype)))


def _angles_in(dtype: torch.dtype) -> Callable[[Scope], Change]:
    def change(scope: Scope) -> Change:
        angles, factor = frequencies(scope)
        return with_tables(scope, tables(scope, stored_as(angles, dtype), factor))

    return change


def _tables_in(dtype: torch.dtype) -> Callable[[Scope], Change]:
    def change(scope: Scope) -> Change:
        cos, sin = tables(scope, *frequencies(scope))
        return with_tables(scope, (stored_as(cos, dtype), stored_as(sin, dtype)))

    return change


def _backwards_on(q: bool, k: bool) -> Callable[[Scope], Change]:
    def change(scope: Scope) -> Change:
        cos, sin = scope.kwargs["position_embeddings"]
        return each_by(scope, (cos, -sin) if q else None, (cos, -sin) if k else None)

    return change


FAULTS: tuple[Fault, ...] = (
    Fault(
        "rope-interleaved",
        "RoPE rotates interleaved pairs (2i, 2i+1); the reference rotates halves (i, i + d/2)",
        BOTH,
        "pair x[i] with x[i + head_dim/2], or permute the rows of q_proj and k_proj when converting the checkpoint",
        "candle#3411",
        TWO_TOKENS,
        plain(interleaved),
        pairs_halves,
    ),
    Fault(
        "rope-theta",
        "RoPE uses another theta than config.json",
        BOTH,
        "read rope_theta from config.json instead of a default",
        "vllm#9503",
        TWO_TOKENS,
        _theta,
        has_rope,
        Number("theta", theta_of, (1e4, 5e5, 1e5, 1e6)),
    ),
    Fault(
        "rope-partial",
        "RoPE rotates only the first part of each head; the reference rotates all of it",
        BOTH,
        "rotate all head_dim numbers of a head",
        "MaxText 942563445",
        TWO_TOKENS,
        first_dims,
        lambda s: is_plain(s) and rotary_fraction(s) == 1.0,
        Number("fraction", rotary_fraction, (0.5, 0.25, 0.4, 0.75), discrete=True),
    ),
    Fault(
        "rope-partial-sliced",
        "RoPE rotates only the first part of each head, by the first of the whole head's angles",
        BOTH,
        "rotate all head_dim numbers of a head",
        "",
        TWO_TOKENS,
        lambda scope, fraction: first_dims(scope, fraction, sliced=True),
        lambda s: is_plain(s) and rotary_fraction(s) == 1.0,
        Number("fraction", rotary_fraction, (0.5, 0.25, 0.4, 0.75), discrete=True),
    ),
    Fault(
        "rope-full",
        "RoPE rotates the whole head; the reference rotates only its first part",
        BOTH,
        "rotate partial_rotary_factor * head_dim numbers of each head and leave the rest as they are",
        "llama.cpp#12957",
        TWO_TOKENS,
        plain(lambda s: first_dims(s, 1.0)),
        lambda s: is_plain(s) and rotary_fraction(s) < 1.0,
    ),
    Fault(
        "rope-scaling-ignored",
        "RoPE uses unscaled frequencies; the config asks for scaled ones (linear, llama3, YaRN, …)",
        BOTH,
        "apply rope_scaling of config.json to the frequencies",
        "mlx-vlm#1710",
        "a prompt of some hundred tokens, for only slow frequencies differ",
        plain(_unscaled),
        is_scaled,
    ),
    Fault(
        "rope-stretched",
        "RoPE divides positions by a factor, as linear scaling would; the config asks for none",
        BOTH,
        "leave the positions undivided unless rope_scaling says `linear`",
        "",
        TWO_TOKENS,
        _stretched,
        is_plain,
        Number("factor", lambda _s: 1.0, (2.0, 4.0, 8.0, 32.0)),
    ),
    Fault(
        "rope-attention-factor",
        "the RoPE tables carry another factor than the reference's (YaRN's attention_factor, mscale)",
        BOTH,
        "multiply cosines and sines by the attention factor that belongs to the scaling, once",
        "exllamav3#259",
        "",
        _gain,
        has_rope,
        # 0.1 ln(s) + 1 for YaRN's usual s = 4, 8, 32, 40, and none at all.
        Number("factor", lambda s: frequencies(s)[1], (1.0, 1.13863, 1.20794, 1.34657, 1.36889)),
    ),
    Fault(
        "rope-sin-sign",
        "RoPE rotates backwards: the sign of its sine is wrong",
        BOTH,
        "compute x * cos + rotate_half(x) * sin with rotate_half(x) = (-x2, x1)",
        "",
        TWO_TOKENS,
        plain(_sin_sign),
        has_rope,
    ),
    Fault(
        "rope-sin-sign-k",
        "RoPE rotates the keys backwards",
        ("k_rope",),
        "turn queries and keys the same way",
        "",
        TWO_TOKENS,
        plain(_backwards_on(q=False, k=True)),
        has_rope,
    ),
    Fault(
        "rope-sin-cos-exchanged",
        "RoPE's sine and cosine change places",
        BOTH,
        "check the order in which the tables are handed over: cosine first",
        "",
        "",
        plain(_exchanged),
        has_rope,
    ),
    Fault(
        "rope-skipped",
        "no RoPE on queries and keys",
        BOTH,
        "rotate queries and keys after their projection (and QK-norm, if there is one)",
        "",
        TWO_TOKENS,
        plain(not_turned(q=True, k=True)),
        has_rope,
    ),
    Fault(
        "rope-skipped-q",
        "no RoPE on the queries",
        ("q_rope",),
        "rotate the queries as well as the keys",
        "",
        TWO_TOKENS,
        plain(not_turned(q=True, k=False)),
        has_rope,
    ),
    Fault(
        "rope-skipped-k",
        "no RoPE on the keys",
        ("k_rope",),
        "rotate the keys before they enter the cache",
        "",
        TWO_TOKENS,
        plain(not_turned(q=False, k=True)),
        has_rope,
    ),
    Fault(
        "rope-head-dim",
        "RoPE's frequencies are those of a head of hidden / heads numbers; head_dim is another number",
        BOTH,
        "divide the exponents by head_dim of config.json, not by hidden_size / num_attention_heads",
        "marin#2098",
        TWO_TOKENS,
        plain(_other_head_dim),
        lambda s: is_plain(s) and rotary_fraction(s) == 1.0 and head_dim_of(s) != hidden_per_head(s),
    ),
    Fault(
        "rope-phase-bf16",
        "RoPE's angles are computed in bfloat16; the reference computes them in float32",
        BOTH,
        "compute positions times frequencies, cosine and sine in float32 and cast only the tables",
        "candle#3005",
        "some dozens of tokens",
        plain(_phases_in(torch.bfloat16)),
        has_rope,
    ),
    Fault(
        "rope-phase-fp16",
        "RoPE's angles are computed in float16; the reference computes them in float32",
        BOTH,
        "compute positions times frequencies, cosine and sine in float32 and cast only the tables",
        "",
        "some hundred tokens, or float32",
        plain(_phases_in(torch.float16)),
        has_rope,
    ),
    Fault(
        "rope-inv-freq-bf16",
        "RoPE's frequencies are rounded to bfloat16, as model.to(bfloat16) does to a buffer",
        BOTH,
        "keep inv_freq in float32 when the model is cast",
        "transformers#25681",
        "some hundred tokens, or float32",
        plain(_angles_in(torch.bfloat16)),
        has_rope,
    ),
    Fault(
        "rope-tables-bf16",
        "RoPE's cosines and sines are rounded to bfloat16 in a model of higher precision",
        BOTH,
        "keep the tables in the dtype of the model",
        "",
        "float32, or a reference that keeps its tables there",
        plain(_tables_in(torch.bfloat16)),
        has_rope,
    ),
)
