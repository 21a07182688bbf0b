"""The ends of the model: embedding and head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import Fault, Number, Scope, weight
from parity.faults.parts import (
    EMBEDDING_SITES,
    HEAD_SITES,
    at_ends,
    forward,
    norms_of,
    plain,
    stored_as,
    together,
)

Change = AbstractContextManager[None]


def _embedding(scope: Scope) -> Any:
    return scope.model.get_input_embeddings()


def _head(scope: Scope) -> Any:
    return scope.model.get_output_embeddings()


def _has_head(scope: Scope) -> bool:
    return at_ends(scope) and _head(scope) is not None


def _after(module: Any, change: Callable[[Tensor], Tensor]) -> Change:
    """The module's output goes through `change`."""
    before = module.forward
    return forward(module, lambda x: change(before(x)))


# -- embedding -----------------------------------------------------------------------------------------------


def _embedding_scale(scope: Scope) -> float | None:
    """The factor that the embedding module itself puts on its rows; None if it puts none."""
    found = getattr(_embedding(scope), "scalar_embed_scale", None)
    return float(found) if found is not None else None


def _embedding_gain(gain: Callable[[Scope], float]) -> Callable[[Scope], Change]:
    return lambda scope: _after(_embedding(scope), lambda x: x * gain(scope))


def _root(scope: Scope) -> float:
    return float(scope.config.hidden_size**0.5)


def _rounded_scale(scope: Scope) -> float:
    scale = _embedding_scale(scope) or 1.0
    return float(stored_as(torch.tensor(scale), torch.bfloat16)) / scale


def _row_shifted(scope: Scope) -> Change:
    module = _embedding(scope)
    before = module.forward
    return forward(module, lambda ids: before((ids + 1) % module.num_embeddings))


# -- head ----------------------------------------------------------------------------------------------------


def _is_tied(scope: Scope) -> bool:
    return bool(_head(scope).weight is _embedding(scope).weight)


def _own_head(scope: Scope) -> Tensor | None:
    """The head that the checkpoint holds, although the config ties it to the embedding."""
    name = next((n for n, m in scope.model.named_modules() if m is _head(scope)), "lm_head")
    try:
        return scope.weight(f"{name}.weight")
    except KeyError:
        return None


def _tied(scope: Scope) -> Change:
    return weight(_head(scope), "weight", _embedding(scope).weight.data)


def _untied(scope: Scope) -> Change:
    found = _own_head(scope)
    assert found is not None, "unreachable because the fault applies only where the checkpoint has a head"
    return weight(_head(scope), "weight", found.to(_head(scope).weight))


def _tie_matters(scope: Scope) -> bool:
    return _has_head(scope) and not _is_tied(scope) and _head(scope).weight.shape == _embedding(scope).weight.shape


def _untying_matters(scope: Scope) -> bool:
    if not _has_head(scope) or not _is_tied(scope):
        return False
    found = _own_head(scope)
    return found is not None and not torch.equal(found.to(_head(scope).weight), _head(scope).weight)


def _cap_logits(scope: Scope, cap: float) -> Change:
    return _after(_head(scope), lambda y: y if cap == float("inf") else torch.tanh(y / cap) * cap)


def _final_norm(scope: Scope) -> Any:
    return next(iter(norms_of(scope).values()), None)


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


FAULTS: tuple[Fault, ...] = (
    Fault(
        "embedding-scaled",
        "embeddings are multiplied by sqrt(hidden); the reference leaves them as they are",
        EMBEDDING_SITES,
        "use the rows as they are: the factor is Gemma's",
        "",
        "",
        plain(_embedding_gain(_root)),
        lambda s: at_ends(s) and _embedding_scale(s) is None,
    ),
    Fault(
        "embedding-scale-missing",
        "embeddings are not multiplied by the factor that the model has",
        EMBEDDING_SITES,
        "multiply the embeddings by sqrt(hidden), or by embedding_multiplier of config.json",
        "",
        "",
        plain(_embedding_gain(lambda s: 1.0 / (_embedding_scale(s) or 1.0))),
        lambda s: at_ends(s) and (_embedding_scale(s) or 1.0) != 1.0,
    ),
    Fault(
        "embedding-scale-rounded",
        "the factor on the embeddings is rounded to bfloat16 in a model of higher precision",
        EMBEDDING_SITES,
        "round the factor to the dtype of the model, as the reference does",
        "transformers#38702",
        "float32 or float16",
        plain(_embedding_gain(_rounded_scale)),
        lambda s: at_ends(s) and _rounded_scale(s) != 1.0,
    ),
    Fault(
        "embedding-gain",
        "embeddings carry another factor than the reference's",
        EMBEDDING_SITES,
        "check every factor on the embeddings against config.json",
        "transformers#29402",
        "",
        lambda scope, gain: _after(_embedding(scope), lambda x: x * gain),
        at_ends,
        Number("factor", lambda _s: 1.0, (2.0, 0.5)),
    ),
    Fault(
        "embedding-row",
        "each token gets the embedding of the next id",
        EMBEDDING_SITES,
        "check where the first row of the table is read",
        "",
        "",
        plain(_row_shifted),
        at_ends,
    ),
    Fault(
        "head-tied",
        "the embedding is used as head; the checkpoint has a head of its own",
        HEAD_SITES,
        "load lm_head.weight unless config.json says tie_word_embeddings",
        "candle#2930",
        "",
        plain(_tied),
        _tie_matters,
    ),
    Fault(
        "head-untied",
        "the checkpoint's lm_head is used; the config ties the head to the embedding",
        HEAD_SITES,
        "use the embedding as head where config.json says tie_word_embeddings",
        "pegainfer#544",
        "",
        plain(_untied),
        _untying_matters,
    ),
    Fault(
        "head-row",
        "logits are shifted by one id",
        HEAD_SITES,
        "check where the first row of lm_head is read",
        "",
        "",
        plain(lambda s: _after(_head(s), lambda y: y.roll(1, -1))),
        _has_head,
    ),
    Fault(
        "logits-scale",
        "logits carry another factor than the reference's",
        HEAD_SITES,
        "apply logit_scale or logits_scaling of config.json once, and mind whether it multiplies or divides",
        "unsloth#1218",
        "",
        lambda scope, gain: _after(_head(scope), lambda y: y * gain),
        _has_head,
        Number("factor", lambda _s: 1.0, (0.5, 2.0)),
    ),
    Fault(
        "logits-softcap",
        "logits are capped by tanh; the reference's head does not cap them",
        HEAD_SITES,
        "cap logits only where the config has final_logit_softcapping, and compare them before the cap",
        "",
        "logits that are not small beside the cap",
        _cap_logits,
        _has_head,
        Number("cap", lambda _s: float("inf"), (30.0, 50.0, 15.0), discrete=True),
    ),
    Fault(
        "head-before-norm",
        "the head reads the last layer's output; in the reference the final norm lies between",
        HEAD_SITES,
        "apply the final norm before lm_head",
        "candle#2021",
        "",
        plain(lambda s: _around_norm(s, lambda _norm, before, _after: before)),
        _has_final_norm,
    ),
    Fault(
        "head-normed-twice",
        "the final norm is applied twice before the head, as when hidden_states[-1], which is normalized, is taken",
        HEAD_SITES,
        "normalize once: the last entry of transformers' hidden_states already is",
        "",
        "",
        plain(lambda s: _around_norm(s, lambda norm, _before, after: norm(after))),
        _has_final_norm,
    ),
)
