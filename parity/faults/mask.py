"""The mask: what each token sees."""

from __future__ import annotations

from torch import Tensor

from parity.faults.fault import TWO_TOKENS, Change, Fault, Number, Scope, fault
from parity.faults.patches.attention import INSIDE, Rule, has_attention, seeing, window_of

LONGER = "a prompt longer than the window"


def _everything(seen: Tensor, i: Tensor, j: Tensor) -> Tensor:
    # A column that no query sees is padding, and stays hidden.
    return seen.any(-2, keepdim=True) & (i >= 0)


@fault(
    id="mask-none",
    title="every token sees all tokens: there is no causal mask",
    sites=INSIDE,
    fix="hide the keys that come after the query",
    source="candle 97424289d, 25bcad290",
    needs=TWO_TOKENS,
    applies=has_attention,
)
def mask_none(scope: Scope) -> Change:
    return seeing(scope, _everything)


def _next_too(seen: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return seen | ((j == i + 1) & seen.any(-2, keepdim=True))


@fault(
    id="mask-next-token",
    title="every token also sees the next one",
    sites=INSIDE,
    fix="hide key j from query i where j > i, not where j > i + 1",
    needs=TWO_TOKENS,
    applies=has_attention,
)
def mask_next_token(scope: Scope) -> Change:
    return seeing(scope, _next_too)


def _others_only(seen: Tensor, i: Tensor, j: Tensor) -> Tensor:
    # The first token keeps itself: it has nothing else to see.
    return seen & ((j < i) | ((i == 0) & (j == 0)))


@fault(
    id="mask-hides-self",
    title="no token but the first sees itself",
    sites=INSIDE,
    fix="hide key j from query i where j > i, not where j >= i",
    needs=TWO_TOKENS,
    applies=has_attention,
)
def mask_hides_self(scope: Scope) -> Change:
    return seeing(scope, _others_only)


def _flipped(seen: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return seen.any(-2, keepdim=True) & (j >= i)


@fault(
    id="mask-inverted",
    title="every token sees itself and what comes after it: the mask is upside down",
    sites=INSIDE,
    fix="hide the upper triangle of (query, key), not the lower",
    source="candle 97424289d, 25bcad290",
    needs=TWO_TOKENS,
    applies=has_attention,
)
def mask_inverted(scope: Scope) -> Change:
    return seeing(scope, _flipped)


@fault(
    id="window-applied",
    title="tokens see only a window; in the reference this layer sees everything before it",
    sites=INSIDE,
    fix="use the window only where config.json asks for it",
    needs=LONGER,
    applies=lambda s: has_attention(s) and window_of(s) is None,
    number=Number(
        name="window",
        expected=lambda _s: float("inf"),
        typical=(4096.0, 2048.0, 1024.0, 512.0, 256.0, 128.0, 64.0, 32.0),
        discrete=True,
        method="first-token",
    ),
)
def window_applied(scope: Scope, size: float) -> Change:
    return seeing(scope, lambda seen, i, j: seen & (i - j < size))


def _causal(seen: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return seen.any(-2, keepdim=True) & (j <= i)


def _window(size: float) -> Rule:
    return lambda seen, i, j: _causal(seen, i, j) & (i - j < size)


def _elsewhere_window(scope: Scope) -> bool:
    """Whether other layers have a window and this one has none."""
    kinds = getattr(scope.config, "layer_types", None) or ()
    return has_attention(scope) and window_of(scope) is None and "sliding_attention" in kinds


@fault(
    id="window-of-other-layers",
    title="this layer has the window of the others; in the reference it sees everything before it",
    sites=INSIDE,
    fix="follow layer_types of config.json (or its sliding_window_pattern) from the right end",
    source="mistral.rs#554",
    needs=LONGER,
    applies=_elsewhere_window,
)
def window_of_other_layers(scope: Scope) -> Change:
    return seeing(scope, _window(float(scope.config.sliding_window)))


def _has_window(scope: Scope) -> bool:
    return has_attention(scope) and window_of(scope) is not None


@fault(
    id="window-ignored",
    title="tokens see everything before them; in the reference this layer has a window",
    sites=INSIDE,
    fix="hide the keys that lie outside sliding_window",
    needs=LONGER,
    applies=_has_window,
)
def window_ignored(scope: Scope) -> Change:
    return seeing(scope, _causal)


@fault(
    id="window-plus-one",
    title="the window holds one token too many",
    sites=INSIDE,
    fix="show key j to query i where i - j < sliding_window: the window counts the token itself",
    source="transformers#39408",
    needs=LONGER,
    applies=_has_window,
)
def window_plus_one(scope: Scope) -> Change:
    return seeing(scope, _window((window_of(scope) or 0) + 1))


@fault(
    id="window-minus-one",
    title="the window holds one token too few",
    sites=INSIDE,
    fix="show key j to query i where i - j < sliding_window: the window counts the token itself",
    source="transformers#39408",
    needs=LONGER,
    applies=_has_window,
)
def window_minus_one(scope: Scope) -> Change:
    return seeing(scope, _window((window_of(scope) or 0) - 1))


FAULTS: tuple[Fault, ...] = (
    mask_none,
    mask_next_token,
    mask_hides_self,
    mask_inverted,
    window_applied,
    window_of_other_layers,
    window_ignored,
    window_plus_one,
    window_minus_one,
)
