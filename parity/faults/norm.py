"""Norms: what is left out, eps, weights, and where rounding happens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import Fault, Number, Scope, attribute
from parity.faults.norm_changes import (
    ALL,
    IN_LAYER,
    QK,
    STREAM,
    adds_one,
    each,
    eps_of,
    exchangeable,
    exchanged,
    from_layer,
    has,
    has_layer,
    is_centred,
    left_out,
    mean_square,
    normalized,
    weighted,
    widened,
)
from parity.faults.parts import eps_name, forward, norms_of, plain, stored_as, together

LOW = "bfloat16 or float16"
Change = AbstractContextManager[None]


def _centred(norm: Any, x: Tensor) -> Tensor:
    up = widened(x)
    return weighted(norm, normalized(up - up.mean(-1, keepdim=True), eps_of(norm)), x.dtype)


def _one_plus(norm: Any, x: Tensor) -> Tensor:
    unit = normalized(widened(x), eps_of(norm))
    own: Tensor = norm.weight
    # Adding one in the dtype of the weight rounds most of all ways to do it, and so allows for each.
    return (unit * (1.0 + own)).to(x.dtype)


def _one_forgotten(norm: Any, x: Tensor) -> Tensor:
    unit = normalized(widened(x), eps_of(norm))
    own: Tensor = norm.weight
    return (unit * own.to(unit.dtype)).to(x.dtype)


def _unweighted(norm: Any, x: Tensor) -> Tensor:
    return normalized(widened(x), eps_of(norm)).to(x.dtype)


def _eps_outside(norm: Any, x: Tensor) -> Tensor:
    up = widened(x)
    return weighted(norm, up / (mean_square(up).sqrt() + eps_of(norm)), x.dtype)


def _without_eps(norm: Any, x: Tensor) -> Tensor:
    return weighted(norm, normalized(widened(x), 0.0), x.dtype)


def _by_length(norm: Any, x: Tensor) -> Tensor:
    up = widened(x)
    return weighted(norm, up * torch.rsqrt(up.pow(2).sum(-1, keepdim=True) + eps_of(norm)), x.dtype)


def _low_throughout(norm: Any, x: Tensor) -> Tensor:
    unit = x * torch.rsqrt(mean_square(x) + eps_of(norm))
    product: Tensor = unit * (1.0 + norm.weight) if adds_one(norm) else unit * norm.weight
    return product


def _inverse_rounded(norm: Any, x: Tensor) -> Tensor:
    up = widened(x)
    inverse = stored_as(torch.rsqrt(mean_square(up) + eps_of(norm)), torch.bfloat16)
    return weighted(norm, up * inverse, x.dtype)


def _other_order(norm: Any, x: Tensor) -> Tensor:
    unit = normalized(widened(x), eps_of(norm))
    own: Tensor = norm.weight
    return unit.to(x.dtype) * (1.0 + own) if adds_one(norm) else (unit * own.to(unit.dtype)).to(x.dtype)


def _mean_kept(norm: Any, x: Tensor) -> Tensor:
    unit = normalized(widened(x), eps_of(norm)).to(x.dtype)
    scaled: Tensor = unit * norm.weight if norm.weight is not None else unit
    return scaled + norm.bias if norm.bias is not None else scaled


def _eps(scope: Scope, eps: float) -> Change:
    return together(*(attribute(n, eps_name(n) or "eps", eps) for n in norms_of(scope).values()))


_SMALL = "hidden states whose mean square is not far above eps (early layers), or float32"

FAULTS: tuple[Fault, ...] = (
    Fault(
        "norm-skipped",
        "the norm is left out",
        STREAM,
        "apply the norm before what follows it",
        "candle#2021",
        "",
        plain(each(STREAM, left_out)),
        has(STREAM),
    ),
    Fault(
        "norm-eps",
        "the norm uses another eps than config.json",
        ALL,
        "read rms_norm_eps from config.json instead of a default",
        "aprender#1606",
        _SMALL,
        _eps,
        lambda s: bool(norms_of(s)),
        Number("eps", lambda s: eps_of(next(iter(norms_of(s).values()))), (1e-5, 1e-6, 1e-8, 1e-12, 1e-3)),
    ),
    Fault(
        "norm-eps-missing",
        "the norm has no eps",
        ALL,
        "add rms_norm_eps to the mean square",
        "",
        _SMALL,
        plain(each(ALL, _without_eps)),
        has(),
    ),
    Fault(
        "norm-eps-outside",
        "the norm adds eps to the root; the reference adds it to the mean square",
        ALL,
        "compute x * rsqrt(mean(x²) + eps)",
        "coremltools#2821",
        _SMALL,
        plain(each(ALL, _eps_outside)),
        has(),
    ),
    Fault(
        "norm-layernorm",
        "the norm subtracts the mean first (LayerNorm); the reference is an RMSNorm",
        ALL,
        "divide by the root mean square and subtract nothing",
        "mlx-examples#1308",
        "",
        plain(each(ALL, _centred)),
        has(),
    ),
    Fault(
        "norm-rms-for-layernorm",
        "the norm keeps the mean (RMSNorm); the reference is a LayerNorm",
        ALL,
        "subtract the mean and divide by the standard deviation",
        "",
        "",
        plain(lambda s: together(*(forward(n, partial(_mean_kept, n)) for n in norms_of(s).values() if is_centred(n)))),
        lambda s: any(is_centred(n) for n in norms_of(s).values()),
    ),
    Fault(
        "norm-length",
        "the norm divides by the length of the vector; the reference by its root mean square",
        ALL,
        "take the mean of the squares, not their sum",
        "",
        "",
        plain(each(ALL, _by_length)),
        has(),
    ),
    Fault(
        "norm-one-plus-w",
        "the norm multiplies by 1 + w; the reference by w",
        ALL,
        "multiply by the weight as it is (1 + w is Gemma's)",
        "mlx-lm#1623",
        "",
        plain(each(ALL, _one_plus)),
        has(test=lambda n: not adds_one(n)),
    ),
    Fault(
        "norm-one-forgotten",
        "the norm multiplies by w; the reference by 1 + w",
        ALL,
        "multiply by 1 + weight, or add the one when converting the checkpoint",
        "llama.cpp#5810",
        "",
        plain(each(ALL, _one_forgotten)),
        has(test=adds_one),
    ),
    Fault(
        "norm-unweighted",
        "the norm's weights are never applied",
        ALL,
        "load the norm's weights and multiply by them",
        "",
        "",
        plain(each(ALL, _unweighted)),
        has(),
    ),
    Fault(
        "norm-next-layer",
        "the norm has the weights of the next layer",
        (*IN_LAYER, *QK),
        "check how the checkpoint's layers are numbered",
        "TorchSpec#89",
        "",
        plain(from_layer(1)),
        has_layer(1),
    ),
    Fault(
        "norm-previous-layer",
        "the norm has the weights of the layer before",
        (*IN_LAYER, *QK),
        "check how the checkpoint's layers are numbered",
        "TorchSpec#89",
        "",
        plain(from_layer(-1)),
        has_layer(-1),
    ),
    Fault(
        "norm-exchanged",
        "the weights of the two norms of a layer change places",
        ("input_layernorm", "post_attention_layernorm"),
        "input_layernorm belongs before attention, post_attention_layernorm after it",
        "",
        "",
        plain(exchanged("input_layernorm", "post_attention_layernorm")),
        exchangeable("input_layernorm", "post_attention_layernorm"),
    ),
    Fault(
        "norm-not-upcast",
        "the norm is computed in the dtype of the model; the reference computes it in float32",
        ALL,
        "cast to float32 before squaring",
        "",
        LOW,
        plain(each(ALL, _low_throughout)),
        has(),
    ),
    Fault(
        "norm-inverse-bf16",
        "the norm rounds the inverse root mean square to bfloat16, one error for a whole row",
        ALL,
        "keep rsqrt(mean(x²) + eps) in float32 until it has been multiplied",
        "AMD/IRON#139",
        "",
        plain(each(ALL, _inverse_rounded)),
        has(),
    ),
    Fault(
        "norm-rounding-order",
        "the norm rounds before or after its weight where the reference does the other",
        ALL,
        "legal unless bit-equality is wanted: round to the model's dtype where the reference does",
        "vllm#42379",
        LOW,
        plain(each(ALL, _other_order)),
        has(),
    ),
)
