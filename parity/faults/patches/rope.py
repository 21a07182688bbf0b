"""RoPE's tables of cosines and sines, and what turns by them: as in the reference, and as in ports with a bug."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import Change, Scope, attribute
from parity.faults.patches.modules import attention_of, buffer, entry, head_dim_of, makes_tables
from parity.faults.patches.numbers import as_written, wide
from parity.record.scans import source_of

# Where queries and keys have been rotated: whole, or the part that turns where it is kept apart.
ROTATED = ("q_rope", "k_rope", "q_rotated", "k_rotated")
Tables = tuple[Tensor, Tensor]
# Cosines of two kinds of angles are farther apart than any rounding of the same.
_SAME = 0.02


def has_rope(scope: Scope) -> bool:
    """Whether the layer rotates queries and keys by tables that transformers hands to it."""
    attention, given = attention_of(scope), scope.kwargs.get("position_embeddings")
    if attention is None or not isinstance(given, tuple) or len(given) != 2 or _rotary_module(scope) is None:
        return False
    rotate = getattr(source_of(attention), "apply_rotary_pos_emb", None)
    return rotate is not None and list(inspect.signature(rotate).parameters)[:4] == ["q", "k", "cos", "sin"]


def parameters_of(scope: Scope) -> dict[str, Any]:
    """The layer's own part of the config's RoPE parameters."""
    found = dict(scope.config.rope_parameters or {})
    kind = _layer_type(scope)
    return dict(found[kind]) if kind in found else found


def theta_of(scope: Scope) -> float:
    """The base of the frequencies."""
    return float(parameters_of(scope)["rope_theta"])


def is_scaled(scope: Scope) -> bool:
    """Whether the config stretches RoPE (linear, dynamic, llama3, YaRN, longrope)."""
    return has_rope(scope) and parameters_of(scope).get("rope_type", "default") != "default"


def is_scaled_as(*kinds: str) -> Callable[[Scope], bool]:
    """Whether a layer has RoPE of one of these types."""
    return lambda scope: has_rope(scope) and parameters_of(scope).get("rope_type", "default") in kinds


def is_plain(scope: Scope) -> bool:
    """Whether RoPE is as first published."""
    return has_rope(scope) and not is_scaled(scope)


def _layer_type(scope: Scope) -> str | None:
    kinds = getattr(scope.config, "layer_types", None)
    return kinds[scope.index] if kinds and scope.index is not None else None


def _rotary_module(scope: Scope) -> Any:
    decoder = scope.model.get_decoder() or scope.model.base_model
    # Nearly always it is the decoder's own, and to look through all layers takes long.
    return next((m for m in chain(decoder.children(), decoder.modules()) if makes_tables(m)), None)


def has_tables(scope: Scope) -> bool:
    """Whether queries and keys turn by tables that transformers hands to the layer; at the ends, whether it makes any.

    Of what turns them nothing is asked.
    """
    rotary = _rotary_module(scope)
    if rotary is None or "rope_theta" not in parameters_of(scope):
        return False
    return "inv_freq" in rotary._buffers if scope.layer is None else _given(scope) is not None


def _given(scope: Scope) -> Tensor | None:
    """The cosines of the tables that the layer gets, or tables that hold both as complex numbers."""
    given = scope.kwargs.get("position_embeddings")
    first = given[0] if isinstance(given, tuple) and len(given) == 2 else given
    return first if isinstance(first, Tensor) else None


def frequencies(scope: Scope, **changes: Any) -> tuple[Tensor, float]:
    """The reference's angles per position (pairs), and its factor on the tables, with RoPE parameters changed."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = _layer_type(scope)
    # Sizes may depend on the kind of layer.
    sizes = getattr(scope.config, "per_layer_config", None)
    config = copy.copy(sizes[kind] if sizes and kind else scope.config)
    mine = parameters_of(scope) | changes
    nested = kind in (scope.config.rope_parameters or {})
    config.rope_parameters = dict(scope.config.rope_parameters) | {kind: mine} if nested else mine
    rope_type = mine.get("rope_type", "default")
    plain = _rotary_module(scope).compute_default_rope_parameters
    compute = plain if rope_type == "default" else ROPE_INIT_FUNCTIONS[rope_type]
    # Some kinds have other angles for longer prompts.
    more = {"seq_len": int(positions_of(scope).max()) + 1} if _given(scope) is not None and plain is not compute else {}
    with as_written():
        found, factor = compute(config, **more, **({"layer_type": kind} if nested else {}))
    return found, float(factor)


