"""Positions: where counting starts, what padding does to it, when it starts anew."""

from __future__ import annotations

import torch
from torch import Tensor

from parity.faults.fault import Change, Fault, Number, Scope, fault
from parity.faults.patches.attention import shown
from parity.faults.patches.rope import ROTATED, each_by, frequencies, has_rope, positions_of, tables, with_tables


def _at(scope: Scope, positions: Tensor) -> tuple[Tensor, Tensor]:
    return tables(scope, *frequencies(scope), positions=positions)


def _shifted(scope: Scope, offset: float) -> tuple[Tensor, Tensor]:
    return _at(scope, positions_of(scope).to(torch.float64) + offset)


@fault(
    id="position-offset",
    title="positions of queries and keys are shifted; RoPE is relative, so the logits hardly change",
    sites=ROTATED,
    fix="count positions from 0, and from the length of the cache in decoding",
    source="fla#766",
    applies=has_rope,
    number=Number(name="offset", expected=lambda _s: 0.0, typical=(1.0, -1.0), log=False),
)
def position_offset(scope: Scope, offset: float) -> Change:
    return with_tables(scope, _shifted(scope, offset))


@fault(
    id="position-offset-q",
    title="positions of the queries are shifted against those of the keys",
    sites=("q_rope",),
    fix="use the same positions for queries and keys of the same tokens",
    applies=has_rope,
    number=Number(name="offset", expected=lambda _s: 0.0, typical=(1.0, -1.0), log=False),
)
def position_offset_q(scope: Scope, offset: float) -> Change:
    return each_by(scope, q=_shifted(scope, offset), k=None)


@fault(
    id="position-offset-k",
    title="positions of the keys are shifted against those of the queries",
    sites=("k_rope",),
    fix="rotate each key by its own position, once, before it enters the cache",
    applies=has_rope,
    number=Number(name="offset", expected=lambda _s: 0.0, typical=(1.0, -1.0), log=False),
)
def position_offset_k(scope: Scope, offset: float) -> Change:
    return each_by(scope, q=None, k=_shifted(scope, offset))


@fault(
    id="position-decode-zero",
    title="the last token has position 0, as when every decoded token is taken for a prompt of its own",
    sites=ROTATED,
    fix="pass the number of cached tokens as the position of a decoded one",
    source="mlx-vlm#1983",
    needs="two tokens or more",
    applies=has_rope,
)
def position_decode_zero(scope: Scope) -> Change:
    positions = positions_of(scope).clone()
    positions[..., -1] = 0
    return with_tables(scope, _at(scope, positions))


@fault(
    id="position-chunk-restart",
    title="positions start anew with every chunk of a long prompt",
    sites=ROTATED,
    fix="carry the position over from one chunk of prefill to the next",
    needs="a prompt longer than the chunk",
    applies=has_rope,
    number=Number(
        name="chunk",
        expected=lambda _s: float("inf"),
        typical=(512.0, 256.0, 128.0, 64.0, 1024.0, 2048.0),
        discrete=True,
    ),
)
def position_chunk_restart(scope: Scope, chunk: float) -> Change:
    positions = positions_of(scope)
    return with_tables(scope, _at(scope, positions if chunk == float("inf") else positions % int(chunk)))


def _is_plain_count(scope: Scope) -> bool:
    """Whether the reference numbers the tokens 0, 1, 2, … in every row."""
    positions = positions_of(scope)
    return bool((positions == torch.arange(positions.shape[-1], device=positions.device)).all())


@fault(
    id="position-ignores-padding",
    title="positions count the padding on the left; the reference counts text tokens only",
    sites=ROTATED,
    fix="take positions from the running sum of the attention mask",
    source="unsloth#3699",
    needs="a batch padded on the left",
    applies=lambda s: has_rope(s) and (not _is_plain_count(s)),
)
def position_ignores_padding(scope: Scope) -> Change:
    return with_tables(scope, _at(scope, torch.arange(positions_of(scope).shape[-1])[None]))


def _is_text(scope: Scope) -> Tensor | None:
    """Which tokens are no padding (b, t), as the mask tells: None if it does not."""
    mask = scope.kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-1] != mask.shape[-2]:
        return None
    # A text token sees at least itself; padding sees nothing.
    return shown(mask)[:, 0].diagonal(dim1=-2, dim2=-1)


def _counted(scope: Scope) -> Tensor:
    """Positions (b, t) that count text tokens only, and 1 on padding, as transformers does in generation."""
    text = _is_text(scope)
    assert text is not None, "unreachable because the fault applies only where the mask shows padding"
    return (text.long().cumsum(-1) - 1).masked_fill(~text, 1)


def _is_padded(scope: Scope) -> bool:
    text = _is_text(scope) if has_rope(scope) else None
    return text is not None and not bool(text.all())


@fault(
    id="position-skips-padding",
    title="positions count text tokens only; the reference counts the padding on the left as well",
    sites=ROTATED,
    fix="number the tokens as the reference was run, or give both the same position_ids",
    source="transformers#18388",
    needs="a batch padded on the left",
    applies=lambda s: _is_padded(s) and _is_plain_count(s),
)
def position_skips_padding(scope: Scope) -> Change:
    return with_tables(scope, _at(scope, _counted(scope)))


FAULTS: tuple[Fault, ...] = (
    position_offset,
    position_offset_q,
    position_offset_k,
    position_decode_zero,
    position_chunk_restart,
    position_ignores_padding,
    position_skips_padding,
)
