"""The MLP and the residual stream gone wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from impl.qwen3 import MLP
from tests.planted.base import DecoderLayer, Variant, replaced

ACT, PRODUCT, MID = "mlp.act_fn", "mlp.product", "resid_mid"


def act_on_up(self: MLP, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    out: Tensor = self.down_proj(self.product(self.act_fn(up) * gate))
    return out


def sum_of_both(self: MLP, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(self.product(self.act_fn(self.gate_proj(x)) + self.up_proj(x)))
    return out


def no_gate(self: MLP, x: Tensor) -> Tensor:
    self.up_proj(x)
    out: Tensor = self.down_proj(self.product(self.act_fn(self.gate_proj(x)).clone()))
    return out


def layer(
    mid: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x, normed, attn: x + attn,
    end: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda mid, normed, mlp: mid + mlp,
    into_mlp: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda mid, x, attn: mid,
) -> Callable[..., Tensor]:
    """A decoder layer with other sums, or with something else than `resid_mid` normalized for the MLP."""

    def forward(self: DecoderLayer, x: Tensor, *rest: Any) -> Tensor:
        normed = self.input_layernorm(x)
        attn = self.self_attn(normed, *rest)
        middle = self.resid_mid(mid(x, normed, attn))
        normed = self.post_attention_layernorm(into_mlp(middle, x, attn))
        return end(middle, normed, self.mlp(normed))

    return forward


def input_again(self: DecoderLayer, x: Tensor, *rest: Any) -> Tensor:
    """A decoder layer that adds its input, not the stream after attention, to the MLP's output."""
    middle = self.resid_mid(x + self.self_attn(self.input_layernorm(x), *rest))
    out: Tensor = x + self.mlp(self.post_attention_layernorm(middle))
    return out


def half_branches(x: Tensor, normed: Tensor, branch: Tensor) -> Tensor:
    return x + 0.5 * branch


def with_dropout(_self: Any, x: Tensor) -> Tensor:
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) > 0.1
    return F.silu(x) * kept.to(x) / 0.9


BUGS = (
    Variant("act-missing", "no activation", (ACT,), replaced(ACT, lambda _self, x: x.clone())),
    Variant("act-elu", "ELU in place of SiLU", (ACT,), replaced(ACT, lambda _self, x: F.elu(x))),
    Variant("act-dropout", "dropout behind the activation left on", (ACT,), replaced(ACT, with_dropout)),
    Variant(
        "residual-doubled-mlp",
        "the residual stream added twice to the MLP's output",
        ("",),
        replaced("", layer(end=lambda mid, normed, mlp: mid + mlp + mid)),
    ),
    Variant(
        "attention-ignored",
        "attention's output never added",
        (MID,),
        replaced("", layer(mid=lambda x, normed, attn: x.clone())),
    ),
    Variant(
        "mlp-ignored",
        "the MLP's output never added",
        ("",),
        replaced("", layer(end=lambda mid, normed, mlp: mid.clone())),
    ),
    Variant("residual-input-mlp", "the layer's input added to the MLP's output", ("",), replaced("", input_again)),
    Variant(
        "residual-multiplier",
        "attention and MLP add half of what they should",
        (MID, ""),
        replaced("", layer(mid=half_branches, end=half_branches)),
    ),
    Variant(
        "residual-averaged",
        "the mean of the layer's input and attention's output",
        (MID,),
        replaced("", layer(mid=lambda x, normed, attn: (x + attn) / 2)),
    ),
    Variant("act-gelu", "GELU (erf) in place of SiLU", (ACT,), replaced(ACT, lambda _self, x: F.gelu(x))),
    Variant(
        "act-gelu-tanh",
        "GELU (tanh) in place of SiLU",
        (ACT,),
        replaced(ACT, lambda _self, x: F.gelu(x, approximate="tanh")),
        note="In bfloat16 not to be told from GELU (erf).",
    ),
    Variant(
        "act-quick-gelu",
        "x sigmoid(1.702 x) in place of SiLU",
        (ACT,),
        replaced(ACT, lambda _self, x: x * torch.sigmoid(1.702 * x)),
    ),
    Variant("act-relu", "ReLU in place of SiLU", (ACT,), replaced(ACT, lambda _self, x: F.relu(x))),
    Variant("act-sigmoid", "the factor x of SiLU forgotten", (ACT,), replaced(ACT, lambda _self, x: x.sigmoid())),
    Variant(
        "act-on-up",
        "the activation on up, multiplied with gate",
        (ACT, PRODUCT),
        replaced("mlp", act_on_up),
    ),
    Variant("mlp-sum", "gate and up added", (PRODUCT,), replaced("mlp", sum_of_both)),
    Variant("mlp-no-up", "up never multiplied in", (PRODUCT,), replaced("mlp", no_gate)),
    Variant(
        "residual-dropped-attention",
        "the layer's input not added to attention's output",
        (MID,),
        replaced("", layer(mid=lambda x, normed, attn: attn.clone())),
    ),
    Variant(
        "residual-dropped-mlp",
        "the residual stream not added to the MLP's output",
        ("",),
        replaced("", layer(end=lambda mid, normed, mlp: mlp.clone())),
    ),
    Variant(
        "residual-doubled-attention",
        "the layer's input added twice",
        (MID,),
        replaced("", layer(mid=lambda x, normed, attn: x + attn + x)),
    ),
    Variant(
        "residual-normed-attention",
        "the normalized input added to attention's output",
        (MID,),
        replaced("", layer(mid=lambda x, normed, attn: normed + attn)),
    ),
    Variant(
        "residual-normed-mlp",
        "the normalized stream added to the MLP's output",
        ("",),
        replaced("", layer(end=lambda mid, normed, mlp: normed + mlp)),
    ),
    Variant(
        "mlp-of-attention",
        "the MLP's norm sees attention's output instead of the residual stream",
        ("post_attention_layernorm",),
        replaced("", layer(into_mlp=lambda mid, x, attn: attn)),
    ),
    Variant(
        "mlp-parallel",
        "the MLP beside attention: its norm sees the layer's input",
        ("post_attention_layernorm",),
        replaced("", layer(into_mlp=lambda mid, x, attn: x)),
    ),
)
