"""Weights loaded wrongly, and the two ends of the model: embedding and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.planted.base import LINEARS, Change, Qwen3, Variant, both, get, rebind, replaced, set_weight

Q, K, V = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"


def weight(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    """One weight of each layer replaced by `make(weight)`."""

    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        for i in layers:
            module = get(model, i, name)
            set_weight(module, make(module.weight))

    return apply


def weight_from(name: str, pick: Callable[[Qwen3, int], Tensor]) -> Change:
    """One weight of each layer replaced by `pick(model as loaded, layer)`."""

    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        chosen = {i: pick(model, i) for i in layers}
        for i, picked in chosen.items():
            set_weight(get(model, i, name), picked)

    return apply


def _swapped(a: str, b: str) -> Change:
    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        for i in layers:
            one, two = get(model, i, a), get(model, i, b)
            one.weight, two.weight = two.weight, one.weight

    return apply


def column_major(w: Tensor) -> Tensor:
    return w.t().contiguous().view(w.shape)


def interleaved_rows(model: Qwen3, i: int, name: str) -> Tensor:
    """The rows of each head in the order of a checkpoint for interleaved RoPE."""
    w, d = get(model, i, name).weight, model.config.head_dim
    return w.view(-1, 2, d // 2, w.shape[-1]).transpose(1, 2).reshape(w.shape)


def read_as_fp16(w: Tensor) -> Tensor:
    return w.bfloat16().view(torch.float16)


def byte_swapped(w: Tensor) -> Tensor:
    bits = w.bfloat16().contiguous().view(torch.uint8)
    return bits.view(*w.shape, 2).flip(-1).contiguous().view(torch.bfloat16).squeeze(-1)


def in_int8(w: Tensor) -> Tensor:
    step = w.float().abs().amax(-1, keepdim=True) / 127
    return (w.float() / step).round() * step


def without_channel(w: Tensor) -> Tensor:
    return torch.cat([w[:3], torch.zeros_like(w[3:4]), w[4:]])


def with_nan(w: Tensor) -> Tensor:
    return torch.cat([w[:5], torch.full_like(w[5:6], torch.nan), w[6:]])


def bias(name: str, make: Callable[[Tensor], Tensor | None]) -> Change:
    """The bias of one projection replaced by `make(weight)`."""

    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        for i in layers:
            module = get(model, i, name)
            values = make(module.weight)
            module.bias = None if values is None else nn.Parameter(values, requires_grad=False)

    return apply


def _ramp(w: Tensor) -> Tensor:
    return torch.linspace(-0.1, 0.1, w.shape[0]).to(w.dtype)


def bf16_sums(self: nn.Linear, x: Tensor) -> Tensor:
    parts = zip(x.bfloat16().split(16, -1), self.weight.bfloat16().split(16, -1), strict=True)
    total = sum((F.linear(a, w) for a, w in parts), start=torch.zeros((), dtype=torch.bfloat16))
    return (total if self.bias is None else total + self.bias.bfloat16()).to(x.dtype)


def in_tf32(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32_product(self: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(in_tf32(x), in_tf32(self.weight), self.bias)


def fp16_inputs(self: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.half().to(x.dtype), self.weight, self.bias)


def blocked_inputs(self: nn.Linear, x: Tensor) -> Tensor:
    """Inputs as llama.cpp hands them to an 8-bit kernel: 32 at a time, integers by one step that float16 holds."""
    parts = []
    for part in x.split(32, -1):
        largest = part.abs().amax(-1, keepdim=True)
        whole = torch.round(part * (127 / largest.clamp_min(1e-30)))
        parts.append(whole * (largest / 127).half().to(x.dtype))
    return F.linear(torch.cat(parts, -1), self.weight, self.bias)


def whole_inputs(self: nn.Linear, x: Tensor) -> Tensor:
    """Inputs as ONNX's DynamicQuantizeLinear has them, each prompt by itself: bytes, of which one stands for zero."""
    parts = []
    for prompt in x:
        low, high = min(float(prompt.min()), 0.0), max(float(prompt.max()), 0.0)
        step = torch.tensor(high - low) / 255
        zero = torch.round(torch.tensor(-low) / step)
        whole = (torch.round(prompt / step) + zero).clamp(0, 255)
        parts.append((whole - zero) * step)
    return F.linear(torch.stack(parts), self.weight, self.bias)


