"""Legal differences of ports without a library: plain loops, SIMD lanes, other ways to RoPE's tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from impl.qwen3 import rotate
from tests.planted.attention import grouped
from tests.planted.base import (
    LINEARS,
    Attention,
    Change,
    Place,
    Qwen3,
    RMSNorm,
    Variant,
    attention_with,
    both,
    get,
    norms,
    rebind,
    replaced,
)

# Sums over the last axis of squares (…, n) or of other terms, in float32: (…, n) -> (…).
Sum = Callable[[Tensor], Tensor]
# Frequencies of head_dim / 2 pairs from theta, in float32 or float64.
Frequencies = Callable[[int, float], Tensor]


def in_lanes(lanes: int, *, backwards: bool = False) -> Sum:
    """Term by term into so many partial sums, which are added one after another at the end."""

    def total(terms: Tensor) -> Tensor:
        values = terms.float().numpy()
        values = values[..., ::-1] if backwards else values
        padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % lanes)])
        columns = padded.reshape(*padded.shape[:-1], -1, lanes)
        partial = np.add.accumulate(columns, axis=-2, dtype=np.float32)[..., -1, :]
        return torch.from_numpy(np.add.accumulate(partial, axis=-1, dtype=np.float32)[..., -1].copy())

    return total


def in_blocks(width: int) -> Sum:
    """The sum of each block of neighbours is added to what there is, as a loop over vector registers does."""

    def total(terms: Tensor) -> Tensor:
        blocks = torch.stack([block.sum(-1) for block in terms.float().split(width, -1)], -1)
        return in_lanes(1)(blocks)

    return total


def pairwise(terms: Tensor) -> Tensor:
    """The halves are added until one number is left, as a tree of threads does."""
    terms = terms.float()
    while terms.shape[-1] > 1:
        half = (terms.shape[-1] + 1) // 2
        terms = terms[..., :half] + F.pad(terms[..., half:], (0, 2 * half - terms.shape[-1]))
    return terms[..., 0]


def loop_norm(total: Sum, *, divides: bool = False, each_divided: bool = False) -> Callable[..., Tensor]:
    """RMSNorm around a sum of squares; divides by the root rather than multiplying by its inverse."""

    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        wide = x.float()
        size = wide.shape[-1]
        mean = total(wide * wide / size) if each_divided else total(wide * wide) / size
        root = (mean + self.eps).sqrt()[..., None]
        wide = wide / root if divides else wide * (1 / root)
        return (wide * self.weight.float()).to(x.dtype)

    return forward


def fused_add_norm(self: RMSNorm, x: Tensor) -> Tensor:
    """Squares and their sum in one multiply-add each: the square is never rounded."""
    wide = x.float()
    total = torch.zeros_like(wide[..., 0])
    for column in wide.double().unbind(-1):
        total = (total.double() + column * column).float()
    scale = 1 / (total / wide.shape[-1] + self.eps).sqrt()
    return (wide * scale[..., None] * self.weight.float()).to(x.dtype)


def double_norm(self: RMSNorm, x: Tensor) -> Tensor:
    """The mean square in float64."""
    scale = (x.double().square().mean(-1, keepdim=True) + self.eps).rsqrt().float()
    return (x.float() * scale * self.weight.float()).to(x.dtype)


def in_all_norms(forward: Callable[..., Tensor]) -> Change:
    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        for norm in norms(model, layers):
            rebind(norm, forward)

    return apply


def exponentials(size: int, theta: float) -> Tensor:
    """exp(-2i log(theta) / d) in float32."""
    steps = torch.arange(0, size, 2, dtype=torch.float32)
    return (-steps * (torch.tensor(theta).log() / size)).exp()


def doubles(size: int, theta: float) -> Tensor:
    """theta ** (-2i / d) in float64."""
    return theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def products(size: int, theta: float) -> Tensor:
    """Each frequency is the one before times theta ** (-2 / d), in float32."""
    ratio = torch.tensor(theta, dtype=torch.float32) ** (-2.0 / size)
    out = [torch.tensor(1.0)]
    for _ in range(size // 2 - 1):
        out.append(out[-1] * ratio)
    return torch.stack(out)


def with_tables(frequencies: Frequencies, phases: torch.dtype) -> Change:
    """RoPE by tables of other frequencies; positions times frequencies in the given dtype."""

    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        theta = model.config.rope_theta

        def turn(self: Attention, _which: str, x: Tensor, place: Place) -> Tensor:
            angles = place.positions[:, None].to(phases) * frequencies(self.head_dim, theta).to(phases)
            angles = torch.cat([angles, angles], -1)
            return rotate(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))

        for i in layers:
            rebind(get(model, i, "self_attn"), attention_with(turn))

    return apply


def lanes_linear(lanes: int) -> Callable[..., Tensor]:
    """A matrix product in so many running sums, as a loop over vector registers does."""

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        size = x.shape[-1]
        padding = (0, -size % lanes)
        a = F.pad(x.float(), padding).unflatten(-1, (-1, lanes))
        w = F.pad(self.weight.float(), padding).unflatten(-1, (-1, lanes))
        total = torch.zeros(*x.shape[:-1], w.shape[0], lanes)
        for j in range(a.shape[-2]):
            total = total + a[..., None, j, :] * w[:, j]
        out = in_lanes(1)(total)
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)

    return forward


def loop_attention(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax with its sum taken term by term, divided by at the end, as a loop over keys does."""
    k, v = grouped(self, k).float(), grouped(self, v).float()
    scores = q.float() @ k.transpose(2, 3) * self.head_dim**-0.5 + mask.float()
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    context = torch.zeros_like(q, dtype=torch.float32)
    for key in range(k.shape[2]):
        context = context + weights[..., key, None] * v[:, :, key, None]
    return (context / in_lanes(1)(weights)[..., None]).to(q.dtype).transpose(1, 2)


