"""Legal differences: other orders of summation, other places to round. None is a bug, all of them happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from impl.qwen3 import MLP, rope_tables, rotate
from tests.planted.attention import attending, grouped
from tests.planted.base import (
    LAYER_NORMS,
    LINEARS,
    Attention,
    Change,
    DecoderLayer,
    Place,
    Qwen3,
    RMSNorm,
    Variant,
    attention_with,
    both,
    get,
    rebind,
    replaced,
    unchanged,
)

Store = Callable[[Tensor], Tensor]


def sdpa(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = grouped(self, k), grouped(self, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def online_softmax(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention block by block of keys, as FlashAttention walks through them."""
    k, v = grouped(self, k).float(), grouped(self, v).float()
    top = torch.full((*q.shape[:3], 1), -torch.inf, device=q.device)
    total, context = torch.zeros_like(top), torch.zeros_like(q, dtype=torch.float32)
    for keys, values, hidden in zip(k.split(32, 2), v.split(32, 2), mask.float().split(32, 1), strict=True):
        scores = q.float() @ keys.transpose(2, 3) * self.head_dim**-0.5 + hidden
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, shrink = (scores - new_top).exp(), (top - new_top).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        context = context * shrink + weights @ values
        top = new_top
    return (context / total).to(q.dtype).transpose(1, 2)


def wide_attention(store: Store) -> Callable[..., Tensor]:
    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = grouped(self, k).float(), grouped(self, v).float()
        scores = q.float() @ k.transpose(2, 3) * self.head_dim**-0.5 + mask.float()
        return store(scores.softmax(-1) @ v).transpose(1, 2)

    return attend


