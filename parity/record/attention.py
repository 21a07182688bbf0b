"""Seeing inside attention without editing transformers.

transformers lets anyone register an attention function under a name. Ours taps what goes in and what
comes out, and calls the implementation that the model would have used. The mask function must be
registered under the same name: without it transformers silently hands every layer no mask at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity.errors import UsageError


@dataclass
class _Active:
    """Attention modules in reach of a tap, with the full site name of each value inside them.

    `given` are the values that the last of them was given, and what the tap made of each.
    """

    sites: dict[nn.Module, dict[str, str]]
    tap: Callable[[str, Tensor], Tensor]
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


def register(implementation: str) -> str:
    """Make the tapped twin of an attention implementation known to transformers; returns its name.

    `implementation` is `eager`, `sdpa` or any other name that transformers knows; UsageError if it is none.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    known = sorted(name for name in ALL_MASK_ATTENTION_FUNCTIONS if not name.startswith("parity_"))
    if implementation not in known:
        raise UsageError(f"attention {implementation!r} is not one that transformers has: {', '.join(known)}.")
    name = f"parity_{implementation}"
    AttentionInterface.register(name, _tapped(implementation))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


@contextmanager
def attention_taps(sites: dict[nn.Module, dict[str, str]], tap: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Let `tap` see the named values inside the given attention modules during the block.

    Queries, keys (b, h, t, d), scores, probabilities (b, h, t, k) and the context (b, t, h, d).
    """
    token = _active.set(_Active(sites, tap))
    try:
        yield
    finally:
        _active.reset(token)


def _tapped(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        plain = _implementation(module, implementation)
        active = _active.get()
        names = active.sites.get(module, {}) if active else {}
        if active is None or not names:
            result: tuple[Tensor, Tensor | None] = plain(module, query, key, value, mask, **kwargs)
            return result
        tap = active.tap
        query, key = active.take(module, "q_rope", query), active.take(module, "k_rope", key)
        with _SoftmaxTap(names, tap, query.dtype):
            context, weights = plain(module, query, key, value, mask, **kwargs)
        return (tap(names["context"], context) if "context" in names else context), weights

    return attend


def _implementation(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function that transformers would have called."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name != "eager":
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return function
    eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return eager


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
