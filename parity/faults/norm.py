"""Norms: what is left out, eps, and weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import ANY_NORM, Change, Fault, Number, Scope, attribute, fault
from parity.faults.patches.modules import eps_name, forward, is_norm, norms_of, together
from parity.faults.patches.norm import (
    IN_LAYER,
    NORMS,
    QK_NORMS,
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

_SMALL = "hidden states whose mean square is not far above eps (early layers), or float32"


@fault(
    id="norm-skipped",
    title="the norm is left out",
    sites=STREAM,
    fix="apply the norm before what follows it",
    source="candle#2021",
    applies=has(STREAM),
)
def norm_skipped(scope: Scope) -> Change:
    return each(scope, STREAM, left_out)


def _norm_in_question(scope: Scope) -> Any:
    return scope.module if is_norm(scope.module) else next(iter(norms_of(scope).values()))


@fault(
    id="norm-eps",
    title="the norm uses another eps than config.json",
    sites=NORMS,
    fix="read rms_norm_eps from config.json instead of a default",
    source="aprender#1606",
    needs=_SMALL,
    applies=lambda s: bool(norms_of(s)),
    number=Number(
        name="eps",
        expected=lambda s: eps_of(_norm_in_question(s)),
        typical=(1e-5, 1e-6, 1e-8, 1e-12, 1e-3),
        method="typical-step",
    ),
)
def norm_eps(scope: Scope, eps: float) -> Change:
    return together(*(attribute(n, eps_name(n) or "eps", eps) for n in norms_of(scope).values()))


@fault(
    id="norm-eps-missing",
    title="the norm has no eps",
    sites=NORMS,
    fix="add rms_norm_eps to the mean square",
    needs=_SMALL,
    applies=has(),
)
def norm_eps_missing(scope: Scope) -> Change:
    return each(scope, NORMS, lambda norm, x: weighted(norm, normalized(widened(x), 0.0), x.dtype))


def _eps_outside(norm: Any, x: Tensor) -> Tensor:
    up = widened(x)
    return weighted(norm, up / (mean_square(up).sqrt() + eps_of(norm)), x.dtype)


@fault(
    id="norm-eps-outside",
    title="the norm adds eps to the root; the reference adds it to the mean square",
    sites=NORMS,
    fix="compute x * rsqrt(mean(x²) + eps)",
    source="coremltools#2821",
    needs=_SMALL,
    applies=has(),
)
def norm_eps_outside(scope: Scope) -> Change:
    return each(scope, NORMS, _eps_outside)


def _centred(norm: Any, x: Tensor) -> Tensor:
    up = widened(x)
    return weighted(norm, normalized(up - up.mean(-1, keepdim=True), eps_of(norm)), x.dtype)


@fault(
    id="norm-layernorm",
    title="the norm subtracts the mean first (LayerNorm); the reference is an RMSNorm",
    sites=NORMS,
    fix="divide by the root mean square and subtract nothing",
    source="mlx-examples#1308",
    applies=has(),
)
def norm_layernorm(scope: Scope) -> Change:
    return each(scope, NORMS, _centred)


def _mean_kept(norm: Any, x: Tensor) -> Tensor:
    unit = normalized(widened(x), eps_of(norm)).to(x.dtype)
    scaled: Tensor = unit * norm.weight if norm.weight is not None else unit
    return scaled + norm.bias if norm.bias is not None else scaled


@fault(
    id="norm-rms-for-layernorm",
    title="the norm keeps the mean (RMSNorm); the reference is a LayerNorm",
    sites=NORMS,
    fix="subtract the mean and divide by the standard deviation",
    applies=lambda s: any(is_centred(n) for n in norms_of(s).values()),
)
def norm_rms_for_layernorm(scope: Scope) -> Change:
    return together(*(forward(n, partial(_mean_kept, n)) for n in norms_of(scope).values() if is_centred(n)))


def _by_length(norm: Any, x: Tensor) -> Tensor:
    up = widened(x)
    return weighted(norm, up * torch.rsqrt(up.pow(2).sum(-1, keepdim=True) + eps_of(norm)), x.dtype)


@fault(
    id="norm-length",
    title="the norm divides by the length of the vector; the reference by its root mean square",
    sites=NORMS,
    fix="take the mean of the squares, not their sum",
    applies=has(),
)
def norm_length(scope: Scope) -> Change:
    return each(scope, NORMS, _by_length)


def _one_plus(norm: Any, x: Tensor) -> Tensor:
    unit = normalized(widened(x), eps_of(norm))
    own: Tensor = norm.weight
    # Adding one in the dtype of the weight rounds most of all ways to do it, and so allows for each.
    return (unit * (1.0 + own)).to(x.dtype)


@fault(
    id="norm-one-plus-w",
    title="the norm multiplies by 1 + w; the reference by w",
    sites=NORMS,
    fix="multiply by the weight as it is (1 + w is Gemma's)",
    source="mlx-lm#1623",
    applies=has(test=lambda n: not adds_one(n)),
)
def norm_one_plus_w(scope: Scope) -> Change:
    return each(scope, NORMS, _one_plus)


def _one_forgotten(norm: Any, x: Tensor) -> Tensor:
    unit = normalized(widened(x), eps_of(norm))
    own: Tensor = norm.weight
    return (unit * own.to(unit.dtype)).to(x.dtype)


@fault(
    id="norm-one-forgotten",
    title="the norm multiplies by w; the reference by 1 + w",
    sites=NORMS,
    fix="multiply by 1 + weight, or add the one when converting the checkpoint",
    source="llama.cpp#5810",
    applies=has(test=adds_one),
)
def norm_one_forgotten(scope: Scope) -> Change:
    return each(scope, NORMS, _one_forgotten)


def _two_plus(norm: Any, x: Tensor) -> Tensor:
    unit = normalized(widened(x), eps_of(norm))
    own: Tensor = norm.weight
    return (unit * (2.0 + own.to(unit.dtype))).to(x.dtype)


@fault(
    id="norm-one-twice",
    title="the norm multiplies by 2 + w; the reference by 1 + w",
    sites=NORMS,
    fix="add the one either when converting the checkpoint or in the norm, not in both",
    source="mold#1078",
    applies=has(test=adds_one),
)
def norm_one_twice(scope: Scope) -> Change:
    return each(scope, NORMS, _two_plus)


@fault(
    id="norm-unweighted",
    title="the norm's weights are never applied",
    sites=NORMS,
    fix="load the norm's weights and multiply by them",
    applies=has(),
)
def norm_unweighted(scope: Scope) -> Change:
    return each(scope, NORMS, lambda norm, x: normalized(widened(x), eps_of(norm)).to(x.dtype))


@fault(
    id="norm-next-layer",
    title="the norm has the weights of the next layer",
    sites=(*IN_LAYER, *QK_NORMS, ANY_NORM),
    fix="check how the checkpoint's layers are numbered",
    source="TorchSpec#89",
    applies=has_layer(1),
)
def norm_next_layer(scope: Scope) -> Change:
    return from_layer(scope, 1)


@fault(
    id="norm-previous-layer",
    title="the norm has the weights of the layer before",
    sites=(*IN_LAYER, *QK_NORMS, ANY_NORM),
    fix="check how the checkpoint's layers are numbered",
    source="TorchSpec#89",
    applies=has_layer(-1),
)
def norm_previous_layer(scope: Scope) -> Change:
    return from_layer(scope, -1)


@fault(
    id="norm-exchanged",
    title="the weights of the two norms of a layer change places",
    sites=("input_layernorm", "post_attention_layernorm"),
    fix="input_layernorm belongs before attention, post_attention_layernorm after it",
    applies=exchangeable("input_layernorm", "post_attention_layernorm"),
)
def norm_exchanged(scope: Scope) -> Change:
    return exchanged(scope, "input_layernorm", "post_attention_layernorm")


FAULTS: tuple[Fault, ...] = (
    norm_skipped,
    norm_eps,
    norm_eps_missing,
    norm_eps_outside,
    norm_layernorm,
    norm_rms_for_layernorm,
    norm_length,
    norm_one_plus_w,
    norm_one_forgotten,
    norm_one_twice,
    norm_unweighted,
    norm_next_layer,
    norm_previous_layer,
    norm_exchanged,
)