def scaled_q(self: Attention, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return (q * self.head_dim**-0.5) @ k.transpose(2, 3) + mask


def wide_norm(store: Store) -> Callable[..., Tensor]:
    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide / (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return store(self.weight.float() * wide)

    return forward


def wide_linear(store: Store) -> Callable[..., Tensor]:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return store(F.linear(x.float(), self.weight.float(), bias))

    return forward


def wide_rope(model: Qwen3, store: Store) -> Callable[..., Tensor]:
    theta = model.config.rope_theta

    def turn(self: Attention, _which: str, x: Tensor, place: Place) -> Tensor:
        return store(rotate(x.float(), *rope_tables(place.positions, self.head_dim, theta, torch.float32)))

    return attention_with(turn)


def wide_mlp(store: Store) -> Callable[..., Tensor]:
    def forward(self: MLP, x: Tensor) -> Tensor:
        act = self.act_fn(self.gate_proj(x))
        out: Tensor = self.down_proj(self.product(store(act.float() * self.up_proj(x).float())))
        return out

    return forward


def wide_layer(store: Store) -> Callable[..., Tensor]:
    def forward(self: DecoderLayer, x: Tensor, *rest: Any) -> Tensor:
        x = self.resid_mid(store(x.float() + self.self_attn(self.input_layernorm(x), *rest).float()))
        return store(x.float() + self.mlp(self.post_attention_layernorm(x)).float())

    return forward


def rounded_to(model: Qwen3) -> Store:
    """Rounds to the dtype of the model's weights."""
    dtype = model.lm_head.weight.dtype
    return lambda wide: wide.to(dtype)


def truncated(wide: Tensor) -> Tensor:
    """float32 → bfloat16 by dropping the lower 16 bits."""
    bits = wide.float().contiguous().view(torch.int32)
    return (bits & -65536).view(torch.float32).bfloat16()


def wide_everywhere(store_of: Callable[[Qwen3], Store]) -> Change:
    """Every operation in float32 between inputs and outputs that went through `store_of(model)`."""

    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        store = store_of(model)
        for i in layers:
            for name in LAYER_NORMS:
                rebind(get(model, i, name), wide_norm(store))
            for name in LINEARS:
                rebind(get(model, i, name), wide_linear(store))
            rebind(get(model, i, "self_attn"), wide_rope(model, store))
            rebind(get(model, i, "self_attn"), wide_attention(store), "attend")
            rebind(get(model, i, "mlp"), wide_mlp(store))
            rebind(get(model, i, "mlp.act_fn"), lambda _self, x: store(F.silu(x.float())))
            rebind(model.model.layers[i], wide_layer(store))
        if len(layers) == len(model.model.layers):
            rebind(model.model.norm, wide_norm(store))
            rebind(model.lm_head, wide_linear(store))

    return apply


def in_all_linears(forward: Callable[..., Tensor]) -> Change:
    return both(*(replaced(name, forward) for name in LINEARS))


def split_sum(parts: int) -> Callable[..., Tensor]:
    """A matrix product whose inner axis is cut in `parts`; partial sums in float32."""

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        pairs = zip(x.float().chunk(parts, -1), self.weight.float().chunk(parts, -1), strict=True)
        total = sum((F.linear(a, w) for a, w in pairs), start=torch.zeros(()))
        return (total if self.bias is None else total + self.bias.float()).to(x.dtype)

    return forward


def one_after_another(self: nn.Linear, x: Tensor) -> Tensor:
    """A matrix product summed 8 terms at a time, first to last, as a plain loop would."""
    total = torch.zeros(*x.shape[:-1], self.weight.shape[0], device=x.device)
    for a, w in zip(x.float().split(8, -1), self.weight.float().split(8, -1), strict=True):
        for j in range(a.shape[-1]):
            total = total + a[..., j, None] * w[:, j]
    return (total if self.bias is None else total + self.bias.float()).to(x.dtype)


def _wide_norms(model: Qwen3, layers: Sequence[int]) -> None:
    for i in layers:
        for name in LAYER_NORMS:
            rebind(get(model, i, name), wide_norm(rounded_to(model)))


def _wide_rope(model: Qwen3, layers: Sequence[int]) -> None:
    for i in layers:
        rebind(get(model, i, "self_attn"), wide_rope(model, rounded_to(model)))


def _wide_attention(model: Qwen3, layers: Sequence[int]) -> None:
    for i in layers:
        rebind(get(model, i, "self_attn"), wide_attention(rounded_to(model)), "attend")


def _fused_qkv(model: Qwen3, layers: Sequence[int]) -> None:
    for i in layers:
        modules = [get(model, i, f"self_attn.{n}_proj") for n in "qkv"]
        for part, module in enumerate(modules):

            def forward(_self: nn.Linear, x: Tensor, part: int = part, modules: list[Any] = modules) -> Tensor:
                weight = torch.cat([m.weight for m in modules])
                bias = torch.cat([m.bias for m in modules]) if modules[0].bias is not None else None
                return F.linear(x, weight, bias).split([m.out_features for m in modules], -1)[part]

            rebind(module, forward)


def fused_swiglu(self: MLP, x: Tensor) -> Tensor:
    """silu(gate) * up on sums that were never rounded; what is recorded of them is rounded."""
    gate, up = (F.linear(x.float(), p.weight.float()) for p in (self.gate_proj, self.up_proj))
    for module in (self.gate_proj, self.up_proj):
        module(x)
    self.act_fn(gate.to(x.dtype))
    out: Tensor = self.down_proj(self.product((F.silu(gate) * up).to(x.dtype)))
    return out


def _wide_stream(*, recorded_wide: bool) -> Change:
    """The residual stream in float32 from the embedding to the final norm.

    Recorded as it is, or rounded to the model's dtype while the unrounded numbers flow on.
    """

    def apply(model: Qwen3, _layers: Sequence[int]) -> None:
        store = rounded_to(model)
        shown: Store = (lambda x: x) if recorded_wide else store
        kept: dict[str, Tensor] = {}

        def layer(self: DecoderLayer, x: Tensor, *rest: Any) -> Tensor:
            x = kept.pop("x", x).float()
            x = x + self.self_attn(self.input_layernorm(x), *rest).float()
            self.resid_mid(shown(x))
            x = x + self.mlp(self.post_attention_layernorm(x)).float()
            kept["x"] = x
            return shown(x)

        def final(self: RMSNorm, x: Tensor) -> Tensor:
            return wide_norm(store)(self, kept.pop("x", x))

        for block in model.model.layers:
            rebind(block, layer)
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                rebind(norm, wide_norm(store))
        rebind(model.model.norm, final)

    return apply


def _clean(id: str, about: str, apply: Change = unchanged, **more: Any) -> Variant:
    return Variant(id, about, (), apply, kind="clean", **more)


CLEAN = (
    _clean("plain", "the port as it is"),
    _clean("sdpa", "torch's fused attention", replaced("self_attn", sdpa, "attend")),
    _clean("online-softmax", "attention in blocks of keys", replaced("self_attn", online_softmax, "attend")),
    _clean("attention-fp32", "scores and probabilities in float32", _wide_attention),
    _clean("q-scaled-first", "queries scaled before the product", attending(scores=scaled_q)),
    _clean("ops-fp32", "every operation in float32, its output rounded", wide_everywhere(rounded_to)),
    _clean("norm-weight-fp32", "norms multiply their weight before rounding", _wide_norms),
    _clean("rope-fp32", "RoPE and its tables in float32", _wide_rope),
    _clean(
        "stream-fp32",
        "the residual stream in float32, recorded so",
        _wide_stream(recorded_wide=True),
        everywhere_only=True,
    ),
    _clean(
        "stream-fp32-rounded-dump",
        "the residual stream in float32, rounded copies recorded",
        _wide_stream(recorded_wide=False),
        everywhere_only=True,
        note="Operations saw unrounded inputs.",
    ),
    _clean("split-4", "matrix products in 4 partial sums", in_all_linears(split_sum(4))),
    _clean("sequential", "matrix products summed first to last", in_all_linears(one_after_another)),
    _clean("qkv-fused", "one matrix product for q, k and v", _fused_qkv),
    _clean(
        "swiglu-fused",
        "SwiGLU on unrounded sums, rounded copies recorded",
        replaced("mlp", fused_swiglu),
        note="Operations saw unrounded inputs.",
    ),
    _clean("batch-3", "the prompt three times in one batch", batch=3),
    _clean("threads-2", "two threads", threads=2),
    _clean("compiled-mlp", "torch.compile on each MLP", compile="mlp"),
    _clean("compiled", "torch.compile on the whole model", compile="."),
    _clean(
        "engine-fp32",
        "all in float32 where the reference is in bfloat16",
        engine_dtype="float32",
        dtypes=("bfloat16",),
    ),
    _clean("dump-fp32", "bfloat16 recorded as float32", dump_dtype="float32", dtypes=("bfloat16",)),
    _clean(
        "engine-fp32-dump-bf16",
        "all in float32, rounded copies recorded",
        engine_dtype="float32",
        dump_dtype="bfloat16",
        dtypes=("bfloat16",),
        note="Operations saw unrounded inputs.",
    ),
)

ROUNDING_MODE = (
    Variant(
        "outputs-truncated",
        "float32 → bfloat16 by dropping bits, in every operation",
        (
            *LAYER_NORMS,
            *LINEARS,
            "self_attn.q_rope",
            "self_attn.k_rope",
            "self_attn.context",
            "resid_mid",
            "mlp.act_fn",
            "mlp.product",
            "",
            "model.norm",
            "lm_head",
        ),
        wide_everywhere(lambda _model: truncated),
        kind="rounding-mode",
        dtypes=("bfloat16",),
        everywhere_only=True,
        note="Twice the floor and a gain of -0.28 % at every site, none of them wrong alone.",
    ),
)
