"""Checkpoints damaged on disk, as a conversion script would, and loaded by an unchanged port."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from impl.qwen3 import Config
from tests.planted.base import LAYER_NORMS, LINEARS, Damage, Variant, unchanged

Q, K, V, O = (f"self_attn.{n}_proj" for n in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{n}_proj" for n in ("gate", "up", "down"))
POST = "post_attention_layernorm"


def key(layer: int, name: str) -> str:
    """What the file calls a weight."""
    return f"model.layers.{layer}.{name}.weight"


def stored(make: Callable[[Tensor, Config], Tensor], *names: str) -> Damage:
    """Weights become `make(weight, config)`."""

    def damage(tensors: dict[str, Tensor], config: Config, layers: Sequence[int]) -> None:
        for i in layers:
            for name in names:
                tensors[key(i, name)] = make(tensors[key(i, name)], config)

    return damage


def moved(step: int, *names: str) -> Damage:
    """Weights are those of the layer `step` layers on, counted in a circle."""

    def damage(tensors: dict[str, Tensor], config: Config, layers: Sequence[int]) -> None:
        sound = dict(tensors)
        for i in layers:
            for name in names:
                tensors[key(i, name)] = sound[key((i + step) % config.num_hidden_layers, name)]

    return damage


def with_bias(make: Callable[[Tensor, Config], Tensor], name: str) -> Damage:
    """A weight and its bias become `make(numbers, config)`."""

    def damage(tensors: dict[str, Tensor], config: Config, layers: Sequence[int]) -> None:
        for i in layers:
            for part in (key(i, name), key(i, name).replace("weight", "bias")):
                tensors[part] = make(tensors[part], config)

    return damage


def exchanged(one: str, other: str) -> Damage:
    def damage(tensors: dict[str, Tensor], config: Config, layers: Sequence[int]) -> None:
        for i in layers:
            a, b = key(i, one), key(i, other)
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return damage


# -- order ---------------------------------------------------------------------------------------------------


def read_by_columns(w: Tensor, _config: Config) -> Tensor:
    return w.flatten().view(w.shape[1], w.shape[0]).t()


def written_by_columns(w: Tensor, _config: Config) -> Tensor:
    return w.t().flatten().view(w.shape)


def pairs_to_halves(w: Tensor, config: Config) -> Tensor:
    heads = w.unflatten(0, (-1, config.head_dim))
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).flatten(0, 1)


def by_query_heads(w: Tensor, config: Config) -> Tensor:
    heads = w.unflatten(0, (config.num_attention_heads, 2, -1))
    return heads.transpose(1, 2).flatten(0, 2)


def columns_rolled(w: Tensor, _config: Config) -> Tensor:
    return w.roll(1, 1)


# -- numbers -------------------------------------------------------------------------------------------------


def bits_as_fp16(w: Tensor, _config: Config) -> Tensor:
    return w.bfloat16().view(torch.float16)


def other_endian(w: Tensor, _config: Config) -> Tensor:
    bits = w.bfloat16().view(torch.int16).int()
    return (((bits & 0xFF) << 8) | ((bits >> 8) & 0xFF)).to(torch.int16).view(torch.bfloat16)


def in_steps(levels: int) -> Callable[[Tensor, Config], Tensor]:
    """Whole steps, `levels` of them up to the largest number of each row."""

    def make(w: Tensor, _config: Config) -> Tensor:
        step = w.float().abs().amax(1, keepdim=True) / levels
        return (w.float() / step).round() * step

    return make


def in_float8(w: Tensor, _config: Config) -> Tensor:
    step = w.float().abs().amax(1, keepdim=True) / 448
    return (w.float() / step).to(torch.float8_e4m3fn).float() * step


def in_q8_0(w: Tensor, _config: Config) -> Tensor:
    blocks = w.float().unflatten(1, (-1, 32))
    step = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    return ((blocks / step).round() * step).flatten(1)


def cut_to_bf16(w: Tensor, _config: Config) -> Tensor:
    return (w.contiguous().view(torch.int32) & -65536).view(torch.float32)


def rounded_to_bf16(w: Tensor, _config: Config) -> Tensor:
    return w.bfloat16().float()


def cut_to_4_bits(w: Tensor, _config: Config) -> Tensor:
    return (w.float().view(torch.int32) & -(1 << 19)).view(torch.float32)


def zeros(w: Tensor, _config: Config) -> Tensor:
    return torch.zeros_like(w)


def ones(w: Tensor, _config: Config) -> Tensor:
    return torch.ones_like(w)


def noise(w: Tensor, _config: Config) -> Tensor:
    return torch.randn(w.shape, generator=torch.Generator().manual_seed(7)).to(w.dtype) * w.std()


def _file(id: str, about: str, damage: Damage, *guilty: str, **more: Any) -> Variant:
    return Variant(id, about, guilty, unchanged, damage=damage, **more)


_FP32: dict[str, Any] = {"needs": "wide", "kind": "precision", "dtypes": ("float32",)}
_EVERYTHING = (*LINEARS, *LAYER_NORMS)

BUGS = (
    _file("weight-transposed", "o_proj read column by column", stored(read_by_columns, O), O),
    _file(
        "weight-stored-transposed-in-file", "gate_proj written column by column", stored(written_by_columns, GATE), GATE
    ),
    _file(
        "weight-rows-for-halves", "rows of q and k permuted from pairs to halves", stored(pairs_to_halves, Q, K), Q, K
    ),
    _file(
        "weight-k-rows-by-query-heads", "rows of k split by q's heads", with_bias(by_query_heads, K), K, needs="wide"
    ),
    _file("file-columns-rolled", "columns of up_proj one to the right", stored(columns_rolled, UP), UP),
    _file("weight-qk-exchanged", "q_proj and k_proj exchanged", exchanged(Q, K), Q, K, needs="mha"),
    _file("weight-gate-up-exchanged-in-file", "gate_proj and up_proj exchanged", exchanged(GATE, UP), GATE, UP),
    _file("weight-previous-layer", "down_proj of the layer before", moved(-1, DOWN), DOWN, step=-1),
    _file("file-layers-off-by-one", "all weights of the next layer", moved(1, *_EVERYTHING), *_EVERYTHING, step=1),
    _file(
        "weight-read-as-fp16-in-file", "bfloat16 bits of gate_proj stored as float16", stored(bits_as_fp16, GATE), GATE
    ),
    _file("weight-bytes-swapped-in-file", "bytes of k_proj swapped", stored(other_endian, K), K, kind="nonfinite"),
    _file("weight-int8-in-file", "q_proj in 8-bit integers", stored(in_steps(127), Q), Q, kind="precision"),
    _file("file-int4", "up_proj in 4-bit integers", stored(in_steps(7), UP), UP, kind="precision"),
    _file("weight-fp8", "o_proj in float8", stored(in_float8, O), O, kind="precision"),
    _file(
        "weight-8bit-blocks",
        "down_proj in blocks of 32 8-bit integers",
        stored(in_q8_0, DOWN),
        DOWN,
        needs="wide",
        kind="precision",
    ),
    _file("weight-truncated-bf16", "float32 v_proj cut to bfloat16", stored(cut_to_bf16, V), V, **_FP32),
    _file("weight-rounded-bf16", "float32 up_proj rounded to bfloat16", stored(rounded_to_bf16, UP), UP, **_FP32),
    _file("file-cut-to-4-bits", "v_proj with four bits of mantissa", stored(cut_to_4_bits, V), V, kind="precision"),
    _file("weight-zero", "up_proj never written", stored(zeros, UP), UP),
    _file("norm-unweighted-in-file", "the norm before the MLP never written", stored(ones, POST), POST),
    _file("file-never-loaded", "o_proj of random numbers", stored(noise, O), O),
)
