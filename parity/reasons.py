"""Why something cannot be said: small values with their numbers. parity.words makes sentences of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GapKind = Literal[
    "not recorded",
    "not observable",
    "misshapen",
    "ambiguous",
    "reference overflows",
    "inputs not finite",
    "too rough",
    "left out",
    "unknown",
]


@dataclass(frozen=True)
class Gap:
    """Why a site was not measured. What a kind does not speak of is empty.

    not recorded         the candidate has no activation of this name
    not observable       the candidate's runtime never has this value: it is computed within another operation
    misshapen            its `shape`, of the axes `dims` if it declares them, does not fit `axes` of `sizes`
    ambiguous            its `shape` can be read as any of `readings`, and it declares no axes
    reference overflows  the reference is not finite either, in the working dtype
    inputs not finite    the candidate's own inputs are not finite
    too rough            the reference's own rounding is `share` of the value
    left out             it was not asked for, or the part of the report that has it is missing, as `detail` says
    unknown              anything else, as `detail` says
    """

    kind: GapKind
    shape: tuple[int, ...] = ()
    dims: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    readings: tuple[str, ...] = ()
    share: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Invisible:
    """A fault that this run could not have revealed.

    no effect  it changes nothing on these tokens; `needs` says what would show it, where that is known
    drowns     it would have made an error of `ratio` floors, which is too close to rounding
    """

    fault: str
    kind: Literal["no effect", "drowns"]
    ratio: float = 0.0
    needs: str = ""


@dataclass(frozen=True)
class NotTried:
    """A fault of which nothing is known in this run.

    no place      the model has no operation that it could change
    large         it shows only at embedding and head, whose copies would take more memory than all the rest
    not recorded  the candidate recorded too little to run the operations where it shows on their own inputs
    whole         the model cannot be run in pieces
    failed        trying it ended in an error, as `detail` says
    unknown       a report of an older version does not say
    """

    fault: str
    why: Literal["no place", "large", "not recorded", "whole", "failed", "unknown"]
    detail: str = ""


@dataclass(frozen=True)
class Inconclusive:
    """Why a run in which nothing is wrong is still not a match.

    check failed       an integrity check failed: the first of `Comparison.checks` that did
    no site            the model has no site
    logits unmeasured  the last site was not measured
    logits off         each operation only rounds, yet the logits are `ratio` times as far off as the reference's
    flips              `count` top tokens differ by more than rounding explains
    unexamined         `count` operations are covered by no measured site
    left out           `count` sites were not asked for, or parts of the report are missing
    too rough          at `count` sites the reference's own rounding hides anything that could be wrong
    trouble            a stage failed that could have accused or cleared: the first vital one of `Comparison.troubles`
    """

    kind: Literal[
        "check failed",
        "no site",
        "logits unmeasured",
        "logits off",
        "flips",
        "unexamined",
        "left out",
        "too rough",
        "trouble",
    ]
    count: int = 0
    ratio: float = 0.0


Stage = Literal[
    "second look",
    "regimes",
    "own faults",
    "causes",
    "error map",
    "wrong constants",
    "power",
    "other bits",
    "next token",
    "token names",
    "pictures",
    "page",
    "markdown",
    "step summary",
]
# Those that can turn one verdict into another: without them a run is neither a match nor diverged for certain.
VITAL: tuple[Stage, ...] = ("second look", "wrong constants", "next token")


@dataclass(frozen=True)
class Trouble:
    """A stage behind the measurement that failed: why, and at what (a site, a family), where it is not all of it.

    second look      whether a legal order of summation explains a site in doubt
    regimes          whether an accepted precision regime explains what is wrong
    own faults       whether each of the user's own faults changes anything
    causes           which known fault a finding is
    error map        where in a site the error lies
    wrong constants  which constants are off by less than rounding
    power            what the run could have seen
    other bits       how the first operation with other bits rounds
    next token       what both sides say next
    token names      the text of the tokens
    pictures, page, markdown, step summary: parts of the report
    """

    stage: Stage
    reason: str
    about: str = ""
