"""Seeing inside attention without editing transformers.

A model of transformers asks a table for its attention function each time it attends. During a recording the table
answers with one that taps what goes in and what comes out, and calls the function the model would have had. Its
config says nothing of it: there is code that computes otherwise for a name that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity.errors import UsageError
from parity.record.cache import CACHE, attend_in_calls, by_call, is_edited, of_calls, reads_of

Attention = Callable[..., Any]


@dataclass
class _Active:
    """Attention modules in reach of a tap, with the full site name of each value inside them.

    `given` are the values that the last of them was given, and what the tap made of each. `calls` are those that the
    pass stands for; None where it is one of them.
    """

    sites: dict[nn.Module, dict[str, str]]
    tap: Callable[[str, Tensor], Tensor]
    calls: Sequence[int] | None = None
    last: nn.Module | None = None
    given: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def take(self, module: nn.Module, inside: str, value: Tensor) -> Tensor:
        """What flows on from a query or key (b, h, t, d); a module that attends twice may be given the same again."""
        site = self.sites[module].get(inside)
        if site is None:
            return value
        if self.last is not module:
            self.last, self.given = module, {}
        if inside not in self.given or self.given[inside][0] is not value:
            self.given[inside] = value, self.tap(site, value)
        return self.given[inside][1]


_active: ContextVar[_Active | None] = ContextVar("parity_attention_taps", default=None)

INSIDE = {
    "q_rope": ("batch", "head", "token", "head_dim"),
    "k_rope": ("batch", "head", "token", "head_dim"),
    "scores": ("batch", "head", "token", "key"),
    "probs": ("batch", "head", "token", "key"),
    "context": ("batch", "token", "head", "head_dim"),
}


def check_attention(implementation: str) -> None:
    """Raises UsageError unless `implementation` is `eager`, `sdpa` or any other name that transformers knows."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        known = ", ".join(sorted(ALL_MASK_ATTENTION_FUNCTIONS))
        raise UsageError(f"attention {implementation!r} is not one that transformers has: {known}.")


@contextmanager
def attention_taps(
    sites: dict[nn.Module, dict[str, str]], tap: Callable[[str, Tensor], Tensor], calls: Sequence[int] | None = None
) -> Iterator[None]:
    """Let `tap` see the named values inside the given attention modules during the block.

    Queries, keys (b, h, t, d), scores, probabilities (b, h, t, k), the context (b, t, h, d), and the keys and values
    that are read: of a pass that stands for several `calls` those of each (b, g, calls, t, d), else (b, g, s, d).
    """
    if not sites:
        yield
        return
    token = _active.set(_Active(sites, tap, calls))
    try:
        with _tapped_interface():
            yield
    finally:
        _active.reset(token)


@contextmanager
def _tapped_interface() -> Iterator[None]:
    """The table of attention functions gives tapped ones in the block; where nothing is recorded they do nothing."""
    from transformers import AttentionInterface

    plain = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, attn_implementation: str, default: Attention) -> Attention:
        return _tapped(plain(self, attn_implementation, default))

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = plain


def _tapped(plain: Attention) -> Attention:
    if hasattr(plain, "tapped"):  # blocks may be nested
        return plain

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        active = _active.get()
        names = active.sites.get(module, {}) if active else {}
        if active is None or not names:
            return plain(module, query, key, value, attention_mask, **kwargs)
        tap = active.tap
        query, key = active.take(module, "q_rope", query), active.take(module, "k_rope", key)

        def compute(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
            computed: tuple[Tensor, Tensor | None] = plain(module, q, k, v, mask, **kwargs)
            return computed

        with _SoftmaxTap(names, tap, query.dtype):
            context, weights = _reading(active, names, compute, (query, key, value), attention_mask)
        return (tap(names["context"], context) if "context" in names else context), weights

    attend.tapped = plain  # type: ignore[attr-defined]
    return attend


def _reading(
    active: _Active, names: dict[str, str], attend: Any, given: tuple[Tensor, Tensor, Tensor], mask: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention to the keys and values that are read, which are tapped."""
    query, key, value = given
    is_tapped = all(name in names for name in CACHE)
    k_site, v_site = (names.get(name, "") for name in CACHE)
    if active.calls is None:
        if is_tapped:
            key, value = active.tap(k_site, key), active.tap(v_site, value)
        return attend(query, key, value, mask)  # type: ignore[no-any-return]
    if not is_tapped:
        if not is_edited():
            return attend(query, key, value, mask)  # type: ignore[no-any-return]
        return attend_in_calls(attend, query, reads_of(key, value, (key.shape[2],)), mask)
    reads = reads_of(key, value, active.calls)
    fresh = by_call(reads)
    k, v = active.tap(k_site, fresh[0]), active.tap(v_site, fresh[1])
    if (k is fresh[0] and v is fresh[1]) and not is_edited():
        return attend(query, key, value, mask)  # type: ignore[no-any-return]
    return attend_in_calls(attend, query, of_calls(k, v, active.calls), mask)


class _SoftmaxTap(TorchFunctionMode):
    """Taps scores and probs, which an eager attention function keeps to itself, at its softmax."""

    def __init__(self, names: dict[str, str], tap: Callable[[str, Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.names, self.tap, self.dtype = names, tap, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.softmax:
            return func(*args, **kwargs)
        scores, *rest = args
        if "scores" in self.names:
            scores = self.tap(self.names["scores"], scores)
        probs = func(scores, *rest, **kwargs)
        # transformers rounds the float32 probabilities to the model's dtype next: the value used is that one.
        return self.tap(self.names["probs"], probs.to(self.dtype)) if "probs" in self.names else probs
