"""Embedding and head: what stands before the first layer and after the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import Change, Fault, Number, Scope, attribute, fault, weight
from parity.faults.patches.modules import EMBEDDING_SITES, HEAD_SITES, at_ends, forward, norms_of, together
from parity.faults.patches.numbers import stored_as


def _embedding(scope: Scope) -> Any:
    return scope.model.get_input_embeddings()


def _embedding_scale(scope: Scope) -> float | None:
    """The factor that the embedding module itself puts on its rows; None if it puts none."""
    found = getattr(_embedding(scope), "scalar_embed_scale", None)
    return float(found) if found is not None else None


def _after(module: Any, change: Callable[[Tensor], Tensor]) -> Change:
    """The module's output goes through `change`."""
    before = module.forward
    return forward(module, lambda x: change(before(x)))


def _embeddings_times(scope: Scope, gain: float) -> Change:
    return _after(_embedding(scope), lambda x: x * gain)


@fault(
    id="embedding-scaled",
    title="embeddings are multiplied by sqrt(hidden); the reference leaves them as they are",
    sites=EMBEDDING_SITES,
    fix="use the rows as they are: the factor is Gemma's",
    applies=lambda s: at_ends(s) and _embedding_scale(s) is None,
)
def embedding_scaled(scope: Scope) -> Change:
    return _embeddings_times(scope, float(scope.config.hidden_size**0.5))


@fault(
    id="embedding-scale-missing",
    title="embeddings are not multiplied by the factor that the model has",
    sites=EMBEDDING_SITES,
    fix="multiply the embeddings by sqrt(hidden), or by embedding_multiplier of config.json",
    applies=lambda s: at_ends(s) and (_embedding_scale(s) or 1.0) != 1.0,
)
def embedding_scale_missing(scope: Scope) -> Change:
    return _embeddings_times(scope, 1.0 / (_embedding_scale(scope) or 1.0))


def _rounded_scale(scope: Scope) -> float:
    scale = _embedding_scale(scope) or 1.0
    return float(stored_as(torch.tensor(scale), torch.bfloat16)) / scale


@fault(
    id="embedding-scale-rounded",
    title="the factor on the embeddings is rounded to bfloat16 in a model of higher precision",
    sites=EMBEDDING_SITES,
    fix="round the factor to the dtype of the model, as the reference does",
    source="transformers#38702",
    needs="float32 or float16",
    applies=lambda s: at_ends(s) and _rounded_scale(s) != 1.0,
)
def embedding_scale_rounded(scope: Scope) -> Change:
    return _embeddings_times(scope, _rounded_scale(scope))


@fault(
    id="embedding-gain",
    title="embeddings carry another factor than the reference's",
    sites=EMBEDDING_SITES,
    fix="check every factor on the embeddings against config.json",
    source="transformers#29402",
    applies=at_ends,
    number=Number(name="factor", expected=lambda _s: 1.0, typical=(2.0, 0.5)),
)
def embedding_gain(scope: Scope, gain: float) -> Change:
    return _embeddings_times(scope, gain)


@fault(
    id="embedding-row",
    title="each token gets the embedding of the next id",
    sites=EMBEDDING_SITES,
    fix="check where the first row of the table is read",
    applies=at_ends,
)
def embedding_row(scope: Scope) -> Change:
    module = _embedding(scope)
    before = module.forward
    return forward(module, lambda ids: before((ids + 1) % module.num_embeddings))


# -- head ----------------------------------------------------------------------------------------------------


def _head(scope: Scope) -> Any:
    return scope.model.get_output_embeddings()


def _has_head(scope: Scope) -> bool:
    return at_ends(scope) and _head(scope) is not None


def _is_tied(scope: Scope) -> bool:
    return bool(_head(scope).weight is _embedding(scope).weight)


def _tie_matters(scope: Scope) -> bool:
    return _has_head(scope) and not _is_tied(scope) and _head(scope).weight.shape == _embedding(scope).weight.shape


@fault(
    id="head-tied",
    title="the embedding is used as head; the checkpoint has a head of its own",
    sites=HEAD_SITES,
    fix="load lm_head.weight unless config.json says tie_word_embeddings",
    source="candle#2930",
    applies=_tie_matters,
)
def head_tied(scope: Scope) -> Change:
    return weight(_head(scope), "weight", _embedding(scope).weight.data)


def _own_head(scope: Scope) -> Tensor | None:
    """The head that the checkpoint holds, although the config ties it to the embedding."""
    name = next((n for n, m in scope.model.named_modules() if m is _head(scope)), "lm_head")
    try:
        return scope.weight(f"{name}.weight")
    except KeyError:
        return None


