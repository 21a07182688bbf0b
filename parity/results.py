"""What was found, as plain numbers: Measurement (a site) → Finding (a wrong operation) → Comparison (a run)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from parity.other_bits import OtherBits
from parity.predictions import NextToken
from parity.quantization import WeightError
from parity.reasons import Gap, Inconclusive, Invisible, NotTried, Trouble
from parity.showing import Showing

SCHEMA = 2

SiteVerdict = Literal["exact", "rounding", "imprecise", "wrong", "nonfinite", "unmeasured"]
RunVerdict = Literal["match", "diverged", "inconclusive"]

EXIT_CODES: dict[RunVerdict, int] = {"match": 0, "diverged": 1, "inconclusive": 2}
# Upper ends of the bins of a histogram in ULP: 0, 1, 2, 3 to 4, 5 to 8, …; what is beyond has a bin of its own.
ULP_BINS = (0, *(1 << power for power in range(11)))
# Worst first. A site that was not measured may hide anything, so it ranks above those that are known to be right.
SEVERITY: tuple[SiteVerdict, ...] = ("nonfinite", "wrong", "imprecise", "unmeasured", "rounding", "exact")
BAD: tuple[SiteVerdict, ...] = SEVERITY[:3]
# Up to this ratio an error is rounding: four times the variance of the reference's own.
ROUNDING = 2.0
# Two ratios of one site in two runs that differ by less than this factor are alike.
FACTOR = 1.5


def worst_verdict(verdicts: Iterable[SiteVerdict]) -> SiteVerdict:
    """The most severe of the verdicts. Raises ValueError if there is none."""
    return min(verdicts, key=SEVERITY.index)


def four_digits(values: Sequence[float]) -> tuple[float, ...]:
    """The numbers with as many digits as a profile deserves."""
    return tuple(float(f"{value:.4g}") for value in values)


@dataclass(frozen=True)
class Structure:
    """Where and how a local error is concentrated: what distinguishes a bug from noise.

    gain         candidate ≈ (1 + gain) truth, rows weighted by their floor
    cosine       between the error and the truth, weighted likewise; 0 for rounding
    by_token     ratio at each token, in at most 256 bins of `pooled` neighbouring tokens (the largest of each)
    by_head      ratio of each head, where the site has heads
    channel      the last-axis index that holds most of the error, and its share of the error's energy
    first_token  the first token whose ratio is above 3
    elements     how many numbers all this was estimated from
    """

    gain: float
    cosine: float
    by_token: tuple[float, ...]
    by_head: tuple[float, ...]
    channel: int
    channel_share: float
    first_token: int | None
    elements: int
    pooled: int = 1

    def shortened(self) -> Structure:
        """The same with four digits in the profiles: more are noise, and would be most of a report."""
        return dataclasses.replace(self, by_token=four_digits(self.by_token), by_head=four_digits(self.by_head))


@dataclass(frozen=True)
class Measurement:
    """One site. Relative numbers are dimensionless; mse and max_abs are in the activation's own units.

    reason         what the verdict rests on; empty for an unmeasured site, whose `gap` says why
    ratio          R: local error over the floor (see parity.reference.floor)
    local_rel      ‖candidate − truth‖ / ‖truth‖, truth being the reference's operation on the candidate's inputs
    inherited_rel  ‖truth − reference‖ / ‖truth‖: what came in with the inputs
    floor_rel      ‖floor‖ / ‖truth‖
    total_ratio    distance from the exact run, in units of the reference's own distance from it
    mse … ulp_max  candidate against the reference's plain run
    ulps           histogram of the local error (parity.compare.metrics.counting_ulps): candidate against the
                   reference's operation in the working dtype on the candidate's inputs; None where all are equal
    regime         the accepted precision regime in which the reference computed here; empty for its own
    first_read     the first call that reads something wrong of a cache, counted from 0
    """

    site: str
    verdict: SiteVerdict
    reason: str
    ratio: float | None = None
    row_max: float | None = None
    local_rel: float | None = None
    inherited_rel: float | None = None
    floor_rel: float | None = None
    total_ratio: float | None = None
    bit_equal: bool | None = None
    mse: float | None = None
    cosine: float | None = None
    max_abs: float | None = None
    rel_l2: float | None = None
    ulp_max: float | None = None
    ulps: tuple[int, ...] | None = None
    structure: Structure | None = None
    dtype: str | None = None
    shape: tuple[int, ...] = ()
    steps: tuple[str, ...] = ()
    gap: Gap | None = None
    regime: str = ""
    first_read: int | None = None


def logits_of(sites: Sequence[Measurement]) -> Measurement | None:
    """The measurement of the logits, which are the last of a model's sites; None without sites."""
    return sites[-1] if sites else None


@dataclass(frozen=True)
class Reading:
    """A constant read off the candidate: its value, the standard error of that, and what the config says."""

    value: float
    stderr: float
    expected: float