def plain_frequencies(theta: float, size: int, count: int | None = None) -> Tensor:
    """theta ** (-2i / size) for the first `count` pairs i, by default size / 2 of them: (count)."""
    with as_written():
        exponents = torch.arange(0, 2 * (count or size // 2), 2, dtype=torch.float32) / size
        return 1.0 / theta**exponents


def positions_of(scope: Scope) -> Tensor:
    """Positions of the tokens (b or 1, t) as transformers counts them."""
    given, cos = scope.kwargs.get("position_ids"), _given(scope)
    assert cos is not None, "unreachable because faults of RoPE apply where there are tables"
    return given if isinstance(given, Tensor) else torch.arange(cos.shape[-2], device=cos.device)[None]


def tables(
    scope: Scope,
    angles: Tensor,
    factor: float,
    positions: Tensor | None = None,
    store: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tables:
    """Cosines and sines (b or 1, t, r), where r numbers of a head turn, in the layout and dtype of the reference's.

    `angles` (pairs) per position; `positions` (b or 1, t), by default the reference's; `store` says how positions,
    angles and phases are kept.
    """
    cos: Tensor = scope.kwargs["position_embeddings"][0]
    dtype = wide(cos.dtype)
    where = positions_of(scope) if positions is None else positions
    phases = store(store(where[..., None].to(cos.device, dtype)) * store(angles.to(cos.device, dtype)))
    copies = max(1, cos.shape[-1] // frequencies(scope)[0].numel())
    phases = torch.cat([phases] * copies, dim=-1)
    return (phases.cos() * factor).to(cos.dtype), (phases.sin() * factor).to(cos.dtype)


# -- changing ------------------------------------------------------------------------------------------------


def with_tables(scope: Scope, new: Tables) -> Change:
    """Queries and keys turn by other tables, each (b or 1, t, r)."""
    return entry(scope.kwargs, "position_embeddings", new)


def turning_by(scope: Scope, angles: Tensor, factor: float, positions: Tensor | None = None) -> Change:
    """Queries and keys turn by other angles (pairs) per position, in whatever layout the reference has its tables.

    `positions` (b or 1, t) are by default the reference's. At the ends the module that makes the tables has these
    angles. Raises ValueError if no known layout is the reference's.
    """
    if scope.layer is None:
        rotary = _rotary_module(scope)
        return buffer(rotary, "inv_freq", angles.to(rotary.inv_freq))
    given, right = scope.kwargs["position_embeddings"], frequencies(scope)
    for layout in _LAYOUTS:
        if _alike(layout(_phases(scope, right[0]), right[1]), given):
            mine = layout(_phases(scope, angles, positions), factor)
            return entry(scope.kwargs, "position_embeddings", _like(mine, given))
    raise ValueError("the layout of the tables is not known")


def _phases(scope: Scope, angles: Tensor, positions: Tensor | None = None) -> Tensor:
    given = _given(scope)
    assert given is not None, "unreachable because faults of RoPE apply where there are tables"
    dtype = torch.float64 if given.dtype in (torch.float64, torch.complex128) else torch.float32
    where = positions_of(scope) if positions is None else positions
    return where[..., None].to(given.device, dtype) * angles.to(given.device, dtype)


def _in_halves(phases: Tensor, factor: float) -> Tables:
    twice = torch.cat([phases, phases], dim=-1)
    return twice.cos() * factor, twice.sin() * factor


def _in_pairs(phases: Tensor, factor: float) -> Tables:
    twice = phases.repeat_interleave(2, dim=-1)
    return twice.cos() * factor, twice.sin() * factor


def _once(phases: Tensor, factor: float) -> Tables:
    return phases.cos() * factor, phases.sin() * factor


def _as_complex(phases: Tensor, factor: float) -> Tensor:
    return torch.polar(torch.full_like(phases, factor), phases)


_LAYOUTS: tuple[Callable[[Tensor, float], Any], ...] = (_in_halves, _in_pairs, _once, _as_complex)


def _alike(mine: Any, given: Any) -> bool:
    """Whether tables are the reference's but for rounding."""
    if isinstance(mine, tuple) != isinstance(given, tuple):
        return False
    if isinstance(mine, tuple):
        return all(_alike(a, b) for a, b in zip(mine, given, strict=True))
    return mine.shape[1:] == given.shape[1:] and bool((mine - given).abs().max() <= _SAME * given.abs().max())


def _like(mine: Any, given: Any) -> Any:
    """Tables in the dtype of the reference's."""
    if isinstance(mine, tuple):
        return tuple(_like(a, b) for a, b in zip(mine, given, strict=True))
    return mine.to(given.dtype)


def original_rotation(scope: Scope) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of the reference that turns queries and keys. It takes and gives queries and keys (b, h, t, d)."""
    found: Callable[..., tuple[Tensor, Tensor]] = source_of(attention_of(scope)).apply_rotary_pos_emb
    return found


def with_rotation(scope: Scope, new: Callable[..., tuple[Tensor, Tensor]]) -> Change:
    """Queries (b, h, t, d) and keys (b, g, t, d) turn by another function (q, k, cos, sin, …) -> (q, k)."""
    return attribute(source_of(attention_of(scope)), "apply_rotary_pos_emb", new)


def each_by(scope: Scope, q: Tables | None, k: Tables | None) -> Change:
    """Queries and keys turn by tables of their own, each (b or 1, t, r); None means the reference's."""
    original = original_rotation(scope)

    def rotate(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        turned = original(query, key, *(q or (cos, sin)), *args, **kwargs)[0]
        return turned, original(query, key, *(k or (cos, sin)), *args, **kwargs)[1]

    return with_rotation(scope, rotate)


def pairs_halves(scope: Scope) -> bool:
    """Whether the reference rotates the pairs (i, i + d/2), rather than neighbours: tried on a small tensor."""
    if not has_rope(scope):
        return False
    pairs = frequencies(scope)[0].numel()
    size = scope.kwargs["position_embeddings"][0].shape[-1]
    x = torch.arange(2.0 * pairs).reshape(1, 1, 1, -1)
    cos, sin = torch.zeros(1, 1, size), torch.ones(1, 1, size)
    turned, _ = original_rotation(scope)(x, x, cos, sin)
    return bool(turned.flatten()[0] == -pairs)


def rotary_fraction(scope: Scope) -> float:
    """The part of each head that is rotated."""
    return 2 * frequencies(scope)[0].numel() / head_dim_of(scope)


# -- rotating otherwise ----------------------------------------------------------------------------------------


def first_dims(scope: Scope, fraction: float, sliced: bool = False) -> Change:
    """Only the first `fraction` of each head turns, by the angles of a head of that size.

    If `sliced`, by the first of the whole head's angles instead.
    """
    size = max(2, int(head_dim_of(scope) * fraction) // 2 * 2)
    whole = head_dim_of(scope) if sliced else size
    new = tables(scope, plain_frequencies(theta_of(scope), whole, size // 2), 1.0)
    original = original_rotation(scope)

    def rotate(q: Tensor, k: Tensor, _cos: Tensor, _sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        turned = original(q[..., :size], k[..., :size], *new, *args, **kwargs)
        return torch.cat([turned[0], q[..., size:]], -1), torch.cat([turned[1], k[..., size:]], -1)

    return with_rotation(scope, rotate)
