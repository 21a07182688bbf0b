"""What was found of a rollout's log-probabilities, as plain numbers: Figure, Stretch, Cause → RolloutReport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parity.results import EXIT_CODES, Environment, RunVerdict

ROLLOUT_SCHEMA = 1

CauseKind = Literal["temperature", "shift", "fault", "checkpoint", "top-k", "top-p"]


@dataclass(frozen=True)
class Figure:
    """One of the usual figures: its value, and what rounding in this dtype would make of it.

    floor     mean over engines that only round, drawn at random
    farthest  of those draws the one farthest from what no rounding at all would give
    alarm     the fixed number at which this figure is usually said to be too large; None where there is none
    """

    key: str
    title: str
    value: float
    floor: float
    farthest: float
    alarm: float | None = None


@dataclass(frozen=True)
class Stretch:
    """The tokens `start` up to and including `end` of all completions, counted from 0 at the first sampled one.

    mean_abs and floor are the mean |Δ log p| of so many tokens and what rounding would make of it; ratio is the
    root mean square of the error over that of rounding, less what chance makes of so few tokens.
    """

    start: int
    end: int
    tokens: int
    mean_abs: float
    floor: float
    ratio: float


@dataclass(frozen=True)
class Cause:
    """What reproduces the rollout's log-probabilities.

    kind       temperature: `value` is the temperature that the logits were divided by, ± `stderr`
               shift: each log-probability belongs to another token, `value` tokens later in its row
               fault: the row `id` of the catalogue; checkpoint: the weights are those of `id`
               top-k, top-p: renormalized over the `value` most likely tokens, or over this share of the probability
    explained  share of the error's energy that it accounts for
    remainder  what is left, in units of what rounding makes
    """

    kind: CauseKind
    explained: float
    remainder: float
    id: str = ""
    title: str = ""
    value: float = 0.0
    stderr: float = 0.0


@dataclass(frozen=True)
class RolloutReport:
    """Everything that one `parity logprobs` knows. Log-probabilities are natural logarithms.

    ratio        root mean square distance from the exact log-probabilities over that of rounding, less chance
    asked        the temperature at which both sides' log-probabilities are meant
    storage      how the file rounds its numbers, in words; empty where that does not show
    starts       the first stretch that is off although those before it are rounding; None where there is no such
    far_rows     rows (from 0) that are far off although all in all the file is rounding
    unread       tokens without a log-probability in the file (null, or masked), which are not judged
    nonfinite    log-probabilities that are NaN or infinite
    positive     log-probabilities above what rounding makes of 0, which none can be
    """

    verdict: RunVerdict
    ratio: float
    figures: tuple[Figure, ...]
    stretches: tuple[Stretch, ...]
    causes: tuple[Cause, ...]
    rows: int
    tokens: int
    asked: float
    environment: Environment
    format: str
    storage: str = ""
    starts: int | None = None
    far_rows: tuple[int, ...] = ()
    unread: int = 0
    nonfinite: int = 0
    positive: int = 0
    schema: int = ROLLOUT_SCHEMA

    @property
    def exit_code(self) -> int:
        """As diff(1): 0 rounding, 1 not, 2 undecided."""
        return EXIT_CODES[self.verdict]
