"""A padded batch: what hides padding, where text begins to be counted, and which token of a row is its last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import START, Change, Fault, Scope, fault, first_token
from parity.faults.patches.attention import INSIDE, has_attention, original, replaced, seeing, window_of
from parity.faults.patches.modules import HEAD_SITES, at_ends, forward
from parity.faults.patches.rope import ROTATED, frequencies, has_rope, positions_of, tables, with_tables

PADDED, ON_THE_LEFT = "a padded batch", "a batch padded on the left"
DIFFERENTLY = "a batch with different padding"


def _at(scope: Scope, positions: Tensor) -> Change:
    return with_tables(scope, tables(scope, *frequencies(scope), positions=positions))


def _text(scope: Scope) -> Tensor:
    assert scope.text is not None, "unreachable because these faults apply to padded batches only"
    return scope.text.to(scope.model.device)


def _positions(scope: Scope) -> Tensor:
    """Positions (b, t) as the reference has them."""
    return positions_of(scope).expand(_text(scope).shape)


def _columns(scope: Scope) -> Tensor:
    """Positions (b, t) that count every token, padding too."""
    text = _text(scope)
    return torch.arange(text.shape[1], device=text.device).expand(text.shape)


def _counted(scope: Scope) -> Tensor:
    """Positions (b, t) that count text from 0, and 1 on padding, as transformers does in generation."""
    text = _text(scope)
    return (text.long().cumsum(-1) - 1).masked_fill(~text, 1)


def _elsewhere(positions: Callable[[Scope], Tensor]) -> Callable[[Scope], bool]:
    """Whether text of a padded batch stands elsewhere than in the reference, by positions (b or 1, t)."""

    def applies(scope: Scope) -> bool:
        if not has_rope(scope) or not _is_padded(scope):
            return False
        return bool((positions(scope) != _positions(scope))[_text(scope)].any())

    return applies


def _is_padded(scope: Scope) -> bool:
    return scope.text is not None


@fault(
    id="position-ignores-padding",
    title="positions count the padding on the left; the reference counts text tokens only",
    sites=ROTATED,
    fix="take positions from the running sum of the attention mask",
    source="unsloth#3699",
    needs=ON_THE_LEFT,
    applies=_elsewhere(_columns),
)
def position_ignores_padding(scope: Scope) -> Change:
    return _at(scope, _columns(scope))


@fault(
    id="position-skips-padding",
    title="positions count text tokens only; the reference counts the padding on the left as well",
    sites=ROTATED,
    fix="number the tokens as the reference was run, or give both the same position_ids",
    source="transformers#18388",
    needs=ON_THE_LEFT,
    applies=_elsewhere(_counted),
)
def position_skips_padding(scope: Scope) -> Change:
    return _at(scope, _counted(scope))


@fault(
    id="position-first-row",
    title="every row of the batch has the positions of the first",
    sites=ROTATED,
    fix="give the positions a batch axis",
    needs=DIFFERENTLY,
    applies=_elsewhere(lambda s: _positions(s)[:1]),
)
def position_first_row(scope: Scope) -> Change:
    return _at(scope, _positions(scope)[:1].expand_as(_positions(scope)))


@fault(
    id="position-decode-counts-padding",
    title="decoded tokens have the number of all tokens before them as position, padding included",
    sites=ROTATED,
    fix="continue the positions of each row's text, not those of the longest row",
    needs=f"{PADDED}, and a decoded token",
    applies=_elsewhere(_columns),
    number=START,
)
def position_decode_counts_padding(scope: Scope, start: float) -> Change:
    positions, columns = _positions(scope), _columns(scope)
    first = first_token(start, columns.shape[1])
    return _at(scope, torch.where(columns >= first, columns, positions))


@fault(
    id="mask-ignores-padding",
    title="text sees padding: the attention mask of the batch is not used",
    sites=INSIDE,
    fix="hide the keys that the attention mask of the batch calls padding",
    needs=ON_THE_LEFT,
    applies=lambda s: has_attention(s) and _is_padded(s),
)
def mask_ignores_padding(scope: Scope) -> Change:
    window = window_of(scope) or float("inf")
    return seeing(scope, lambda seen, i, j: seen | ((j <= i) & (i - j < window)))


@fault(
    id="mask-decode-ignores-padding",
    title="decoded tokens see padding: the attention mask of the prompt is not used after it",
    sites=INSIDE,
    fix="carry the attention mask of the prompt over to the decoded tokens, with a 1 for each of them",
    needs=f"{PADDED}, and a decoded token",
    applies=lambda s: has_attention(s) and _is_padded(s),
    number=START,
)
def mask_decode_ignores_padding(scope: Scope, start: float) -> Change:
    window, tokens = window_of(scope) or float("inf"), _text(scope).shape[1]
    first = first_token(start, tokens)
    return seeing(scope, lambda seen, i, j: seen | ((i >= first) & (j <= i) & (i - j < window)))


@fault(
    id="mask-padding-side",
    title="as many keys are hidden as are padding, but at the other end of the row",
    sites=INSIDE,
    fix="build the mask from the side on which the batch is padded",
    needs=PADDED,
    applies=lambda s: has_attention(s) and _is_padded(s),
)
def mask_padding_side(scope: Scope) -> Change:
    text = _text(scope).flip(1)[:, None, None]
    window = window_of(scope) or float("inf")
    return seeing(scope, lambda seen, i, j: text & (j <= i) & (i - j < window))


def _rows_differ(scope: Scope) -> bool:
    mask = scope.kwargs.get("attention_mask")
    return has_attention(scope) and isinstance(mask, Tensor) and not torch.equal(mask, mask[:1].expand_as(mask))


@fault(
    id="mask-first-row",
    title="every row of the batch has the mask of the first",
    sites=INSIDE,
    fix="give the mask a batch axis",
    source="candle#3586",
    needs=DIFFERENTLY,
    applies=_rows_differ,
)
def mask_first_row(scope: Scope) -> Change:
    attend = original(scope)

    def new(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        return attend(module, q, k, v, mask[:1].expand_as(mask), **kwargs)

    return replaced(scope, new)


def _last(scope: Scope) -> Tensor:
    """The number of each row's last token of text (b)."""
    text = _text(scope)
    return text.shape[1] - 1 - text.flip(1).int().argmax(1)


@fault(
    id="last-token-padding",
    title="the answer of a short row is read at the last column, where padding stands",
    sites=HEAD_SITES,
    fix="take each row's logits at its own last token of text, not at index -1",
    needs="a batch padded on the right",
    applies=lambda s: at_ends(s) and _is_padded(s) and not bool(_text(s)[:, -1].all()),
)
def last_token_padding(scope: Scope) -> Change:
    head, last = scope.model.get_output_embeddings(), _last(scope)
    project = head.forward

    def moved(x: Tensor) -> Tensor:
        y: Tensor = project(x).clone()
        y[torch.arange(len(y), device=y.device), last] = y[:, -1]
        return y

    return forward(head, moved)


FAULTS: tuple[Fault, ...] = (
    position_ignores_padding,
    position_skips_padding,
    position_first_row,
    position_decode_counts_padding,
    mask_ignores_padding,
    mask_decode_ignores_padding,
    mask_padding_side,
    mask_first_row,
    last_token_padding,
)
