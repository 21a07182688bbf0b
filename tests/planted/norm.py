"""Norms gone wrong: the layers' own, QK-norm, and the final one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from impl.qwen3 import rotate
from tests.planted.base import (
    LAYER_NORMS,
    ROPE,
    Attention,
    Cache,
    Change,
    Qwen3,
    RMSNorm,
    Variant,
    both,
    get,
    norms,
    rebind,
    replaced,
    set_weight,
)

IN, POST = "input_layernorm", "post_attention_layernorm"
QN, KN = "self_attn.q_norm", "self_attn.k_norm"


def scaled(x: Tensor, size: Tensor, weight: Tensor) -> Tensor:
    """x / size * weight with the rounding of a correct RMSNorm."""
    return weight * (x.float() / size).to(x.dtype)


def mean_square(x: Tensor) -> Tensor:
    return x.float().pow(2).mean(-1, keepdim=True)


def one_plus(self: RMSNorm, x: Tensor) -> Tensor:
    return scaled(x, (mean_square(x) + self.eps).sqrt(), 1 + self.weight)


def eps_outside(self: RMSNorm, x: Tensor) -> Tensor:
    return scaled(x, mean_square(x).sqrt() + self.eps, self.weight)


def no_eps(self: RMSNorm, x: Tensor) -> Tensor:
    return scaled(x, mean_square(x).sqrt(), self.weight)


def layer_norm(self: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    return scaled(wide.to(x.dtype), (mean_square(wide) + self.eps).sqrt(), self.weight)


def l2_norm(self: RMSNorm, x: Tensor) -> Tensor:
    return scaled(x, (x.float().pow(2).sum(-1, keepdim=True) + self.eps).sqrt(), self.weight)


def no_weight(self: RMSNorm, x: Tensor) -> Tensor:
    return scaled(x, (mean_square(x) + self.eps).sqrt(), torch.ones_like(self.weight))


def skipped(_self: RMSNorm, x: Tensor) -> Tensor:
    return x.clone()


def over_all_heads(self: RMSNorm, x: Tensor) -> Tensor:
    size = (mean_square(x).mean(-2, keepdim=True) + self.eps).sqrt()
    return scaled(x, size, self.weight)


def in_its_own_dtype(self: RMSNorm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def inverse_in_bf16(self: RMSNorm, x: Tensor) -> Tensor:
    inverse = torch.rsqrt(mean_square(x) + self.eps).bfloat16().float()
    return self.weight * (x.float() * inverse).to(x.dtype)


def mean_size(self: RMSNorm, x: Tensor) -> Tensor:
    return scaled(x, x.float().abs().mean(-1, keepdim=True) + self.eps, self.weight)


def eps_of(value: float, *names: str) -> Change:
    """Another eps in the norms of these names; in every norm of the model if no name is given."""

    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        chosen = [get(model, i, n) for i in layers for n in names] if names else norms(model, layers)
        for norm in chosen:
            norm.eps = value

    return apply


def weights_from(pick: Callable[[Qwen3, int], dict[str, Tensor]]) -> Change:
    """Norm weights replaced by `pick(model, layer)`: {name of a norm in the layer: weights}."""

    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        chosen = {i: pick(model, i) for i in layers}
        for i, weights in chosen.items():
            for name, weight in weights.items():
                set_weight(get(model, i, name), weight)

    return apply


def _layer_on(step: int, name: str) -> Change:
    def pick(model: Qwen3, i: int) -> dict[str, Tensor]:
        return {name: get(model, (i + step) % len(model.model.layers), name).weight}

    return weights_from(pick)


def _exchanged(model: Qwen3, i: int) -> dict[str, Tensor]:
    return {IN: get(model, i, POST).weight, POST: get(model, i, IN).weight}


def after_rope(self: Attention, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
    b, t, _ = x.shape
    q, k, v = (p(x).view(b, t, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
    q, k = (rotate(heads.transpose(1, 2), cos, sin).transpose(1, 2) for heads in (q, k))
    q, k = self.q_rope(self.q_norm(q).transpose(1, 2)), self.k_rope(self.k_norm(k).transpose(1, 2))
    v = v.transpose(1, 2)
    if cache is not None:
        k, v = cache.extend(self.layer, k, v)
    out: Tensor = self.o_proj(self.context(self.attend(q, k, v, mask)).reshape(b, t, -1))
    return out


def _final_norm(forward: Callable[..., Tensor]) -> Change:
    return lambda model, _layers: rebind(model.model.norm, forward)


_EPS = "Felt only where the mean square of the input is not far above eps: in bfloat16 the first layers at most."

BUGS = (
    Variant("norm-one-plus-w", "weights taken as offsets from one", (IN,), replaced(IN, one_plus)),
    Variant(
        "norm-eps-1e-5",
        "eps 1e-5 in the first norm of the layer",
        (IN,),
        eps_of(1e-5, IN),
        note=_EPS,
        dtypes=("float32",),
    ),
    Variant("norm-eps-1e-3", "eps 1e-3 in the first norm of the layer", (IN,), eps_of(1e-3, IN), note=_EPS),
    Variant(
        "norm-eps-1e-3-all",
        "eps 1e-3 in every norm",
        (*LAYER_NORMS, "model.norm"),
        eps_of(1e-3),
        note=_EPS + " Not every guilty norm shows it.",
        everywhere_only=True,
    ),
    Variant(
        "norm-eps-outside",
        "eps added to the root, not to the mean square",
        (IN,),
        replaced(IN, eps_outside),
        note=_EPS,
        dtypes=("float32",),
    ),
    Variant("norm-eps-missing", "no eps at all", (IN,), replaced(IN, no_eps), note=_EPS, dtypes=("float32",)),
    Variant("norm-layernorm", "LayerNorm: the mean is subtracted first", (IN,), replaced(IN, layer_norm)),
    Variant("norm-length", "divided by the length, not the root mean square", (POST,), replaced(POST, l2_norm)),
    Variant("norm-unweighted", "the weights are never applied", (POST,), replaced(POST, no_weight)),
    Variant("norm-next-layer", "weights of the next layer", (IN,), _layer_on(1, IN), step=1),
    Variant("norm-previous-layer", "weights of the layer before", (POST,), _layer_on(-1, POST), step=-1),
    Variant(
        "norm-not-upcast",
        "the norm computed in the dtype of the model",
        (IN,),
        replaced(IN, in_its_own_dtype),
        kind="precision",
        dtypes=("bfloat16",),
    ),
    Variant(
        "norm-inverse-bf16",
        "the inverse root mean square rounded to bfloat16",
        (POST,),
        replaced(POST, inverse_in_bf16),
        kind="precision",
    ),
    Variant("norm-mean-size", "divided by the mean size, not the root mean square", (IN,), replaced(IN, mean_size)),
    Variant("norm-exchanged", "the two norms of a layer exchanged", (IN, POST), weights_from(_exchanged)),
    Variant("norm-skipped", "the first norm left out", (IN,), replaced(IN, skipped)),
    Variant(
        "norm-skipped-final",
        "logits from the last layer without the final norm",
        ("model.norm",),
        _final_norm(skipped),
        everywhere_only=True,
    ),
    Variant(
        "norm-one-plus-w-final",
        "weights of the final norm taken as offsets from one",
        ("model.norm",),
        _final_norm(one_plus),
        everywhere_only=True,
    ),
    Variant(
        "qk-norm-skipped",
        "no QK-norm",
        (QN, KN),
        both(replaced(QN, skipped), replaced(KN, skipped)),
        min_tokens=2,
    ),
    Variant("qk-norm-skipped-q", "no norm on the queries", (QN,), replaced(QN, skipped), min_tokens=2),
    Variant("qk-norm-skipped-k", "no norm on the keys", (KN,), replaced(KN, skipped), min_tokens=2),
    Variant(
        "qk-norm-after-rope",
        "QK-norm after RoPE",
        (QN, KN, *ROPE),
        replaced("self_attn", after_rope),
        note="The same as before RoPE wherever the weights are uniform.",
        min_tokens=2,
    ),
    Variant(
        "qk-norm-joint",
        "QK-norm over all heads together",
        (QN, KN),
        both(replaced(QN, over_all_heads), replaced(KN, over_all_heads)),
    ),
    Variant(
        "qk-norm-exchanged",
        "q_norm and k_norm exchanged",
        (QN, KN),
        weights_from(lambda m, i: {QN: get(m, i, KN).weight, KN: get(m, i, QN).weight}),
    ),
)
