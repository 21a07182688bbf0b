"""Bounds and factors that only a config tells: softcaps, SwiGLU's limit and alpha, sinks, multipliers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from parity.faults.fault import Change, Fault, Number, Scope, attribute, fault, weight
from parity.faults.patches.attention import INSIDE, has_attention, has_sinks, softcap_of, with_options
from parity.faults.patches.modules import HEAD_SITES, at_ends, attention_of, mlp_of

_LARGE = "numbers that are not small beside the cap"
_LOGITS = (*HEAD_SITES, "logits")
_EXPERTS = ("experts", "mlp", "feed_forward")


@fault(
    id="softcap-other",
    title="scores are capped by another number than config.json says",
    sites=INSIDE,
    fix="read attn_logit_softcapping from config.json",
    needs=_LARGE,
    applies=lambda s: has_attention(s) and softcap_of(s) is not None,
    number=Number(name="cap", expected=lambda s: softcap_of(s) or math.inf, typical=(50.0, 30.0, 20.0)),
)
def softcap_other(scope: Scope, cap: float) -> Change:
    return with_options(scope, softcap=cap)


@fault(
    id="sinks-zero",
    title="the learned sinks are zero: they were never loaded",
    sites=INSIDE,
    fix="load the layer's sinks; a softmax with a logit of zero is not one without any",
    applies=lambda s: has_attention(s) and has_sinks(s),
)
def sinks_zero(scope: Scope) -> Change:
    attention = attention_of(scope)
    return weight(attention, "sinks", torch.zeros_like(attention.sinks.data))


# -- SwiGLU of gpt-oss -------------------------------------------------------------------------------------------


def _experts(scope: Scope) -> Any:
    return getattr(mlp_of(scope), "experts", None)


def _has(name: str) -> Callable[[Scope], bool]:
    return lambda scope: getattr(_experts(scope), name, None) is not None


@fault(
    id="swiglu-alpha",
    title="SwiGLU's gate is multiplied by another alpha before its sigmoid",
    sites=_EXPERTS,
    fix="compute gate * sigmoid(1.702 * gate) * (up + 1)",
    applies=_has("alpha"),
    number=Number(name="alpha", expected=lambda s: float(_experts(s).alpha), typical=(1.0, 1.702)),
)
def swiglu_alpha(scope: Scope, alpha: float) -> Change:
    return attribute(_experts(scope), "alpha", alpha)


@fault(
    id="swiglu-limit",
    title="SwiGLU's gate and up are clamped to another limit than config.json says",
    sites=_EXPERTS,
    fix="read swiglu_limit from config.json",
    needs="gates or ups beyond the limit",
    applies=_has("limit"),
    number=Number(name="limit", expected=lambda s: float(_experts(s).limit), typical=(7.0, 10.0)),
)
def swiglu_limit(scope: Scope, limit: float) -> Change:
    return attribute(_experts(scope), "limit", limit)


@fault(
    id="swiglu-limit-missing",
    title="SwiGLU's gate and up are not clamped",
    sites=_EXPERTS,
    fix="clamp the gate from above and up on both sides to swiglu_limit of config.json",
    needs="gates or ups beyond the limit",
    applies=_has("limit"),
)
def swiglu_limit_missing(scope: Scope) -> Change:
    return attribute(_experts(scope), "limit", math.inf)


# -- the ends ----------------------------------------------------------------------------------------------------


def _final_cap(scope: Scope) -> float:
    return float(getattr(scope.config, "final_logit_softcapping", None) or math.inf)


def _caps_logits(scope: Scope) -> bool:
    return at_ends(scope) and _final_cap(scope) < math.inf


@fault(
    id="logits-softcap-dropped",
    title="logits are not capped; the reference caps them by tanh",
    sites=_LOGITS,
    fix="compute cap * tanh(logits / cap) with final_logit_softcapping of config.json",
    source="mlx-examples#857",
    needs=_LARGE,
    applies=_caps_logits,
)
def logits_softcap_dropped(scope: Scope) -> Change:
    return attribute(scope.config, "final_logit_softcapping", None)


@fault(
    id="logits-softcap-other",
    title="logits are capped by another number than config.json says",
    sites=_LOGITS,
    fix="read final_logit_softcapping from config.json",
    needs=_LARGE,
    applies=_caps_logits,
    number=Number(name="cap", expected=_final_cap, typical=(30.0, 50.0, 15.0)),
)
def logits_softcap_other(scope: Scope, cap: float) -> Change:
    return attribute(scope.config, "final_logit_softcapping", cap)


@fault(
    id="embedding-multiplier",
    title="embeddings are multiplied by another number than config.json says",
    sites=("rotary_emb.input",),
    fix="multiply the embeddings by embedding_multiplier of config.json",
    applies=lambda s: at_ends(s) and hasattr(s.model.base_model, "embedding_multiplier"),
    number=Number(
        name="embedding_multiplier",
        expected=lambda s: float(s.model.base_model.embedding_multiplier),
        typical=(1.0, 12.0),
        in_dtype=True,
    ),
)
def embedding_multiplier(scope: Scope, value: float) -> Change:
    return attribute(scope.model.base_model, "embedding_multiplier", value)


@fault(
    id="mlp-multiplier",
    title="the MLP's output is multiplied by another number than config.json says",
    sites=("mlp", "feed_forward"),
    fix="multiply what down_proj returns by the second of mlp_multipliers of config.json",
    applies=lambda s: isinstance(getattr(mlp_of(s), "down_multiplier", None), (int, float)),
    number=Number(name="mlp_multipliers[1]", expected=lambda s: float(mlp_of(s).down_multiplier), typical=(1.0,)),
)
def mlp_multiplier(scope: Scope, value: float) -> Change:
    return attribute(mlp_of(scope), "down_multiplier", value)


FAULTS: tuple[Fault, ...] = (
    softcap_other,
    sinks_zero,
    swiglu_alpha,
    swiglu_limit,
    swiglu_limit_missing,
    logits_softcap_dropped,
    logits_softcap_other,
    embedding_multiplier,
    mlp_multiplier,
)
