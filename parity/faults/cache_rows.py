"""What a later call reads of the cache: rows that were not written, written elsewhere, dropped, or another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from parity.faults.fault import LAST, START, Change, Fault, Number, Scope, attribute, fault, first_token
from parity.faults.patches.attention import INSIDE, has_attention
from parity.faults.patches.modules import attention_of
from parity.faults.patches.rope import has_rope
from parity.record.cache import ABSENT, reading_edited
from parity.record.scans import source_of
from parity.sites import CACHED

SITES = (*CACHED, *INSIDE)
TWO_CALLS = "two calls or more"
# (keys or values (b, g, s, d), to be changed in place, and how many of the rows are of earlier calls)
_Rewrite = Callable[[Tensor, int], None]


def in_calls(scope: Scope) -> bool:
    """Whether a layer has attention that is called more than once."""
    return has_attention(scope) and len(scope.calls) > 1


def _later(rewrite: _Rewrite) -> Change:
    """Later calls read keys and values that were rewritten."""

    def edit(k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        if start:
            k, v = k.clone(), v.clone()
            for x in (k, v):
                rewrite(x, start)
        return k, v

    return reading_edited(edit)


_ROW = Number(
    name="row", expected=lambda _s: float("inf"), typical=(1.0,), log=False, discrete=True, method="first-token"
)
_KEPT = replace(_ROW, name="kept", typical=(8.0, 4.0, 16.0, 32.0), method="first-right")
_SHIFT = Number(name="shift", expected=lambda _s: 0.0, typical=(1.0, -1.0), log=False, discrete=True)


@fault(
    id="cache-row-stale",
    title="a row of the cache holds the keys and values of the token before it",
    sites=SITES,
    fix="write the keys and values of each token into its own row, before the row is read",
    needs=TWO_CALLS,
    applies=in_calls,
    number=_ROW,
)
def cache_row_stale(_scope: Scope, row: float) -> Change:
    def rewrite(x: Tensor, _start: int) -> None:
        if 1 <= row < x.shape[2]:
            x[:, :, int(row)] = x[:, :, int(row) - 1]

    return _later(rewrite)


@fault(
    id="cache-wrong-slot",
    title="the first token of a later call is written over the row of the token before it",
    sites=SITES,
    fix="write a new token behind the last of the cache: its row is the number of tokens before it",
    needs=TWO_CALLS,
    applies=in_calls,
    number=START,
)
def cache_wrong_slot(scope: Scope, start: float) -> Change:
    first = first_token(start, sum(scope.calls))

    def rewrite(x: Tensor, _start: int) -> None:
        if 1 <= first < x.shape[2]:
            x[:, :, int(first) - 1] = x[:, :, int(first)]

    return _later(rewrite)


@fault(
    id="cache-row-empty",
    title="rows of the cache are zeros from a token on: its keys and values were not written where they are read",
    sites=SITES,
    fix="write the keys and values of every token into the cache before attention reads it",
    needs=TWO_CALLS,
    applies=in_calls,
    number=replace(START, typical=(LAST,)),
)
def cache_row_empty(scope: Scope, start: float) -> Change:
    first = first_token(start, sum(scope.calls))

    def rewrite(x: Tensor, _start: int) -> None:
        if first < x.shape[2]:
            x[:, :, int(first) :] = 0.0

    return _later(rewrite)


@fault(
    id="cache-evicted",
    title="the cache has dropped tokens that attention should still see, and keeps the last ones alone",
    sites=SITES,
    fix="keep every token that the layer's mask still shows; only a window may drop those behind it",
    needs="two calls or more, and more tokens than are kept",
    applies=in_calls,
    number=_KEPT,
)
def cache_evicted(_scope: Scope, kept: float) -> Change:
    def rewrite(x: Tensor, _start: int) -> None:
        if kept < x.shape[2]:
            x[:, :, : x.shape[2] - int(kept)] = ABSENT

    return _later(rewrite)


@fault(
    id="cache-other-sequence",
    title="each sequence of the batch reads the cached rows of another",
    sites=SITES,
    fix="index the cache by the sequence's own slot, also after sequences were reordered",
    needs="a batch, and two calls or more",
    applies=in_calls,
    number=_SHIFT,
)
def cache_other_sequence(_scope: Scope, shift: float) -> Change:
    def rewrite(x: Tensor, start: int) -> None:
        x[:, :, :start] = x[:, :, :start].roll(int(shift), 0)

    return _later(rewrite)


@fault(
    id="cache-first-sequence",
    title="every sequence of the batch reads the cached rows of the first",
    sites=SITES,
    fix="give the cache a batch axis, and read each sequence's own rows",
    needs="a batch, and two calls or more",
    applies=in_calls,
)
def cache_first_sequence(_scope: Scope) -> Change:
    def rewrite(x: Tensor, start: int) -> None:
        x[:, :, :start] = x[:1, :, :start].clone()

    return _later(rewrite)


@fault(
    id="cache-before-rope",
    title="the cache holds keys before RoPE, and nobody rotates them when they are read; the reference's are rotated",
    sites=("cache_k", *INSIDE),
    fix="rotate keys before they enter the cache, or rotate what is read by each row's own position",
    needs=TWO_CALLS,
    applies=lambda s: in_calls(s) and has_rope(s),
)
@contextmanager
def cache_before_rope(scope: Scope) -> Iterator[None]:
    source, plain = source_of(attention_of(scope)), list[Tensor]()
    rotate = source.apply_rotary_pos_emb

    def seen(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain[:] = [k]
        return rotate(q, k, *args, **kwargs)

    def edit(k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        if start and plain:
            turning = plain[0].shape[-1]
            k = k.clone()
            k[:, :, :start, :turning] = plain[0][:, :, :start].to(k.dtype)
        return k, v

    with attribute(source, "apply_rotary_pos_emb", seen), reading_edited(edit):
        yield


FAULTS: tuple[Fault, ...] = (
    cache_row_stale,
    cache_wrong_slot,
    cache_row_empty,
    cache_evicted,
    cache_other_sequence,
    cache_first_sequence,
    cache_before_rope,
)
