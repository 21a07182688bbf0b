"""What attention reads of a cache in each of several calls, where one pass over all tokens stands for them.

In that pass a call reads the keys and values of all tokens up to its last. What a candidate read instead may be put in
their place, and then each call attends to its own. A row that a call lacks is marked as absent, and nobody sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from parity.sites import CACHED, CALL

CACHE = dict.fromkeys(CACHED, ("batch", "head", CALL, "token", "head_dim"))
# A row of -0.0 is absent: no cache holds it, and every dtype can.
ABSENT = -0.0

# What a fault makes of the keys and values (b, g, s, d) that a call reads, the first `start` of which are of earlier
# calls.
Edit = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
# (query, key, value, mask) -> context (b, t, h, d) and probabilities, if it has them
Attend = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor | None]]

_edit: ContextVar[Edit | None] = ContextVar("parity_cache_edit", default=None)


@dataclass(frozen=True)
class Read:
    """The keys and values (b, g, stop, d) that the call of the tokens from `start` up to `stop` reads."""

    start: int
    stop: int
    k: Tensor
    v: Tensor


@contextmanager
def reading_edited(edit: Edit) -> Iterator[None]:
    """Every call of attention during the block reads what `edit` makes of its keys and values."""
    token = _edit.set(edit)
    try:
        yield
    finally:
        _edit.reset(token)


def is_edited() -> bool:
    """Whether keys and values are read as a fault has them."""
    return _edit.get() is not None


def bounds(calls: Sequence[int]) -> list[tuple[int, int]]:
    """The first token of each call, and the one behind its last."""
    return [(stop - size, stop) for size, stop in zip(calls, accumulate(calls), strict=True)]


def reads_of(key: Tensor, value: Tensor, calls: Sequence[int]) -> list[Read]:
    """What each of the calls reads of the keys and values (b, g, t, d) of all."""
    edit = _edit.get() or (lambda k, v, _start: (k, v))
    return [Read(a, b, *edit(key[:, :, :b], value[:, :, :b], a)) for a, b in bounds(calls)]


def by_call(reads: Sequence[Read]) -> tuple[Tensor, Tensor]:
    """The keys and the values of all calls (b, g, calls, t, d); 0 for tokens of later calls."""
    tokens = reads[-1].stop
    k, v = (torch.stack([pad(x, (0, 0, 0, tokens - x.shape[2])) for x in xs], 2) for xs in _sides(reads))
    return k, v


def _sides(reads: Sequence[Read]) -> tuple[list[Tensor], list[Tensor]]:
    return [read.k for read in reads], [read.v for read in reads]


def of_calls(k: Tensor, v: Tensor, calls: Sequence[int]) -> list[Read]:
    """`by_call` undone, for keys and values (b, g, calls, t, d)."""
    return [Read(a, b, k[:, :, i, :b], v[:, :, i, :b]) for i, (a, b) in enumerate(bounds(calls))]


def attend_in_calls(attend: Attend, query: Tensor, reads: Sequence[Read], mask: Any) -> tuple[Tensor, Tensor | None]:
    """Attention of the queries (b, h, t, d) of each call to what it reads: context (b, t, h, d) of all of them."""
    parts = [
        attend(query[:, :, one.start : one.stop], one.k, one.v, _mask_of(one, mask, query, len(reads) > 1))
        for one in reads
    ]
    return parts[0] if len(parts) == 1 else (torch.cat([context for context, _ in parts], 1), None)


def _mask_of(read: Read, mask: Any, query: Tensor, in_calls: bool) -> Any:
    """The mask (b or 1, 1, t, s) of one call, which hides what is absent."""
    absent = ((read.k == 0) & read.k.signbit()).all(-1).all(1)
    if not isinstance(mask, Tensor):
        if not in_calls and not absent.any():
            return mask
        # An attention that needs no mask for a whole prompt hides what comes later.
        tokens = query.shape[2]
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    part = mask[:, :, read.start : read.stop, : read.stop]
    if not absent.any():
        return part
    hidden = absent[:, None, None]
    return part & ~hidden if part.dtype == torch.bool else part.masked_fill(hidden, torch.finfo(part.dtype).min)


def shown(mask: Tensor) -> Tensor:
    """Where a mask (b, 1, t, s) hides nothing, as booleans of its shape; it may be additive or boolean.

    Additive masks hide by the least number of their dtype, to which others may have been added: below half of it
    nothing else lies.
    """
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def rows_read(mask: Any, calls: Sequence[int], text: Tensor | None) -> Tensor:
    """Which keys a token of text of each call sees (b or 1, calls, t), by a layer's mask (b or 1, 1, t, s).

    `text` (b, t) is true where a token is text, None where all are.
    """
    tokens = sum(calls)
    device = mask.device if isinstance(mask, Tensor) else None
    seen = torch.ones(1, tokens, tokens, dtype=torch.bool, device=device).tril()
    if isinstance(mask, Tensor):
        seen = seen & shown(mask)[:, 0]
    if text is not None:
        seen = seen & text.to(seen.device)[:, :, None]
    return torch.stack([seen[:, a:b].any(1) for a, b in bounds(calls)], 1)
