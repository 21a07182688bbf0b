"""Which operations give other bits in another setting: Variance (a site in a setting) → Invariance, plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from parity.results import EXIT_CODES, ROUNDING, RunVerdict

INVARIANCE_SCHEMA = 1
# Two roundings of one result are each within ROUNDING of the exact one.
APART = 2 * ROUNDING


@dataclass(frozen=True)
class Variance:
    """An operation that gives other bits on the same inputs.

    setting   what was changed: `batch 4`, `chunks of 64`, `threads 2`, …
    distance  ‖other − first‖ / ‖first‖
    floors    the same in units of the reference's own rounding error of this operation; None for whole numbers
    """

    site: str
    setting: str
    distance: float
    floors: float | None


@dataclass(frozen=True)
class Invariance:
    """What varies with what, in the candidate and in the reference itself.

    settings   what was tried; `measured` sites were looked at in each, and `unread` could not be lined up
    exact      whether equal bits were asked for; otherwise rounding is allowed
    """

    candidate: str
    settings: tuple[str, ...]
    measured: int
    unread: tuple[str, ...]
    variances: tuple[Variance, ...]
    of_reference: tuple[Variance, ...]
    reference: str
    exact: bool
    command: str
    schema: int = INVARIANCE_SCHEMA

    @property
    def beyond_rounding(self) -> tuple[Variance, ...]:
        """What differs by more than two roundings may."""
        return tuple(v for v in self.variances if v.floors is not None and not v.floors <= APART)

    @property
    def verdict(self) -> RunVerdict:
        """Diverged where bits differ, or without `exact` where they differ by more than rounding."""
        if not self.measured:
            return "inconclusive"
        return "diverged" if (self.variances if self.exact else self.beyond_rounding) else "match"

    @property
    def exit_code(self) -> int:
        """As diff(1)."""
        return EXIT_CODES[self.verdict]