def _loop(id: str, about: str, apply: Change, **more: Any) -> Variant:
    return Variant(id, about, (), apply, kind="clean", **more)


CLEAN = (
    _loop("norm-loop", "norms sum their squares one after another", in_all_norms(loop_norm(in_lanes(1)))),
    _loop(
        "norm-loop-divides",
        "the same, and divide by the root",
        in_all_norms(loop_norm(in_lanes(1), divides=True)),
    ),
    _loop("norm-loop-fused", "the same in multiply-adds", in_all_norms(fused_add_norm)),
    _loop(
        "norm-loop-of-means",
        "norms sum squares that are already divided by their number",
        in_all_norms(loop_norm(in_lanes(1), each_divided=True)),
    ),
    _loop("norm-backwards", "norms sum from last to first", in_all_norms(loop_norm(in_lanes(1, backwards=True)))),
    _loop("norm-4-lanes", "norms in 4 running sums", in_all_norms(loop_norm(in_lanes(4)))),
    _loop("norm-8-lanes", "norms in 8 running sums", in_all_norms(loop_norm(in_lanes(8)))),
    _loop("norm-blocks", "norms add up sums of 4 neighbours", in_all_norms(loop_norm(in_blocks(4)))),
    _loop("norm-pairwise", "norms add halves to halves", in_all_norms(loop_norm(pairwise))),
    _loop("norm-double", "norms take their mean in float64", in_all_norms(double_norm)),
    _loop("rope-double", "RoPE's tables in float64", with_tables(doubles, torch.float64)),
    _loop("rope-double-frequencies", "RoPE's frequencies in float64", with_tables(doubles, torch.float32)),
    _loop("rope-exp-log", "RoPE's frequencies by exp and log", with_tables(exponentials, torch.float32)),
    _loop("rope-products", "each of RoPE's frequencies from the one before", with_tables(products, torch.float32)),
    _loop("linear-8-lanes", "products in 8 running sums", both(*(replaced(n, lanes_linear(8)) for n in LINEARS))),
    _loop("attention-loop", "attention summed key by key", replaced("self_attn", loop_attention, "attend")),
    _loop(
        "all-loops",
        "norms, tables, matrix products and attention without a library",
        both(
            *(replaced(n, lanes_linear(1)) for n in LINEARS),
            replaced("self_attn", loop_attention, "attend"),
            with_tables(exponentials, torch.float32),
            in_all_norms(loop_norm(in_lanes(1))),
        ),
    ),
)
