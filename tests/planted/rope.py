"""RoPE gone wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from impl.qwen3 import rope_tables, rotate
from tests.planted.base import ROPE, Attention, Change, Place, Qwen3, Turn, Variant, attention_with, rebind


def turned(turn: Turn) -> Change:
    """RoPE replaced by `turn`."""

    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        for i in layers:
            rebind(model.model.layers[i].self_attn, attention_with(turn))

    return apply


def tables(make: Callable[[Tensor, int, float, torch.dtype], tuple[Tensor, Tensor]], only: str = "qk") -> Change:
    """RoPE with tables from `make(positions, head_dim, theta, dtype)`, for `only` q, k or both."""

    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        theta = model.config.rope_theta

        def turn(self: Attention, which: str, x: Tensor, place: Place) -> Tensor:
            if which not in only:
                return rotate(x, place.cos, place.sin)
            return rotate(x, *make(place.positions, self.head_dim, theta, place.cos.dtype))

        turned(turn)(model, layers)

    return apply


def interleaved(_self: Attention, _which: str, x: Tensor, place: Place) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = (table[:, :half].repeat_interleave(2, dim=-1) for table in (place.cos, place.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


def backwards(_self: Attention, _which: str, x: Tensor, place: Place) -> Tensor:
    return rotate(x, place.cos, -place.sin)


def half_of_the_head(self: Attention, _which: str, x: Tensor, place: Place) -> Tensor:
    size = 2 * (self.head_dim // 4)
    angle = slice(0, size // 2)
    cos, sin = (torch.cat([table[:, angle]] * 2, dim=-1) for table in (place.cos, place.sin))
    return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], dim=-1)


def not_on_k(_self: Attention, which: str, x: Tensor, place: Place) -> Tensor:
    return x if which == "k" else rotate(x, place.cos, place.sin)


def not_on_q(_self: Attention, which: str, x: Tensor, place: Place) -> Tensor:
    return x if which == "q" else rotate(x, place.cos, place.sin)


def nowhere(_self: Attention, _which: str, x: Tensor, _place: Place) -> Tensor:
    return x


def k_backwards(_self: Attention, which: str, x: Tensor, place: Place) -> Tensor:
    return rotate(x, place.cos, -place.sin if which == "k" else place.sin)


def sin_and_cos_swapped(_self: Attention, _which: str, x: Tensor, place: Place) -> Tensor:
    return rotate(x, place.sin, place.cos)


def small_head(model: Qwen3, layers: Sequence[int]) -> None:
    """Only the first half of each head is rotated, as a head of that size would be."""
    theta = model.config.rope_theta

    def turn(self: Attention, _which: str, x: Tensor, place: Place) -> Tensor:
        size = 2 * (self.head_dim // 4)
        cos, sin = rope_tables(place.positions, size, theta, x.dtype)
        return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], dim=-1)

    turned(turn)(model, layers)


def hidden_per_head(model: Qwen3, layers: Sequence[int]) -> None:
    """Exponents over hidden / heads, the head_dim of other models."""
    size = model.config.hidden_size // model.config.num_attention_heads

    def make(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / size
        angles = positions[:, None].float() * (1.0 / theta**exponents)
        return tuple(torch.cat([f(angles)] * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))  # type: ignore[return-value]

    tables(make)(model, layers)


def phases_in(low: torch.dtype) -> Callable[[Tensor, int, float, torch.dtype], tuple[Tensor, Tensor]]:
    def make(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
        angles = positions[:, None].to(low) * (1.0 / theta**exponents).to(low)
        angles = torch.cat([angles, angles], dim=-1).float()
        return angles.cos().to(dtype), angles.sin().to(dtype)

    return make


def tables_in_bf16(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(positions, head_dim, theta, torch.bfloat16)
    return cos.to(dtype), sin.to(dtype)


def larger_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(positions, head_dim, theta, torch.float32)
    return (1.25 * cos).to(dtype), (1.25 * sin).to(dtype)


def last_at_zero(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    decoded = torch.cat([positions[:-1], torch.zeros_like(positions[:1])])
    return rope_tables(decoded, head_dim, theta, dtype)


def frequencies_in_bf16(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None].float() * (1.0 / theta**exponents).bfloat16().float()
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _shifted(positions: Tensor, d: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rope_tables(positions + 1, d, theta, dtype)


_GROWS = "Token 0 is not turned at all, and the error grows with the position."

BUGS = (
    Variant(
        "rope-interleaved",
        "RoPE rotates neighbours (2i, 2i+1) in place of halves (i, i + d/2)",
        ROPE,
        turned(interleaved),
        note=_GROWS,
        min_tokens=2,
    ),
    Variant(
        "rope-theta-default",
        "theta 10000, the usual default, whatever config.json says",
        ROPE,
        tables(lambda p, d, _theta, dtype: rope_tables(p, d, 1e4, dtype)),
        note=_GROWS + " Close to nothing where the checkpoint's own theta is near 10000.",
        min_tokens=2,
    ),
    Variant(
        "rope-theta-half",
        "theta half of the right one",
        ROPE,
        tables(lambda p, d, theta, dtype: rope_tables(p, d, theta / 2, dtype)),
        note=_GROWS,
        min_tokens=2,
    ),
    Variant(
        "rope-sin-sign",
        "the sine has the wrong sign: tokens turn backwards",
        ROPE,
        turned(backwards),
        note=_GROWS,
        min_tokens=2,
    ),
    Variant(
        "position-offset",
        "positions start at 1",
        ROPE,
        tables(_shifted),
        note="RoPE is relative: neither context nor logits change beyond rounding.",
    ),
    Variant(
        "position-offset-q",
        "positions of the queries start at 1, those of the keys at 0",
        ("self_attn.q_rope",),
        tables(_shifted, only="q"),
    ),
    Variant(
        "rope-stretched",
        "positions divided by 2, as linear scaling with factor 2 would",
        ROPE,
        tables(lambda p, d, theta, dtype: rope_tables(p / 2, d, theta, dtype)),
        note=_GROWS,
        min_tokens=2,
    ),
    Variant(
        "rope-partial-sliced",
        "only the first half of each head is rotated",
        ROPE,
        turned(half_of_the_head),
        note=_GROWS,
        min_tokens=2,
    ),
    Variant(
        "rope-skipped-k",
        "RoPE on the queries alone",
        ("self_attn.k_rope",),
        turned(not_on_k),
        note=_GROWS,
        min_tokens=2,
    ),
    Variant(
        "rope-skipped-q", "RoPE on the keys alone", ("self_attn.q_rope",), turned(not_on_q), note=_GROWS, min_tokens=2
    ),
    Variant("rope-skipped", "no RoPE", ROPE, turned(nowhere), note=_GROWS, min_tokens=2),
    Variant(
        "rope-sin-sign-k",
        "the keys turn backwards",
        ("self_attn.k_rope",),
        turned(k_backwards),
        note=_GROWS,
        min_tokens=2,
    ),
    Variant("rope-partial", "half of each head is rotated, as a head of that size", ROPE, small_head, min_tokens=2),
    Variant("rope-head-dim", "frequencies of a head of hidden / heads numbers", ROPE, hidden_per_head, min_tokens=2),
    Variant("rope-attention-factor", "cosines and sines 25 % too large", ROPE, tables(larger_tables)),
    Variant(
        "position-offset-k",
        "positions of the keys start at 1, those of the queries at 0",
        ("self_attn.k_rope",),
        tables(_shifted, only="k"),
    ),
    Variant("position-decode-zero", "the last token has position 0", ROPE, tables(last_at_zero), min_tokens=2),
    Variant(
        "position-chunk-restart",
        "positions start anew after 64 tokens",
        ROPE,
        tables(lambda p, d, theta, dtype: rope_tables(p % 64, d, theta, dtype)),
        min_tokens=65,
    ),
    Variant(
        "rope-phase-fp16",
        "angles computed in float16",
        ROPE,
        tables(phases_in(torch.float16)),
        kind="precision",
        dtypes=("float32",),
        min_tokens=2,
    ),
    Variant(
        "rope-tables-bf16",
        "cosines and sines in bfloat16",
        ROPE,
        tables(tables_in_bf16),
        kind="precision",
        dtypes=("float32",),
        min_tokens=2,
    ),
    Variant("rope-sin-cos-exchanged", "sine and cosine change places", ROPE, turned(sin_and_cos_swapped)),
    Variant(
        "rope-phase-bf16",
        "angles computed in bfloat16",
        ROPE,
        tables(phases_in(torch.bfloat16)),
        note="Invisible in the first tokens; by position 256 the angle is off by half a radian.",
        min_tokens=32,
    ),
    Variant(
        "rope-inv-freq-bf16",
        "frequencies rounded to bfloat16, angles in float32",
        ROPE,
        tables(frequencies_in_bf16),
        kind="precision",
        note="A relative error of 0.2 % of the angle: below the rounding of bfloat16 until some 100 tokens.",
        min_tokens=128,
    ),
)