def _untying_matters(scope: Scope) -> bool:
    if not _has_head(scope) or not _is_tied(scope):
        return False
    found = _own_head(scope)
    return found is not None and not torch.equal(found.to(_head(scope).weight), _head(scope).weight)


@fault(
    id="head-untied",
    title="the checkpoint's lm_head is used; the config ties the head to the embedding",
    sites=HEAD_SITES,
    fix="use the embedding as head where config.json says tie_word_embeddings",
    source="pegainfer#544",
    applies=_untying_matters,
)
def head_untied(scope: Scope) -> Change:
    found = _own_head(scope)
    assert found is not None, "unreachable because the fault applies only where the checkpoint has a head"
    return weight(_head(scope), "weight", found.to(_head(scope).weight))


@fault(
    id="head-row",
    title="logits are shifted by one id",
    sites=HEAD_SITES,
    fix="check where the first row of lm_head is read",
    applies=_has_head,
)
def head_row(scope: Scope) -> Change:
    return _after(_head(scope), lambda y: y.roll(1, -1))


# What configs call a factor on the logits, and whether it multiplies (1) or divides (−1).
_SCALINGS = {"logit_scale": 1, "logits_scaling": -1}


@fault(
    id="logits-scale",
    title="logits carry another factor than the reference's",
    sites=(*HEAD_SITES, "logits"),
    fix="apply logit_scale or logits_scaling of config.json once, and mind whether it multiplies or divides",
    source="unsloth#1218",
    applies=_has_head,
    number=Number(name="factor", expected=lambda _s: 1.0, typical=(0.5, 2.0)),
)
def logits_scale(scope: Scope, gain: float) -> Change:
    # A model may keep its own copy of what the config says.
    for owner in (scope.model, scope.config):
        for name, way in _SCALINGS.items():
            if getattr(owner, name, None):
                return attribute(owner, name, getattr(owner, name) * gain**way)
    return _after(_head(scope), lambda y: y * gain)


@fault(
    id="logits-softcap",
    title="logits are capped by tanh; the reference's head does not cap them",
    sites=HEAD_SITES,
    fix="cap logits only where the config has final_logit_softcapping, and compare them before the cap",
    needs="logits that are not small beside the cap",
    applies=_has_head,
    number=Number(name="cap", expected=lambda _s: float("inf"), typical=(30.0, 50.0, 15.0), discrete=True),
)
def logits_softcap(scope: Scope, cap: float) -> Change:
    return _after(_head(scope), lambda y: y if cap == float("inf") else torch.tanh(y / cap) * cap)


def _final_norm(scope: Scope) -> Any:
    return next(reversed(norms_of(scope).values()), None)


def _has_final_norm(scope: Scope) -> bool:
    return _has_head(scope) and _final_norm(scope) is not None


def _around_norm(scope: Scope, reads: Callable[[Any, Tensor, Tensor], Tensor]) -> Change:
    """The head reads `reads(norm, before it, after it)`."""
    norm, head = _final_norm(scope), _head(scope)
    normalize, project = norm.forward, head.forward
    seen: list[Tensor] = []

    def remember(x: Tensor) -> Tensor:
        seen[:] = [x]
        out: Tensor = normalize(x)
        return out

    def read(x: Tensor) -> Tensor:
        out: Tensor = project(reads(normalize, seen[0][:, -x.shape[1] :], x))
        return out

    return together(forward(norm, remember), forward(head, read))


@fault(
    id="head-before-norm",
    title="the head reads the last layer's output; in the reference the final norm lies between",
    sites=HEAD_SITES,
    fix="apply the final norm before lm_head",
    source="candle#2021",
    applies=_has_final_norm,
)
def head_before_norm(scope: Scope) -> Change:
    return _around_norm(scope, lambda _norm, before, _after: before)


@fault(
    id="head-normed-twice",
    title="the final norm is applied twice before the head, as when hidden_states[-1], which is normalized, is taken",
    sites=HEAD_SITES,
    fix="normalize once: the last entry of transformers' hidden_states already is",
    applies=_has_final_norm,
)
def head_normed_twice(scope: Scope) -> Change:
    return _around_norm(scope, lambda norm, _before, after: norm(after))


FAULTS: tuple[Fault, ...] = (
    embedding_scaled,
    embedding_scale_missing,
    embedding_scale_rounded,
    embedding_gain,
    embedding_row,
    head_tied,
    head_untied,
    head_row,
    logits_scale,
    logits_softcap,
    head_before_norm,
    head_normed_twice,
)
