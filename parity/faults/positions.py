"""Positions: where counting starts, what padding does to it, when it starts anew."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from parity.faults.fault import Fault, Number, Scope
from parity.faults.parts import plain
from parity.faults.tables import each_by, frequencies, has_rope, positions_of, tables, with_tables

BOTH = ("q_rope", "k_rope")
Change = AbstractContextManager[None]


def _at(scope: Scope, positions: Tensor) -> tuple[Tensor, Tensor]:
    return tables(scope, *frequencies(scope), positions=positions)


def _shifted(q: bool, k: bool) -> Callable[[Scope, float], Change]:
    def patch(scope: Scope, offset: float) -> Change:
        new = _at(scope, positions_of(scope).to(torch.float64) + offset)
        return with_tables(scope, new) if q and k else each_by(scope, new if q else None, new if k else None)

    return patch


def _anew(scope: Scope, chunk: float) -> Change:
    positions = positions_of(scope)
    return with_tables(scope, _at(scope, positions if chunk == float("inf") else positions % int(chunk)))


def _last_at_zero(scope: Scope) -> Change:
    positions = positions_of(scope).clone()
    positions[..., -1] = 0
    return with_tables(scope, _at(scope, positions))


def _is_text(scope: Scope) -> Tensor | None:
    """Which tokens are no padding (b, t), as the mask tells: None if it does not."""
    mask = scope.kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-1] != mask.shape[-2]:
        return None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    # A text token sees at least itself; padding sees nothing.
    return seen[:, 0].diagonal(dim1=-2, dim2=-1)


def _counted(scope: Scope) -> Tensor:
    """Positions (b, t) that count text tokens only, and 1 on padding, as transformers does in generation."""
    text = _is_text(scope)
    assert text is not None, "unreachable because the fault applies only where the mask shows padding"
    return (text.long().cumsum(-1) - 1).masked_fill(~text, 1)


def _is_padded(scope: Scope) -> bool:
    text = _is_text(scope) if has_rope(scope) else None
    return text is not None and not bool(text.all())


def _is_plain_count(scope: Scope) -> bool:
    """Whether the reference numbers the tokens 0, 1, 2, … in every row."""
    positions = positions_of(scope)
    return bool((positions == torch.arange(positions.shape[-1], device=positions.device)).all())


FAULTS: tuple[Fault, ...] = (
    Fault(
        "position-offset",
        "positions of queries and keys are shifted; RoPE is relative, so the logits hardly change",
        BOTH,
        "count positions from 0, and from the length of the cache in decoding",
        "fla#766",
        "",
        _shifted(q=True, k=True),
        has_rope,
        Number("offset", lambda _s: 0.0, (1.0, -1.0), log=False),
    ),
    Fault(
        "position-offset-q",
        "positions of the queries are shifted against those of the keys",
        ("q_rope",),
        "use the same positions for queries and keys of the same tokens",
        "",
        "",
        _shifted(q=True, k=False),
        has_rope,
        Number("offset", lambda _s: 0.0, (1.0, -1.0), log=False),
    ),
    Fault(
        "position-offset-k",
        "positions of the keys are shifted against those of the queries",
        ("k_rope",),
        "rotate each key by its own position, once, before it enters the cache",
        "",
        "",
        _shifted(q=False, k=True),
        has_rope,
        Number("offset", lambda _s: 0.0, (1.0, -1.0), log=False),
    ),
    Fault(
        "position-decode-zero",
        "the last token has position 0, as when every decoded token is taken for a prompt of its own",
        BOTH,
        "pass the number of cached tokens as the position of a decoded one",
        "mlx-vlm#1983",
        "two tokens or more",
        plain(_last_at_zero),
        has_rope,
    ),
    Fault(
        "position-chunk-restart",
        "positions start anew with every chunk of a long prompt",
        BOTH,
        "carry the position over from one chunk of prefill to the next",
        "",
        "a prompt longer than the chunk",
        _anew,
        has_rope,
        Number("chunk", lambda _s: float("inf"), (512.0, 256.0, 128.0, 64.0, 1024.0, 2048.0), discrete=True),
    ),
    Fault(
        "position-ignores-padding",
        "positions count the padding on the left; the reference counts text tokens only",
        BOTH,
        "take positions from the running sum of the attention mask",
        "unsloth#3699",
        "a batch padded on the left",
        plain(lambda s: with_tables(s, _at(s, torch.arange(positions_of(s).shape[-1])[None]))),
        lambda s: has_rope(s) and not _is_plain_count(s),
    ),
    Fault(
        "position-skips-padding",
        "positions count text tokens only; the reference counts the padding on the left as well",
        BOTH,
        "number the tokens as the reference was run, or give both the same position_ids",
        "transformers#18388",
        "a batch padded on the left",
        plain(lambda s: with_tables(s, _at(s, _counted(s)))),
        lambda s: _is_padded(s) and _is_plain_count(s),
    ),
)