def row_inputs(self: nn.Linear, x: Tensor) -> Tensor:
    """Inputs as torchao has them, a token by itself: signed bytes of a step that is 2/255 of the largest."""
    largest = torch.maximum(-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
    step = largest / (255 / 2)
    whole = torch.clamp(torch.round(x * step.reciprocal()), -128, 127)
    return F.linear(whole * step, self.weight, self.bias)


def bf16_inputs(self: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.bfloat16().to(x.dtype), self.weight.bfloat16().to(x.dtype), self.bias)


def in_autocast(low: torch.dtype) -> Callable[..., Tensor]:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(low)
        return F.linear(x.to(low), self.weight.to(low), bias).to(x.dtype)

    return forward


def times(factor: float) -> Callable[..., Tensor]:
    return lambda self, x: (factor * F.linear(x.float(), self.weight.float())).to(x.dtype)


def bias_twice(self: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias) + self.bias


def _around_final_norm(read: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]) -> Change:
    """The head reads `read(norm, input of the norm, its output)`."""

    def apply(model: Qwen3, _layers: Sequence[int]) -> None:
        norm, seen = model.model.norm.forward, {}

        def remember(_self: nn.Module, x: Tensor) -> Tensor:
            seen["x"] = x
            return norm(x)

        rebind(model.model.norm, remember)
        rebind(model.lm_head, lambda self, x: F.linear(read(norm, seen.pop("x"), x), self.weight))

    return apply


def at_end(name: str, forward: Callable[..., Tensor]) -> Change:
    """Another forward for the embedding or the head."""
    return lambda model, _layers: rebind(model.get_submodule(name), forward)


def _scaled_embedding(model: Qwen3, _layers: Sequence[int]) -> None:
    root = model.config.hidden_size**0.5
    rebind(model.model.embed_tokens, lambda self, ids: F.embedding(ids, self.weight) * root)


def _another_head(model: Qwen3, _layers: Sequence[int]) -> None:
    noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(7))
    set_weight(model.lm_head, noise * model.lm_head.weight.float().std())


def _tied_head(model: Qwen3, _layers: Sequence[int]) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def _linear(forward: Callable[..., Tensor], names: Sequence[str] = LINEARS) -> Change:
    return both(*(replaced(name, forward) for name in names))


def _end(id: str, about: str, guilty: str, apply: Change, **more: Any) -> Variant:
    return Variant(id, about, (guilty,), apply, everywhere_only=True, **more)


def _logits(change: Callable[[Tensor], Tensor]) -> Change:
    return at_end(HEAD, lambda self, x: change(F.linear(x, self.weight)))


