"""What both sides would say after the prompt: tokens and logits as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    """A token and its logit."""

    id: int
    text: str
    logit: float


@dataclass(frozen=True)
class LogitSample:
    """Logits of both sides at the last token, for a part of the vocabulary: the reference's largest first.

    The part holds the largest of each side, and evenly spaced ranks of the reference's. `vocabulary` is the whole.
    """

    reference: tuple[float, ...]
    candidate: tuple[float, ...]
    vocabulary: int


@dataclass(frozen=True)
class NextToken:
    """What both sides would say after the last token; the reference's and the candidate's top five.

    `flips` counts positions of the prompt where the top token differs, `unexplained_flips` those whose margin
    is more than five times the rounding noise of that difference.
    """

    reference: tuple[Token, ...]
    candidate: tuple[Token, ...]
    flips: int
    unexplained_flips: int
    positions: int
    max_kl: float
    margin_sigma: float
    sample: LogitSample | None = None
