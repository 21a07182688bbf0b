"""Which keys of earlier calls a later call sees: masks and windows in decoding, and a prefix that was cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from parity.faults.cache_rows import TWO_CALLS, in_calls
from parity.faults.fault import LAST, START, TWO_TOKENS, Change, Fault, Number, Scope, fault, first_token
from parity.faults.patches.attention import INSIDE, has_attention, has_sinks, seeing, softmax_as, window_of
from parity.faults.patches.numbers import wide
from parity.record.cache import bounds

# (visible (b, 1, t, s), query number (t, 1), key number (s), first token) -> visible, for tokens from that one on
_Later = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _seeing(scope: Scope, start: float, rule: _Later) -> Change:
    def seen(mask: Tensor, i: Tensor, j: Tensor) -> Tensor:
        first = first_token(start, sum(scope.calls))
        return torch.where(i >= first, rule(mask, i, j, first), mask)

    return seeing(scope, seen)


@fault(
    id="cache-unused",
    title="a decoded token sees itself alone: the cache is not read",
    sites=INSIDE,
    fix="join the keys and values of the cache to those of the new token",
    needs=TWO_TOKENS,
    applies=has_attention,
    number=START,
)
def cache_unused(scope: Scope, start: float) -> Change:
    return _seeing(scope, start, lambda mask, i, j, _first: mask & (j == i))


@fault(
    id="cache-lost",
    title="from a token on nothing before it is seen: what an earlier call put into the cache is gone",
    sites=INSIDE,
    fix="hand the cache of one call to the next",
    needs=TWO_TOKENS,
    applies=has_attention,
    number=START,
)
def cache_lost(scope: Scope, start: float) -> Change:
    return _seeing(scope, start, lambda mask, _i, j, first: mask & (j >= first))


@fault(
    id="cache-not-extended",
    title="decoded tokens see the prompt and themselves, but no other decoded token",
    sites=INSIDE,
    fix="put the keys and values of every decoded token into the cache",
    needs="three tokens or more",
    applies=has_attention,
    number=replace(START, typical=(2 * LAST,)),
)
def cache_not_extended(scope: Scope, start: float) -> Change:
    return _seeing(scope, start, lambda mask, i, j, first: mask & ((j < first) | (j == i)))


@fault(
    id="cache-hides-self",
    title="a decoded token does not see itself: the mask in decoding is one too short",
    sites=INSIDE,
    fix="the mask of a decoded token has room for the cached tokens and for the token itself",
    needs=TWO_TOKENS,
    applies=has_attention,
    number=START,
)
def cache_hides_self(scope: Scope, start: float) -> Change:
    return _seeing(scope, start, lambda mask, i, j, _first: mask & (j != i))


@fault(
    id="cache-overwrites-last",
    title="decoded tokens do not see the token before the first of them: its place in the cache is overwritten",
    sites=INSIDE,
    fix="write the first decoded token behind the last of the prompt",
    needs=TWO_TOKENS,
    applies=has_attention,
    number=START,
)
def cache_overwrites_last(scope: Scope, start: float) -> Change:
    return _seeing(scope, start, lambda mask, _i, j, first: mask & (j != first - 1))


@fault(
    id="cache-mask-top-left",
    title="the mask of a later call begins at the first key: its n-th token sees n keys, however many are cached",
    sites=INSIDE,
    fix="align the causal mask at the last key (in PyTorch is_causal does not: give a mask, or causal_lower_right)",
    needs=TWO_CALLS,
    applies=in_calls,
)
def cache_mask_top_left(scope: Scope) -> Change:
    starts = torch.cat([torch.full((stop - start,), start) for start, stop in bounds(scope.calls)])

    def seen(mask: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask & (j <= i - starts.to(i.device)[i])

    return seeing(scope, seen)


@fault(
    id="cache-empty-slot-seen",
    title="decoded tokens see one row too many, an empty one: the mask in decoding is one too long",
    sites=("probs", "context"),
    fix="hide the rows of the buffer that no token has filled yet",
    needs=TWO_TOKENS,
    applies=lambda s: has_attention(s) and not has_sinks(s),
    number=START,
)
def cache_empty_slot_seen(scope: Scope, start: float) -> Change:
    first = first_token(start, sum(scope.calls))

    def compute(scores: Tensor) -> Tensor:
        tokens, keys = scores.shape[-2:]
        scores = scores.to(wide(scores.dtype))
        late = torch.arange(keys - tokens, keys, device=scores.device) >= first
        hidden = torch.where(late, 0.0, torch.finfo(scores.dtype).min).to(scores.dtype)
        # A key of zeros has a score of 0, and a value of zeros adds nothing.
        return torch.cat([scores, hidden[:, None].expand(*scores.shape[:-1], 1)], dim=-1).softmax(-1)[..., :-1]

    return softmax_as(compute)


@fault(
    id="cache-prefix-short",
    title="later calls do not see the last tokens of the first: its length is misread, as of a cached prefix in blocks",
    sites=INSIDE,
    fix="take the number of cached tokens from what was computed, not from whole blocks or another request",
    needs=TWO_CALLS,
    applies=in_calls,
    number=Number(
        name="missing", expected=lambda _s: 0.0, typical=tuple(map(float, range(2, 17))), log=False, discrete=True
    ),
)
def cache_prefix_short(scope: Scope, missing: float) -> Change:
    # All of the first call forgotten is a cache that is lost.
    kept = max(scope.calls[0] - missing, 1)
    return _seeing(scope, scope.calls[0], lambda mask, _i, j, first: mask & ((j < kept) | (j >= first)))


@fault(
    id="cache-window-ignored",
    title="decoded tokens see everything before them: the window is not applied in decoding",
    sites=INSIDE,
    fix="hide what lies behind the window in decoding too",
    needs="a prompt longer than the window",
    applies=lambda s: has_attention(s) and window_of(s) is not None,
    number=START,
)
def cache_window_ignored(scope: Scope, start: float) -> Change:
    return _seeing(scope, start, lambda mask, i, j, _first: mask | ((j <= i) & mask.any(-2, keepdim=True)))


@fault(
    id="cache-window-stands",
    title="the window stands where the prompt ended, so that decoded tokens see too much",
    sites=INSIDE,
    fix="let the window slide with every decoded token",
    needs="a prompt longer than the window",
    applies=lambda s: has_attention(s) and window_of(s) is not None,
    number=START,
)
def cache_window_stands(scope: Scope, start: float) -> Change:
    window = window_of(scope) or 0
    return _seeing(
        scope,
        start,
        lambda mask, i, j, first: mask | ((j <= i) & (j > first - 1 - window) & mask.any(-2, keepdim=True)),
    )


FAULTS: tuple[Fault, ...] = (
    cache_unused,
    cache_lost,
    cache_not_extended,
    cache_hides_self,
    cache_overwrites_last,
    cache_mask_top_left,
    cache_empty_slot_seen,
    cache_prefix_short,
    cache_window_ignored,
    cache_window_stands,
)
