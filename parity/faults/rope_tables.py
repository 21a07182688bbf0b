"""RoPE's tables of the wrong kind: another scaling's numbers, another kind of layer, and layers that have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import TWO_TOKENS, Change, Fault, Scope, attribute, fault
from parity.faults.patches.attention import INSIDE, has_attention, reading
from parity.faults.patches.modules import attention_of, together
from parity.faults.patches.rope import (
    ROTATED,
    frequencies,
    has_rope,
    is_scaled_as,
    original_rotation,
    pairs_halves,
    parameters_of,
    positions_of,
    tables,
    with_tables,
)
from parity.record.scans import source_of


def _long_table(scope: Scope, which: str) -> Change:
    """The tables with one of longrope's two lists of factors."""
    given = torch.tensor(parameters_of(scope)[which], dtype=torch.float32)
    plain, _ = frequencies(scope, rope_type="default")
    return with_tables(scope, tables(scope, plain / given.to(plain), frequencies(scope)[1]))


def _is_long(scope: Scope) -> bool:
    config = scope.config
    most = parameters_of(scope).get("original_max_position_embeddings") or config.max_position_embeddings
    return int(positions_of(scope).max()) + 1 > int(most)


@fault(
    id="rope-long-factors",
    title="RoPE is stretched by longrope's long factors; the prompt is short",
    sites=ROTATED,
    fix="take long_factor only for sequences beyond original_max_position_embeddings, short_factor before",
    source="llama.cpp#24823",
    needs=TWO_TOKENS,
    applies=lambda s: is_scaled_as("longrope")(s) and not _is_long(s),
)
def rope_long_factors(scope: Scope) -> Change:
    return _long_table(scope, "long_factor")


@fault(
    id="rope-short-factors",
    title="RoPE is stretched by longrope's short factors; the prompt is long",
    sites=ROTATED,
    fix="take short_factor only up to original_max_position_embeddings, long_factor beyond",
    needs="a prompt longer than original_max_position_embeddings",
    applies=lambda s: is_scaled_as("longrope")(s) and _is_long(s),
)
def rope_short_factors(scope: Scope) -> Change:
    return _long_table(scope, "short_factor")


def _other_kind(scope: Scope) -> dict[str, Any] | None:
    """The RoPE parameters of another kind of layer; None if all have the same."""
    given, own = scope.config.rope_parameters or {}, parameters_of(scope)
    others = (p for p in given.values() if isinstance(p, dict) and dict(p) != own)
    return next((dict(p) for p in others), None)


@fault(
    id="rope-of-other-layers",
    title="this layer turns by the tables of the other kind of layers",
    sites=ROTATED,
    fix="keep a table for each kind of layer, and follow layer_types of config.json",
    source="candle#2891",
    needs=TWO_TOKENS,
    applies=lambda s: has_rope(s) and _other_kind(s) is not None,
)
def rope_of_other_layers(scope: Scope) -> Change:
    other = _other_kind(scope)
    assert other is not None, "unreachable because the fault applies only where there is one"
    missing: dict[str, Any] = dict.fromkeys(parameters_of(scope), None)
    angles, factor = frequencies(scope, **(missing | other))
    return with_tables(scope, tables(scope, angles, factor))


def _has_no_rope(scope: Scope) -> bool:
    """Whether the model rotates queries and keys, but not in this layer."""
    return has_attention(scope) and has_rope(scope) and getattr(attention_of(scope), "use_rope", True) in (False, 0)


@fault(
    id="rope-on-nope-layer",
    title="RoPE turns queries and keys of a layer that has none in the reference",
    sites=(*INSIDE, *ROTATED),
    fix="skip RoPE where no_rope_layers of config.json has a 0: there 1 means that a layer has RoPE",
    source="mobius#233",
    needs=TWO_TOKENS,
    applies=_has_no_rope,
)
def rope_on_nope_layer(scope: Scope) -> Change:
    rotate = original_rotation(scope)
    return reading(scope, lambda q, k, v: (*rotate(q, k, *scope.kwargs["position_embeddings"]), v))


_INTERLEAVED = "apply_rotary_pos_emb_interleave"


def _pairs_neighbours(scope: Scope) -> bool:
    if not has_rope(scope):
        return False
    by_config = hasattr(source_of(attention_of(scope)), _INTERLEAVED) and getattr(
        scope.config, "rope_interleave", False
    )
    return bool(by_config) or not pairs_halves(scope)


@fault(
    id="rope-halves",
    title="RoPE rotates halves (i, i + d/2); the reference rotates interleaved pairs (2i, 2i+1)",
    sites=ROTATED,
    fix="pair x[2i] with x[2i + 1], or permute the rows of q_proj and k_proj when converting the checkpoint",
    source="optimum-intel#1877",
    needs=TWO_TOKENS,
    applies=_pairs_neighbours,
)
def rope_halves(scope: Scope) -> Change:
    """The first half of what turns goes with the second."""
    angles, factor = frequencies(scope)
    pairs = angles.numel()
    given: Tensor = scope.kwargs["position_embeddings"][0]
    phases = positions_of(scope)[..., None].to(given) * angles.to(given)
    cos, sin = ((f(phases) * factor).unsqueeze(1) for f in (torch.cos, torch.sin))

    def turn(x: Tensor) -> Tensor:
        one, two = x[..., :pairs], x[..., pairs : 2 * pairs]
        turned = torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)
        return torch.cat([turned.to(x.dtype), x[..., 2 * pairs :]], dim=-1)

    def rotate(q: Tensor, k: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return turn(q), turn(k)

    source = source_of(attention_of(scope))
    names = [name for name in ("apply_rotary_pos_emb", _INTERLEAVED) if hasattr(source, name)]
    return together(*(attribute(source, name, rotate) for name in names))


FAULTS: tuple[Fault, ...] = (
    rope_long_factors,
    rope_short_factors,
    rope_of_other_layers,
    rope_on_nope_layer,
    rope_halves,
)
