"""From a site's ratio to its verdict.

The order of decisions: non-finite values first, then the run's rounding mode, then the site's ratio, and only
where that is too large the question whether the error is noise or has structure.

The thresholds, in units of the floor unless another unit is given, and what measured them:

| value | what it bounds | where | measured by |
|---|---|---|---|
| 2 | ratio of a site that is rounding | results.ROUNDING | tests.bench.clean, .localization |
| 16 | ratio that noise may have | IMPRECISE | .localization (bfloat16 sums, int8, fp8: 1.8 to 10) |
| x exp(5.6/√ν)·0.6, at most 8 | the same of a sample of ν errors | chance.of_sample | test_chance, .clean |
| x (1 − 2/9ν + z√(2/9ν))^1.5 | the worst of many rows, z of 1e-8 / rows | chance.of_worst_row | test_chance, .clean |
| √width | independent errors of a row; 1 in float32 for a row alone | chance.in_row | .clean |
| u(1.5 + √n/4) rms | a row's common factor: a float32 sum of n terms of one sign | legal_ways | test_legal_ways |
| u(1 + ln f/2 + k/4) | relative error of RoPE's k-th frequency f | rope_phases | test_legal_ways |
| u√(n/6) | a number: a float32 sum of n products | reference.floor | .clean |
| 256 | ratio up to which a legal way may explain it | diagnose.second_look | u(1.5 + √n/4) of 65,536 terms |
| 4 draws of stochastic rounding | a row after operations that were not recorded | second_look | .clean |
| 4 draws of jitter | single rows on inputs that were recorded | second_look | .clean |
| 8 units of a router's noise | how much a tie between experts may have moved | reference.routing | chosen |
| 4096u, 0.5 | truth and reference on the same inputs; above, another operation | reference.self_check | chosen |
| 0.05, 5/√numbers | correlation of the error with the value | _COHERENT, _follows_value | .localization |
| −0.36u, −0.35, 8 sites | loss, correlation, number of sites of truncation | _TRUNCATION… | .localization, .clean |
| 4 x chance x noise of operations | the logits' total error over the reference's | conclude.total_limit | .clean |
| 5 x 8 draws of stochastic rounding | what a flipped top token had lost | compare.next_token | .clean |
| 1.6; 95 % of the error, or 1.2 | what a fault may leave; what it must explain | diagnose.trial | .localization |
| 1.5 x the best | what a fault may leave that cannot be told apart from it | diagnose.causes | .localization |
| 8 standard errors, 1 x the reference's | slope of a constant wrong below the rounding | diagnose.lean | .clean |
| 3 | ratio from which a fault would have shown | diagnose.power | test_power |
| 4u, 1e-5 | effect, relative change of a constant that is told | diagnose.readings | test_readings |

u is the unit roundoff of float32, 2⁻²⁴; in the rows of truncation and of truth and reference that of the working
dtype. What is chosen was not measured at its edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from parity.reasons import Gap
from parity.results import ROUNDING, SiteVerdict
from parity.sites import family

if TYPE_CHECKING:
    from parity.reference.floor import Local

# Above this ratio no amount of extra rounding is plausible, however much the error looks like noise.
IMPRECISE = 16.0
# Rounding is not correlated with the value it rounds; a mean beyond this share is a bias.
_COHERENT = 0.05
_CONCENTRATED = 3.0
# Truncation instead of rounding to nearest loses 0.7213 of a unit roundoff on average.
_TRUNCATION_GAIN = -0.7213
# Of one rounding it would be −0.87 with the value, and less where an operation rounds more than once.
_TRUNCATION_COSINE = -0.35
# Fewer sites than this show no rounding mode, and float32 is never made by cutting off bits of something wider.
_TRUNCATING_SITES = 8
_FLOAT32 = 2.0**-24
# A floor this far below its family's is no longer attributed to chance.
_LUCKIEST = 4.0
# Where the reference itself is this far off, relative to the value, nothing can be said of a candidate.
_USELESS = 0.5


@dataclass(frozen=True)
class RoundingMode:
    """What the whole run says about the candidate's rounding.

    `fused` operations saw inputs before they were rounded for the dump; `truncates` means float32 bits were
    cut off in place of rounded to nearest.
    """

    fused: bool
    truncates: bool


def rounding_mode(sites: Iterable[Local], roundoff: float) -> RoundingMode:
    """The rounding mode that most sites share. `roundoff` is the unit roundoff of the working dtype."""
    noisy = [s for s in sites if not s.must_be_exact and not s.bit_equal and 0 < s.ratio < IMPRECISE]
    if not noisy:
        return RoundingMode(fused=False, truncates=False)
    truncates = roundoff > _FLOAT32 and len(noisy) >= _TRUNCATING_SITES and _lean_to_zero(noisy, roundoff)
    return RoundingMode(fused=not truncates and median(s.ratio for s in noisy) > 1.15, truncates=truncates)


def _lean_to_zero(sites: Sequence[Local], roundoff: float) -> bool:
    """Whether most sites lose what truncation loses, and lose it nearly always rather than in the mean."""
    gains = [s.structure.gain / roundoff for s in sites]
    biased = sum(gain < _TRUNCATION_GAIN / 3 for gain in gains) > 0.7 * len(gains)
    loss, leaning = median(gains), median(s.structure.cosine for s in sites)
    return biased and loss < _TRUNCATION_GAIN / 2 and leaning < _TRUNCATION_COSINE


def luck(sites: Mapping[str, Local]) -> dict[str, float]:
    """By how much each site's floor fell short of what is usual in its family: 1 or more.

    The floor of few numbers is one draw of a random quantity. An operation of the same kind, in another layer,
    says how large it usually is; a floor that came out small by chance must not turn rounding into a bug.
    """
    families: dict[str, list[float]] = {}
    for name, local in sites.items():
        families.setdefault(family(name), []).append(local.floor_rel)
    usual = {name: median(floors) for name, floors in families.items()}
    return {
        name: min(max(usual[family(name)] / local.floor_rel, 1.0), _LUCKIEST) if local.floor_rel else 1.0
        for name, local in sites.items()
    }


def judge_site(local: Local, mode: RoundingMode, lucky: float = 1.0) -> tuple[SiteVerdict, float, str | Gap]:
    """Verdict, ratio and reason for one site, the reason of an unmeasured one a Gap; `lucky` is its share of `luck`."""
    if local.nonfinite:
        if local.reference_nonfinite:
            return "unmeasured", local.ratio, Gap("reference overflows")
        return "nonfinite", local.ratio, f"{local.nonfinite} values are NaN or infinite, on finite inputs"
    if local.nonfinite_inputs and local.ratio == 0:
        return "unmeasured", 0.0, Gap("inputs not finite")
    strict, ratio_fused = local.ratio / lucky, local.ratio_fused / lucky
    ratio = ratio_fused if mode.fused else strict
    if local.floor_rel > _USELESS and ratio <= ROUNDING:
        return "unmeasured", ratio, Gap("too rough", share=local.floor_rel)
    if local.bit_equal:
        return "exact", ratio, "bit-equal to the reference on the same inputs"
    if local.must_be_exact:
        return ("exact", 0.0, "equal") if ratio == 0 else ("wrong", ratio, "moves data only, and must be bit-equal")
    if mode.truncates and ratio <= IMPRECISE / 2 and local.structure.gain < 0:
        return "imprecise", ratio, "truncates where it should round to nearest"
    fused = ratio_fused <= ROUNDING and not _follows_value(local)
    if ratio <= ROUNDING or fused:
        if not local.row_ratio / lucky <= ROUNDING:
            return "wrong", local.row_ratio / lucky, _minority(local)
        if ratio <= ROUNDING:
            return "rounding", ratio, local.way or "within the reference's own rounding"
        return "rounding", ratio_fused, "rounding of an operation fused with the one before it"
    if local.all_zero:
        return "wrong", ratio, "all zero"
    structured = structure_of(local)
    if ratio <= IMPRECISE and not structured:
        return "imprecise", ratio, "noise, but more of it than this dtype needs"
    return "wrong", ratio, structured or "too large for rounding"


def _minority(local: Local) -> str:
    """Which rows are wrong where most are right."""
    tokens = local.worst_tokens
    if not tokens:
        return "a few rows are far off, the others are rounding"
    named = ", ".join(map(str, tokens))
    last = ", the last, which makes the next one," if local.tokens - 1 in tokens else ""
    plural, verb = ("s", "are") if len(tokens) > 1 else ("", "is")
    return f"token{plural} {named}{last} {verb} far off, most others are rounding"


def structure_of(local: Local) -> str:
    """What shows that an error is not noise, or an empty string."""
    s = local.structure
    if _follows_value(local):
        return f"the error follows the value: gain {1 + s.gain:.4g}"
    if _spread(s.by_head) > _CONCENTRATED:
        worst = max(range(len(s.by_head)), key=s.by_head.__getitem__)
        return f"most of it in head {worst}"
    if _spread(s.by_token) > _CONCENTRATED:
        worst = max(range(len(s.by_token)), key=s.by_token.__getitem__)
        return f"most of it at token {worst * s.pooled}" + (f" to {(worst + 1) * s.pooled - 1}" if s.pooled > 1 else "")
    if s.channel_share > 0.5:
        return f"{s.channel_share:.0%} of it in channel {s.channel}"
    return ""


def _follows_value(local: Local) -> bool:
    # Chance alone correlates n numbers by about 1/√n; rows of one kind count once.
    return abs(local.structure.cosine) > max(_COHERENT, 5 / math.sqrt(max(local.kinds * local.width, 1)))


def _spread(profile: Sequence[float]) -> float:
    """Largest over median: 1 for noise. Fewer than three values cannot tell."""
    if len(profile) < 3:
        return 1.0
    middle = median(profile)
    return max(profile) / middle if middle else float("inf")
