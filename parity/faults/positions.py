"""Positions: where counting starts, and when it restarts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parity.faults.fault import START, TWO_TOKENS, Change, Fault, Number, Scope, fault
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


def _from(scope: Scope, start: float, edit: Callable[[Tensor], Tensor]) -> Change:
    """Other positions from a token on: `edit` gets and gives those of these tokens, (b or 1, n)."""
    positions = positions_of(scope).clone()
    first = positions.shape[-1] if start == float("inf") else int(start)
    positions[..., first:] = edit(positions[..., first:])
    return with_tables(scope, _at(scope, positions))


@fault(
    id="position-decode-zero",
    title="decoded tokens have position 0, as when each is taken for a prompt of its own",
    sites=ROTATED,
    fix="pass the number of cached tokens as the position of a decoded one",
    source="mlx-vlm#1983",
    needs=TWO_TOKENS,
    applies=has_rope,
    number=START,
)
def position_decode_zero(scope: Scope, start: float) -> Change:
    return _from(scope, start, torch.zeros_like)


@fault(
    id="position-decode-ahead",
    title="decoded tokens have positions one too high: the new token is counted before it is placed",
    sites=ROTATED,
    fix="the position of a decoded token is the number of tokens before it",
    needs=TWO_TOKENS,
    applies=has_rope,
    number=START,
)
def position_decode_ahead(scope: Scope, start: float) -> Change:
    return _from(scope, start, lambda positions: positions + 1)


@fault(
    id="position-decode-behind",
    title="decoded tokens have positions one too low: the first has that of the prompt's last token",
    sites=ROTATED,
    fix="the position of a decoded token is the number of tokens before it",
    needs=TWO_TOKENS,
    applies=has_rope,
    number=START,
)
def position_decode_behind(scope: Scope, start: float) -> Change:
    return _from(scope, start, lambda positions: positions - 1)


@fault(
    id="position-restart",
    title="positions restart at 0 from a token on, as when a cached prefix is not counted",
    sites=ROTATED,
    fix="count positions from the number of tokens that the cache holds",
    needs=TWO_TOKENS,
    applies=has_rope,
    number=START,
)
def position_restart(scope: Scope, start: float) -> Change:
    return _from(scope, start, lambda positions: positions - positions[..., :1])


@fault(
    id="position-prefix-twice",
    title="positions jump by a prefix's length from a token on, as when a cached prefix is counted twice",
    sites=ROTATED,
    fix="add the length of the cached prefix once: to the positions, or to where the cache begins",
    needs=TWO_TOKENS,
    applies=has_rope,
    number=START,
)
def position_prefix_twice(scope: Scope, start: float) -> Change:
    return _from(scope, start, lambda positions: positions + positions[..., :1])


@fault(
    id="position-retained-rows",
    title="positions stop at a number: a token's is that of the rows which the cache retains, not of all before it",
    sites=ROTATED,
    fix="count the tokens that were seen, not the rows that a window or an eviction has left",
    needs="several calls, and more tokens than the cache retains",
    # Positions that stop in one pass are no matter of a cache.
    applies=lambda scope: has_rope(scope) and len(scope.calls) > 1,
    number=Number(
        name="retained",
        expected=lambda _s: float("inf"),
        typical=(8.0, 16.0, 512.0, 1024.0, 4096.0),
        discrete=True,
        method="first-token",
    ),
)
def position_retained_rows(scope: Scope, retained: float) -> Change:
    positions = positions_of(scope)
    return with_tables(scope, _at(scope, positions if retained == float("inf") else positions.clamp_max(int(retained))))


@fault(
    id="position-chunk-restart",
    title="positions restart with every chunk of a long prompt",
    sites=ROTATED,
    fix="carry the position over from one chunk of prefill to the next",
    needs="a prompt longer than the chunk",
    applies=has_rope,
    number=Number(
        name="chunk",
        expected=lambda _s: float("inf"),
        typical=(512.0, 256.0, 128.0, 64.0, 1024.0, 2048.0),
        discrete=True,
        method="first-token",
    ),
)
def position_chunk_restart(scope: Scope, chunk: float) -> Change:
    positions = positions_of(scope)
    return with_tables(scope, _at(scope, positions if chunk == float("inf") else positions % int(chunk)))


FAULTS: tuple[Fault, ...] = (
    position_offset,
    position_offset_q,
    position_offset_k,
    position_decode_zero,
    position_decode_ahead,
    position_decode_behind,
    position_restart,
    position_prefix_twice,
    position_retained_rows,
    position_chunk_restart,
)