@dataclass(frozen=True)
class FaultMatch:
    """The known porting bug that reproduces what the candidate computed.

    explained        share of the local error's energy that the fault accounts for
    remainder_ratio  what is left, in units of the fault's own floor; about 1 if nothing is
    rivals           ids of faults that cannot be told apart from this one in this run
    reads            constants read off, by name: {"rope_theta": Reading(1e4, 3, 1e6)}
    """

    id: str
    title: str
    fix: str
    explained: float
    remainder_ratio: float
    rivals: tuple[str, ...]
    reads: dict[str, Reading]


@dataclass(frozen=True)
class Residual:
    """The local error of one site over its floor, token by token and head by head.

    columns  what the columns are: heads, or equal blocks of the last axis ("channel") where the site has no heads
    size     how many heads or channels there are
    ratios   a row for each token; where there are many, the largest of neighbouring tokens
    """

    site: str
    columns: Literal["head", "channel"]
    size: int
    ratios: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class FirstCall:
    """The first call of several in which an operation is wrong, after others in which it is right.

    number  of the call, from 1 because call 0 has none before it
    step    how many tokens have been decoded one by one with it, 0 if it is a chunk of a prompt
    """

    number: int
    step: int


@dataclass(frozen=True)
class Finding:
    """One wrong operation: a family of sites and the layers where it is wrong.

    `families` are several where one fault explains them all. `span` holds sites that were not measured just before:
    the fault may lie in any of their operations. `fault` is None where nothing fits. `residual` is that of the site
    with the largest ratio. `first_call` is None where the first call is wrong already, or there is but one.
    """

    families: tuple[str, ...]
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    verdict: SiteVerdict
    ratio: float
    first_token: int | None
    evidence: tuple[str, ...]
    span: tuple[str, ...] = ()
    fault: FaultMatch | None = None
    residual: Residual | None = None
    first_call: FirstCall | None = None


@dataclass(frozen=True)
class Power:
    """Which faults of the catalogue this run would have revealed, by id, and which not.

    Together these are the whole catalogue. `dtype` is the working dtype, in whose rounding the others drown;
    `seen_from` has, for faults with a number, by how much it must be off to show (about, by a straight line).
    """

    visible: tuple[str, ...]
    invisible: tuple[Invisible, ...]
    not_tried: tuple[NotTried, ...] = ()
    dtype: str = ""
    seen_from: dict[str, float] = field(default_factory=dict)

    @property
    def unseen(self) -> tuple[Invisible | NotTried, ...]:
        """The faults that this run does not speak of."""
        return self.invisible + self.not_tried


@dataclass(frozen=True)
class Coverage:
    """Sites measured of the sites that the reference has, and operations that no verdict covers."""

    measured: int
    known: int
    unexamined: int = 0


@dataclass(frozen=True)
class Check:
    """One integrity check that was made before or beside the measurement.

    If a `vital` one fails, the reference is at fault, and nothing can be said of a candidate.
    """

    name: str
    ok: bool
    detail: str
    vital: bool = False


@dataclass(frozen=True)
class Environment:
    """What was run, and how to run it again. `calls` are the tokens of each call, empty where there was but one."""

    model: str
    fingerprint: str
    candidate: str
    prompt: str | None
    tokens: int
    batch: int
    working_dtype: str
    candidate_dtype: str
    truth_dtype: str
    device: str
    attention: str
    versions: dict[str, str]
    command: str
    created: str
    seconds: dict[str, float]
    options: dict[str, str] = field(default_factory=dict)
    calls: tuple[int, ...] = ()


@dataclass(frozen=True, repr=False)
class Comparison(Showing):
    """Everything that one `parity diff` knows.

    headline     what the verdict rests on, and
    answer       how far off the logits are: sentences for people (parity.words), which no code reads back
    inconclusive why the run is inconclusive; None otherwise
    noise_ratio  distance of the logits from the exact ones, in deviations of stochastic rounding; None: unasked
    troubles     stages that failed, without which the verdict came out
    weights      the error of each tensor, where the reference computed with the candidate's own weights
    accepted     what would be findings, but for precision regimes that the user accepts and that were proved there
    other_bits   how the first operation with other bits rounds; None unless equal bits were asked for, and are not
    """

    verdict: RunVerdict
    headline: str
    answer: str
    findings: tuple[Finding, ...]
    sites: tuple[Measurement, ...]
    next_token: NextToken | None
    coverage: Coverage
    checks: tuple[Check, ...]
    environment: Environment
    power: Power | None = None
    noise_ratio: float | None = None
    inconclusive: Inconclusive | None = None
    troubles: tuple[Trouble, ...] = ()
    accepted: tuple[Finding, ...] = ()
    weights: tuple[WeightError, ...] = ()
    other_bits: OtherBits | None = None
    schema: int = SCHEMA

    @property
    def exit_code(self) -> int:
        """As diff(1): 0 match, 1 diverged, 2 trouble or inconclusive."""
        return EXIT_CODES[self.verdict]

    @property
    def logits(self) -> Measurement | None:
        """The measurement of the logits; None if the model has no site."""
        return logits_of(self.sites)
