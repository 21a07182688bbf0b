"""The mask: what each token sees."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from parity.faults.attend import Rule, has_attention, original, replaced, seeing, window_of
from parity.faults.fault import Fault, Number, Scope
from parity.faults.parts import plain

INSIDE = ("scores", "context")
Change = AbstractContextManager[None]


def _see(rule: Rule) -> Callable[[Scope], Change]:
    return lambda scope: seeing(scope, rule)


def _everything(seen: Tensor, i: Tensor, j: Tensor) -> Tensor:
    # A column that no query sees is padding, and stays hidden.
    return seen.any(-2, keepdim=True) & (i >= 0)


def _next_too(seen: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return seen | ((j == i + 1) & seen.any(-2, keepdim=True))


def _others_only(seen: Tensor, i: Tensor, j: Tensor) -> Tensor:
    # The first token keeps itself: it has nothing else to see.
    return seen & ((j < i) | ((i == 0) & (j == 0)))


def _flipped(seen: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return seen.any(-2, keepdim=True) & (j >= i)


def _window(size: float) -> Rule:
    return lambda seen, i, j: _causal(seen, i, j) & (i - j < size)


def _causal(seen: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return seen.any(-2, keepdim=True) & (j <= i)


def _narrowed(scope: Scope, size: float) -> Change:
    return seeing(scope, lambda seen, i, j: seen & (i - j < size))


def _window_changed(by: int) -> Callable[[Scope], Change]:
    return lambda scope: seeing(scope, _window((window_of(scope) or 0) + by))


def _has_window(scope: Scope) -> bool:
    return has_attention(scope) and window_of(scope) is not None


def _elsewhere_window(scope: Scope) -> bool:
    """Whether other layers have a window and this one has none."""
    kinds = getattr(scope.config, "layer_types", None) or ()
    return has_attention(scope) and window_of(scope) is None and "sliding_attention" in kinds


def _first_row(scope: Scope) -> Change:
    attend = original(scope)

    def new(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        return attend(module, q, k, v, mask[:1].expand_as(mask), **kwargs)

    return replaced(scope, new)


def _rows_differ(scope: Scope) -> bool:
    mask = scope.kwargs.get("attention_mask")
    return has_attention(scope) and isinstance(mask, Tensor) and not torch.equal(mask, mask[:1].expand_as(mask))


TWO_TOKENS = "two tokens or more"
LONGER = "a prompt longer than the window"

FAULTS: tuple[Fault, ...] = (
    Fault(
        "mask-none",
        "every token sees all tokens: there is no causal mask",
        INSIDE,
        "hide the keys that come after the query",
        "candle 97424289d, 25bcad290",
        TWO_TOKENS,
        plain(_see(_everything)),
        has_attention,
    ),
    Fault(
        "mask-next-token",
        "every token also sees the next one",
        INSIDE,
        "hide key j from query i where j > i, not where j > i + 1",
        "",
        TWO_TOKENS,
        plain(_see(_next_too)),
        has_attention,
    ),
    Fault(
        "mask-hides-self",
        "no token but the first sees itself",
        INSIDE,
        "hide key j from query i where j > i, not where j >= i",
        "",
        TWO_TOKENS,
        plain(_see(_others_only)),
        has_attention,
    ),
    Fault(
        "mask-inverted",
        "every token sees itself and what comes after it: the mask is upside down",
        INSIDE,
        "hide the upper triangle of (query, key), not the lower",
        "candle 97424289d, 25bcad290",
        TWO_TOKENS,
        plain(_see(_flipped)),
        has_attention,
    ),
    Fault(
        "mask-first-row",
        "every row of the batch has the mask of the first",
        INSIDE,
        "give the mask a batch axis",
        "candle#3586",
        "a batch with different padding",
        plain(_first_row),
        _rows_differ,
    ),
    Fault(
        "window-applied",
        "tokens see only a window; in the reference this layer sees everything before it",
        INSIDE,
        "use the window only where config.json asks for it",
        "",
        LONGER,
        _narrowed,
        lambda s: has_attention(s) and window_of(s) is None,
        Number(
            "window",
            lambda _s: float("inf"),
            (4096.0, 2048.0, 1024.0, 512.0, 256.0, 128.0, 64.0, 32.0),
            discrete=True,
        ),
    ),
    Fault(
        "window-of-other-layers",
        "this layer has the window of the others; in the reference it sees everything before it",
        INSIDE,
        "follow layer_types of config.json (or its sliding_window_pattern) from the right end",
        "mistral.rs#554",
        LONGER,
        plain(lambda s: seeing(s, _window(float(s.config.sliding_window)))),
        _elsewhere_window,
    ),
    Fault(
        "window-ignored",
        "tokens see everything before them; in the reference this layer has a window",
        INSIDE,
        "hide the keys that lie outside sliding_window",
        "",
        LONGER,
        plain(_see(_causal)),
        _has_window,
    ),
    Fault(
        "window-plus-one",
        "the window holds one token too many",
        INSIDE,
        "show key j to query i where i - j < sliding_window: the window counts the token itself",
        "transformers#39408",
        LONGER,
        plain(_window_changed(1)),
        _has_window,
    ),
    Fault(
        "window-minus-one",
        "the window holds one token too few",
        INSIDE,
        "show key j to query i where i - j < sliding_window: the window counts the token itself",
        "transformers#39408",
        LONGER,
        plain(_window_changed(-1)),
        _has_window,
    ),
)
