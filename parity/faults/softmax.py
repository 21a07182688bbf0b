"""Softmax, what bounds it, and how keys and values are kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from parity.faults.attend import (
    from_scratch,
    has_attention,
    has_sinks,
    reading,
    softcap_of,
    softmax_as,
    with_options,
)
from parity.faults.fault import Fault, Number, Scope
from parity.faults.parts import (
    plain,
    stored_as,
    wide,
)

INSIDE = ("scores", "context")
TWO_TOKENS = "two tokens or more"
Change = AbstractContextManager[None]


def _softmax_low(scores: Tensor) -> Tensor:
    raised = (scores - scores.amax(-1, keepdim=True)).exp()
    return raised / raised.sum(-1, keepdim=True)


def _softmax_bf16(scores: Tensor) -> Tensor:
    """Every step stored in bfloat16."""
    raised = stored_as((stored_as(scores, torch.bfloat16) - scores.amax(-1, keepdim=True)).exp(), torch.bfloat16)
    return stored_as(raised / stored_as(raised.sum(-1, keepdim=True), torch.bfloat16), torch.bfloat16)


def _softmax_plus_one(scores: Tensor) -> Tensor:
    """A logit of zero beside the scores takes its share and gives nothing."""
    up = torch.nn.functional.pad(scores.to(wide(scores.dtype)), (0, 1))
    return up.softmax(-1)[..., :-1]


def _capped(scope: Scope, cap: float) -> Change:
    # No cap is a cap at infinity, where the formula would be infinity times zero.
    return from_scratch(scope, lambda s: s if cap == float("inf") else torch.tanh(s / cap) * cap)


def _cap_applies(scope: Scope) -> bool:
    return has_attention(scope) and softcap_of(scope) is None and not has_sinks(scope)


def _in_fp8(x: Tensor) -> Tensor:
    return stored_as(x.clamp(-448.0, 448.0), torch.float8_e4m3fn)


def _in_int8(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, (x / step).round() * step, x)


def _cache_in(store: Callable[[Tensor], Tensor]) -> Callable[[Scope], Change]:
    return lambda scope: reading(scope, lambda q, k, v: (q, store(k), store(v)))


FAULTS: tuple[Fault, ...] = (
    Fault(
        "softmax-low",
        "softmax is computed in the dtype of the model; the reference computes it in float32",
        ("probs", "context"),
        "cast the scores to float32 before softmax",
        "",
        "bfloat16 or float16, and two tokens or more",
        plain(lambda _s: softmax_as(_softmax_low)),
        has_attention,
    ),
    Fault(
        "softmax-bf16",
        "softmax is computed in bfloat16",
        ("probs", "context"),
        "cast the scores to float32 before softmax",
        "",
        TWO_TOKENS,
        plain(lambda _s: softmax_as(_softmax_bf16)),
        has_attention,
    ),
    Fault(
        "softmax-plus-one",
        "softmax has a sink: one more logit, of zero, that takes part of the probability",
        ("probs", "context"),
        "let the probabilities of each row add up to one",
        "",
        "",
        plain(lambda _s: softmax_as(_softmax_plus_one)),
        lambda s: has_attention(s) and not has_sinks(s),
    ),
    Fault(
        "sinks-dropped",
        "the learned sinks are left out of softmax",
        INSIDE,
        "add the layer's sinks to the denominator of softmax",
        "vllm-metal#550",
        "",
        plain(lambda s: from_scratch(s, lambda scores: scores)),
        lambda s: has_attention(s) and has_sinks(s),
    ),
    Fault(
        "softcap-applied",
        "scores are capped by tanh; the reference does not cap them",
        INSIDE,
        "cap scores only where the config has attn_logit_softcapping",
        "",
        "scores that are not small beside the cap",
        _capped,
        _cap_applies,
        Number("cap", lambda _s: float("inf"), (50.0, 30.0, 20.0), discrete=True),
    ),
    Fault(
        "softcap-dropped",
        "scores are not capped; the reference caps them by tanh",
        INSIDE,
        "compute cap * tanh(scores / cap) with attn_logit_softcapping of the config",
        "vllm-metal#665",
        "scores that are not small beside the cap",
        plain(lambda s: with_options(s, softcap=None)),
        lambda s: has_attention(s) and softcap_of(s) is not None,
    ),
    Fault(
        "kv-cache-fp8",
        "keys and values are kept in float8 (e4m3)",
        INSIDE,
        "keep the cache in the dtype of the model, or compare with a reference that does the same",
        "",
        "",
        plain(_cache_in(_in_fp8)),
        has_attention,
    ),
    Fault(
        "kv-cache-int8",
        "keys and values are kept in 8-bit integers, one step for each head and token",
        INSIDE,
        "keep the cache in the dtype of the model, or compare with a reference that does the same",
        "",
        "",
        plain(_cache_in(_in_int8)),
        has_attention,
    ),
)
