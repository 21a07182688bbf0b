"""The router of a mixture of experts: which experts are chosen, and what they weigh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import Change, Fault, Number, Scope, attribute, fault
from parity.faults.patches.modules import buffer, together
from parity.faults.patches.numbers import stored_as
from parity.faults.patches.router import (
    BLOCK,
    experts_of,
    factor_of,
    finished,
    has_bias,
    has_groups,
    is_sparse_mixer,
    renormalizes,
    reweighted,
    router_of,
    scores_of,
    weighs_before,
    with_other,
)
from parity.record.experts import experts_in

# Where a fault shows if the router recorded nothing, too.
_WEIGHTS = ("experts.weights", "router", *BLOCK)
_CHOICE = ("experts.chosen", *BLOCK)


# -- weights -------------------------------------------------------------------------------------------------


@fault(
    id="moe-not-renormalized",
    title="the chosen experts' weights are used as they are; the reference makes them add up to one",
    sites=_WEIGHTS,
    fix="divide the top-k weights by their sum where config.json says norm_topk_prob",
    source="Megatron-LM#1593",
    applies=lambda s: renormalizes(s) is True,
)
def moe_not_renormalized(scope: Scope) -> Change:
    def weights(logits: Tensor, index: Tensor, _weights: Tensor) -> Tensor:
        return scores_of(scope, logits).gather(1, index) * factor_of(scope)

    return reweighted(scope, weights)


@fault(
    id="moe-renormalized",
    title="the chosen experts' weights are made to add up to one; the reference uses them as they are",
    sites=_WEIGHTS,
    fix="leave the top-k weights as they are where config.json says norm_topk_prob is false",
    source="mlxcel#391",
    applies=lambda s: renormalizes(s) is False,
)
def moe_renormalized(scope: Scope) -> Change:
    return reweighted(scope, lambda _l, _i, weights: weights / weights.sum(-1, keepdim=True) * factor_of(scope))


@fault(
    id="moe-scaling-factor",
    title="all experts' weights are multiplied by another factor, or by none",
    sites=_WEIGHTS,
    fix="multiply them by routed_scaling_factor of config.json",
    source="mlx-lm#1354",
    applies=lambda s: router_of(s) is not None,
    number=Number("routed_scaling_factor", factor_of, (1.0, 2.5)),
)
def moe_scaling_factor(scope: Scope, factor: float) -> Change:
    return reweighted(scope, lambda _l, _i, weights: weights * (factor / factor_of(scope)))


@fault(
    id="moe-bias-in-weights",
    title="the correction bias is part of the experts' weights; it is meant for the choice alone",
    sites=_WEIGHTS,
    fix="choose by score + bias, and take the weights from the scores without it",
    source="vllm#12002",
    applies=has_bias,
)
def moe_bias_in_weights(scope: Scope) -> Change:
    finish = finished(scope)

    def weights(logits: Tensor, index: Tensor, _weights: Tensor) -> Tensor:
        biased = logits.sigmoid() + router_of(scope).e_score_correction_bias.to(logits)
        return finish(biased.gather(1, index))

    return reweighted(scope, weights)


@fault(
    id="moe-sigmoid",
    title="experts are weighed by the sigmoid of their logits; in the reference by the softmax",
    sites=_WEIGHTS,
    fix="take the softmax over all experts",
    applies=lambda s: router_of(s) is not None and not has_bias(s) and not weighs_before(s),
)
def moe_sigmoid(scope: Scope) -> Change:
    finish = finished(scope)
    return reweighted(scope, lambda logits, index, _weights: finish(logits.sigmoid().gather(1, index)))


@fault(
    id="moe-softmax",
    title="experts are scored by the softmax of their logits; in the reference by the sigmoid",
    sites=("experts.chosen", *_WEIGHTS),
    fix="take the sigmoid of each logit",
    applies=lambda s: has_bias(s) or weighs_before(s),
)
def moe_softmax(scope: Scope) -> Change:
    if weighs_before(scope):
        return reweighted(scope, lambda logits, index, _weights: logits.softmax(-1).gather(1, index))
    return with_other(scope, "sigmoid", lambda _func, args, _kwargs: args[0].softmax(-1))


@fault(
    id="moe-plain-softmax",
    title="experts are weighed by the softmax over all; in the reference over those that come near the chosen one",
    sites=_WEIGHTS,
    fix="mask logits that are further than 2 * router_jitter_noise below the maximum, for each of the two in turn",
    applies=is_sparse_mixer,
)
def moe_plain_softmax(scope: Scope) -> Change:
    return reweighted(scope, lambda logits, index, _weights: logits.softmax(-1).gather(1, index))


# -- choice --------------------------------------------------------------------------------------------------


@fault(
    id="moe-top-k",
    title="another number of experts is chosen for each token",
    sites=("experts.chosen", *_WEIGHTS),
    fix="choose num_experts_per_tok of config.json",
    applies=lambda s: isinstance(getattr(router_of(s), "top_k", None), int) and not is_sparse_mixer(s),
    number=Number(
        "num_experts_per_tok", lambda s: float(router_of(s).top_k), (1.0, 2.0, 3.0, 4.0, 6.0, 8.0), discrete=True
    ),
)
def moe_top_k(scope: Scope, count: float) -> Change:
    return attribute(router_of(scope), "top_k", min(int(count), experts_in(experts_of(scope)) or int(count)))


@fault(
    id="moe-bias-ignored",
    title="experts are chosen by their scores; the reference adds a correction bias first",
    sites=_CHOICE,
    fix="add e_score_correction_bias to the scores before choosing",
    applies=has_bias,
)
def moe_bias_ignored(scope: Scope) -> Change:
    router = router_of(scope)
    return buffer(router, "e_score_correction_bias", torch.zeros_like(router.e_score_correction_bias))


@fault(
    id="moe-bias-rounded",
    title="the correction bias that decides on experts is rounded to bfloat16",
    sites=_CHOICE,
    fix="keep e_score_correction_bias in float32",
    source="vllm#23640",
    needs="many tokens, of which some are nearly tied",
    applies=lambda s: has_bias(s) and not _is_in_bfloat16(router_of(s).e_score_correction_bias),
)
def moe_bias_rounded(scope: Scope) -> Change:
    router = router_of(scope)
    return buffer(router, "e_score_correction_bias", stored_as(router.e_score_correction_bias, torch.bfloat16))


def _is_in_bfloat16(bias: Tensor) -> bool:
    return torch.equal(stored_as(bias, torch.bfloat16), bias)


@fault(
    id="moe-groups-ignored",
    title="experts are chosen from all; in the reference from the best groups only",
    sites=("experts.chosen", *_WEIGHTS),
    fix="keep the topk_group best of n_group groups, and choose among their experts",
    source="vllm#16744",
    applies=has_groups,
)
def moe_groups_ignored(scope: Scope) -> Change:
    router = router_of(scope)
    return together(attribute(router, "num_group", 1), attribute(router, "topk_group", 1))


@fault(
    id="moe-groups-by-best",
    title="a group of experts is worth its best score; in the reference the sum of its two best",
    sites=_CHOICE,
    fix="add the two best scores of each group",
    source="PaddleFormers#3452",
    applies=lambda s: has_groups(s) and has_bias(s),
)
def moe_groups_by_best(scope: Scope) -> Change:
    def best_alone(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        values, index = func(*args, **kwargs)
        return torch.return_types.topk((values[..., :1], index[..., :1]) if values.dim() == 3 else (values, index))

    return with_other(scope, "topk", best_alone)


FAULTS: tuple[Fault, ...] = (
    moe_not_renormalized,
    moe_renormalized,
    moe_scaling_factor,
    moe_bias_in_weights,
    moe_sigmoid,
    moe_softmax,
    moe_plain_softmax,
    moe_top_k,
    moe_bias_ignored,
    moe_bias_rounded,
    moe_groups_ignored,
    moe_groups_by_best,
)
