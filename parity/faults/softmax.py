"""Softmax: its numbers, its sinks, and what bounds the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from parity.faults.fault import TWO_TOKENS, Change, Fault, Number, Scope, fault
from parity.faults.patches.attention import (
    INSIDE,
    from_scratch,
    has_attention,
    has_sinks,
    softcap_of,
    softmax_as,
    with_options,
)
from parity.faults.patches.numbers import stored_as, wide


def _softmax_low(scores: Tensor) -> Tensor:
    raised = (scores - scores.amax(-1, keepdim=True)).exp()
    return raised / raised.sum(-1, keepdim=True)


@fault(
    id="softmax-low",
    title="softmax is computed in the dtype of the model; the reference computes it in float32",
    sites=("probs", "context"),
    fix="cast the scores to float32 before softmax",
    needs="bfloat16 or float16, and two tokens or more",
    applies=has_attention,
    only_rounds=True,
)
def softmax_low(_scope: Scope) -> Change:
    return softmax_as(_softmax_low)


def _bf16(x: Tensor) -> Tensor:
    return stored_as(x, torch.bfloat16)


def _raised_bf16(scores: Tensor) -> Tensor:
    """The exponentials, each step of theirs stored in bfloat16."""
    scores = _bf16(scores)
    return _bf16(_bf16(scores - scores.amax(-1, keepdim=True)).exp())


def _softmax_bf16(scores: Tensor) -> Tensor:
    """Every step stored in bfloat16."""
    raised = _raised_bf16(scores)
    return _bf16(raised / _bf16(raised.sum(-1, keepdim=True)))


@fault(
    id="softmax-bf16",
    title="softmax is computed in bfloat16",
    sites=("probs", "context"),
    fix="cast the scores to float32 before softmax",
    needs=TWO_TOKENS,
    applies=has_attention,
)
def softmax_bf16(_scope: Scope) -> Change:
    return softmax_as(_softmax_bf16)


def _softmax_stored_bf16(scores: Tensor) -> Tensor:
    """Between two bfloat16 tensors it is computed wide, as torch's own kernel does."""
    return _bf16(_bf16(scores).softmax(-1))


@fault(
    id="softmax-stored-bf16",
    title="softmax takes scores in bfloat16 and returns probabilities in bfloat16",
    sites=("probs", "context"),
    fix="keep the scores and the probabilities in float32 around softmax",
    needs=TWO_TOKENS,
    applies=has_attention,
)
def softmax_stored_bf16(_scope: Scope) -> Change:
    return softmax_as(_softmax_stored_bf16)


def _softmax_sum_bf16(scores: Tensor) -> Tensor:
    """Every step is stored in bfloat16, the sum after each of its terms."""
    raised = _raised_bf16(scores)
    total = torch.zeros_like(raised[..., 0])
    for term in raised.unbind(-1):
        total = _bf16(total + term)
    return _bf16(raised / total.unsqueeze(-1))


@fault(
    id="softmax-sum-bf16",
    title="softmax adds its terms one after another in bfloat16",
    sites=("probs", "context"),
    fix="add the exponentials up in float32",
    needs=TWO_TOKENS,
    applies=has_attention,
)
def softmax_sum_bf16(_scope: Scope) -> Change:
    return softmax_as(_softmax_sum_bf16)


def _softmax_plus_one(scores: Tensor) -> Tensor:
    """A logit of zero beside the scores takes its share and gives nothing."""
    up = torch.nn.functional.pad(scores.to(wide(scores.dtype)), (0, 1))
    return up.softmax(-1)[..., :-1]


@fault(
    id="softmax-plus-one",
    title="softmax has a sink: one more logit, of zero, that takes part of the probability",
    sites=("probs", "context"),
    fix="let the probabilities of each row add up to one",
    applies=lambda s: has_attention(s) and (not has_sinks(s)),
)
def softmax_plus_one(_scope: Scope) -> Change:
    return softmax_as(_softmax_plus_one)


@fault(
    id="sinks-dropped",
    title="the learned sinks are left out of softmax",
    sites=INSIDE,
    fix="add the layer's sinks to the denominator of softmax",
    source="vllm-metal#550",
    applies=lambda s: has_attention(s) and has_sinks(s),
)
def sinks_dropped(scope: Scope) -> Change:
    return from_scratch(scope, lambda scores: scores)


def _cap_applies(scope: Scope) -> bool:
    return has_attention(scope) and softcap_of(scope) is None and not has_sinks(scope)


@fault(
    id="softcap-applied",
    title="scores are capped by tanh; the reference does not cap them",
    sites=INSIDE,
    fix="cap scores only where the config has attn_logit_softcapping",
    needs="scores that are not small beside the cap",
    applies=_cap_applies,
    number=Number(name="cap", expected=lambda _s: float("inf"), typical=(50.0, 30.0, 20.0), discrete=True),
)
def softcap_applied(scope: Scope, cap: float) -> Change:
    # No cap is a cap at infinity, where the formula would be infinity times zero.
    return from_scratch(scope, lambda s: s if cap == float("inf") else torch.tanh(s / cap) * cap)


@fault(
    id="softcap-dropped",
    title="scores are not capped; the reference caps them by tanh",
    sites=INSIDE,
    fix="compute cap * tanh(scores / cap) with attn_logit_softcapping of the config",
    source="vllm-metal#665",
    needs="scores that are not small beside the cap",
    applies=lambda s: has_attention(s) and softcap_of(s) is not None,
)
def softcap_dropped(scope: Scope) -> Change:
    return with_options(scope, softcap=None)


FAULTS: tuple[Fault, ...] = (
    softmax_low,
    softmax_bf16,
    softmax_stored_bf16,
    softmax_sum_bf16,
    softmax_plus_one,
    sinks_dropped,
    softcap_applied,
    softcap_dropped,
)