_LAYERS = (
    Variant(
        "weight-next-layer",
        "q_proj of the next layer",
        (Q,),
        weight_from(Q, lambda m, i: get(m, (i + 1) % len(m.model.layers), Q).weight),
        min_tokens=2,
        step=1,
    ),
    Variant("weight-kv-exchanged", "k_proj and v_proj exchanged at loading", (K, V), _swapped(K, V)),
    Variant("weight-gate-up-exchanged", "gate_proj and up_proj exchanged at loading", (GATE, UP), _swapped(GATE, UP)),
    Variant(
        "weight-rows-for-interleaved-k",
        "rows of k_proj permuted for a RoPE of the other kind",
        (K,),
        weight_from(K, lambda m, i: interleaved_rows(m, i, K)),
    ),
    Variant(
        "weight-rows-for-interleaved",
        "rows of q_proj and k_proj permuted for a RoPE of the other kind",
        (Q, K),
        both(*(weight_from(n, lambda m, i, n=n: interleaved_rows(m, i, n)) for n in (Q, K))),  # type: ignore[misc]
    ),
    Variant(
        "weight-stored-transposed",
        "v_proj read in column-major order (its transpose, where it is square)",
        (V,),
        weight(V, column_major),
    ),
    Variant("weight-read-as-fp16", "bfloat16 bits of v_proj read as float16", (V,), weight(V, read_as_fp16)),
    Variant(
        "weight-bytes-swapped",
        "down_proj read with the wrong endianness",
        (DOWN,),
        weight(DOWN, byte_swapped),
        kind="nonfinite",
        note="Numbers of any size, as a rule some not finite; what comes after cannot be judged.",
    ),
    Variant("weight-nan", "a row of down_proj is NaN", (DOWN,), weight(DOWN, with_nan), kind="nonfinite"),
    # Rounded once: a weight that is scaled and then rounded to bfloat16 has, as a whole, another factor than 1.01.
    Variant("weight-gain", "what down_proj returns 1 % too large", (DOWN,), replaced(DOWN, times(1.01))),
    Variant("channel-zero", "row 3 of down_proj is zero", (DOWN,), weight(DOWN, without_channel)),
    Variant("bias-added", "a bias on v_proj, which has none", (V,), bias(V, _ramp), needs="no bias"),
    Variant("bias-missing", "the bias of k_proj left out", (K,), bias(K, lambda _w: None), needs="wide"),
    Variant(
        "weight-int8",
        "all linear weights rounded to 8 bits, one step for each row",
        LINEARS,
        both(*(weight(name, in_int8) for name in LINEARS)),
        kind="precision",
    ),
    Variant(
        "sums-low",
        "matrix products summed in bfloat16, 16 terms at a time",
        LINEARS,
        _linear(bf16_sums),
        kind="precision",
        dtypes=("bfloat16",),
    ),
    Variant(
        "sums-bf16-in-fp32",
        "the same in a float32 port",
        LINEARS,
        _linear(bf16_sums),
        kind="precision",
        dtypes=("float32",),
    ),
    Variant(
        "products-q8-0-inputs",
        "inputs of matrix products rounded to 8-bit blocks of 32",
        LINEARS,
        _linear(blocked_inputs),
        kind="precision",
        dtypes=("float32",),
        needs="wide",
    ),
    Variant("bias-twice", "the bias of q_proj added twice", (Q,), replaced(Q, bias_twice), needs="wide"),
    *(
        Variant(id, about, LINEARS, _linear(forward), kind="precision", dtypes=("float32",))
        for id, about, forward in (
            ("products-tf32", "inputs and weights of matrix products rounded to 11 bits", tf32_product),
            ("products-bf16-inputs", "inputs of matrix products rounded to bfloat16", bf16_inputs),
            ("products-fp16-inputs", "inputs of matrix products rounded to float16", fp16_inputs),
            ("products-uint8-inputs", "inputs of matrix products in 256 steps of a prompt's range", whole_inputs),
            ("products-int8-rows", "inputs of matrix products in 255 steps of a token's range", row_inputs),
            ("products-bf16", "matrix products in bfloat16", in_autocast(torch.bfloat16)),
            ("products-fp16", "matrix products in float16", in_autocast(torch.float16)),
        )
    ),
)

_ENDS = (
    _end("embedding-scaled", "embeddings multiplied by sqrt(hidden)", EMBED, _scaled_embedding),
    _end(
        "embedding-row",
        "each token gets the embedding of the next id",
        EMBED,
        at_end(EMBED, lambda self, ids: F.embedding((ids + 1) % self.num_embeddings, self.weight)),
    ),
    _end(
        "embedding-gain",
        "embeddings 1.5 times as large",
        EMBED,
        at_end(EMBED, lambda self, ids: 1.5 * F.embedding(ids, self.weight)),
    ),
    _end(
        "embedding-position-added",
        "a sinusoid of the position added to the embeddings",
        EMBED,
        at_end(
            EMBED,
            lambda self, ids: (
                F.embedding(ids, self.weight) + 0.01 * torch.arange(ids.shape[1])[:, None].sin().to(self.weight)
            ),
        ),
    ),
    _end(
        "head-before-norm", "the head reads what the final norm read", HEAD, _around_final_norm(lambda norm, x, _y: x)
    ),
    _end("head-normed-twice", "the final norm twice", HEAD, _around_final_norm(lambda norm, _x, y: norm(y))),
    _end("logits-logprobs", "log-probabilities in place of logits", HEAD, _logits(lambda y: y.log_softmax(-1))),
    _end("head-never-loaded", "lm_head holds random numbers", HEAD, _another_head),
    _end("head-tied", "the embedding used for an untied lm_head", HEAD, _tied_head, needs="untied"),
    _end("head-row", "logits of the next id", HEAD, _logits(lambda y: y.roll(1, -1))),
    _end("logits-softcap", "logits capped at 30 by tanh", HEAD, _logits(lambda y: 30 * torch.tanh(y / 30))),
    _end("logits-scale", "logits 2 % too large", HEAD, at_end(HEAD, times(1.02))),
)

BUGS = (*_LAYERS, *_ENDS)
