"""Two engines beside each other, as plain numbers: Distance (a site), LogProb (positions) → Contrast (two runs)."""

from __future__ import annotations

from dataclasses import dataclass

from parity.results import EXIT_CODES, Comparison, RunVerdict

CONTRAST_SCHEMA = 1


@dataclass(frozen=True)
class Distance:
    """How far two engines are from each other at a site, relative to the exact run's norm.

    floor  what two runs of the reference, each in the dtype of one engine, would differ by if they rounded apart
    """

    site: str
    distance: float
    floor: float
    bit_equal: bool

    @property
    def ratio(self) -> float:
        """Distance over floor; 0 where there is none."""
        return 0.0 if self.distance == 0 else self.distance / self.floor if self.floor else float("inf")


@dataclass(frozen=True)
class Positions:
    """The tokens `start` up to and including `end` of the prompt, as they are predicted by the tokens before them.

    mean_abs  mean |Δ log p| of these tokens between both engines; floor: what rounding makes of it
    """

    start: int
    end: int
    mean_abs: float
    floor: float


@dataclass(frozen=True)
class Contrast:
    """Two engines, each judged on its own inputs, and their distance from each other.

    engines    what each dump says that it is of; the file's name where it says nothing
    weights    how their checkpoints differ; empty where both ran the same
    agreeing   positions at which both have the same top token, of `positions`; None where one has no logits
    """

    first: Comparison
    second: Comparison
    distances: tuple[Distance, ...]
    logprobs: tuple[Positions, ...]
    engines: tuple[str, ...] = ("", "")
    weights: str = ""
    agreeing: int | None = None
    positions: int = 0
    schema: int = CONTRAST_SCHEMA

    @property
    def verdict(self) -> RunVerdict:
        """The worse of both; diverged too where the weights differ."""
        verdicts = (self.first.verdict, self.second.verdict)
        if self.weights or "diverged" in verdicts:
            return "diverged"
        return "inconclusive" if "inconclusive" in verdicts else "match"

    @property
    def compared(self) -> str:
        """What of both can be equal: bits, or in two dtypes numbers."""
        same = self.first.environment.candidate_dtype == self.second.environment.candidate_dtype
        return "bits" if same else "numbers"

    @property
    def apart(self) -> tuple[Distance, ...]:
        """The sites where these are not the same."""
        return tuple(d for d in self.distances if not d.bit_equal and (self.compared == "bits" or d.distance))

    @property
    def exit_code(self) -> int:
        """As diff(1)."""
        return EXIT_CODES[self.verdict]
