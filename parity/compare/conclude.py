"""The last stage: from what was judged and explained to the verdict of the run and its Comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import torch

from parity import words
from parity.compare.explain import Explained
from parity.compare.findings import unexamined
from parity.compare.measure import Measured
from parity.compare.regimes import InRegimes
from parity.compare.sides import Sides
from parity.compare.weights import accusing, weight_check
from parity.diagnose.other_bits import how_it_rounds
from parity.diagnose.second_look import FARTHEST
from parity.diagnose.workbench import Workbench
from parity.observer import Observer
from parity.predictions import NextToken
from parity.quantization import WeightError
from parity.reasons import VITAL, Inconclusive, Trouble
from parity.reference import chance
from parity.reference.floor import Local
from parity.results import (
    Check,
    Comparison,
    Coverage,
    Environment,
    Finding,
    Measurement,
    RunVerdict,
    logits_of,
)
from parity.run_spec import versions

# The reference's own error is exceeded this many times at the logits only if something is wrong, provided that both
# are samples of many errors and that single operations are not noisier than the reference's.
TOTAL = 4.0


def conclude(run: InRegimes, explained: Explained, errors: Sequence[WeightError], observer: Observer) -> Comparison:
    """The Comparison of a run."""
    checks = (*run.sides.checks, *weight_check(explained, errors))
    explained = accusing(explained, errors)
    sides, measured = replace(run.sides, checks=checks), run.measured
    sites, end = explained.sites, measured.ending
    limit = total_limit(sites, {name: site.local for name, site in measured.sites.items()})
    troubles = tuple(observer.troubles)
    verdict, why = judge_run(sites, explained.findings, sides.checks, end.next_token, limit, troubles)
    if why is not None and why.kind == "unexamined" and sides.run.options.allow_unexamined:
        verdict, why = "match", None
    other_bits = None
    if verdict == "match" and sides.run.options.exact and (first := next((m for m in sites if _differs(m)), None)):
        verdict = "diverged"
        with observer.timed("other bits"), observer.surviving("other bits"):
            other_bits = how_it_rounds(first, Workbench(sides.reference, sides.run.batch, sides.recorded))
    comparison = Comparison(
        verdict=verdict,
        headline="",
        answer="",
        findings=explained.findings,
        sites=sites,
        next_token=end.next_token,
        coverage=covered(sites),
        checks=sides.checks,
        environment=_environment(sides, measured, observer),
        power=explained.power,
        noise_ratio=end.noise_ratio,
        inconclusive=why,
        troubles=tuple(observer.troubles),
        accepted=run.accepted,
        weights=tuple(errors),
        other_bits=other_bits,
    )
    return words.spoken(comparison)


def _differs(m: Measurement) -> bool:
    return m.bit_equal is False


def total_limit(sites: Sequence[Measurement], locals_: Mapping[str, Local]) -> float:
    """How many times as far off as the reference the logits may be, given how noisy the operations are.

    A port that legally sums in plain loops is noisier than a library in each operation, and so in all of them; and
    the reference's own error at the logits of a few tokens is one draw of a random quantity.
    """
    noisy = [locals_[s.site] for s in sites if s.verdict == "rounding"]
    theirs, ours = sum(local.local_rel**2 for local in noisy), sum(local.reference_rel**2 for local in noisy)
    noisier = math.sqrt(max(1.0, theirs / ours)) if ours else 1.0
    logits = logits_of(sites)
    end = locals_.get(logits.site) if logits else None
    few = chance.of_sample(chance.in_row(end.width) * end.kinds) if end else 1.0
    return TOTAL * noisier * few


def judge_run(
    sites: Sequence[Measurement],
    bad: Sequence[Finding],
    checks: Sequence[Check],
    next_token: NextToken | None,
    limit: float = TOTAL,
    troubles: Sequence[Trouble] = (),
) -> tuple[RunVerdict, Inconclusive | None]:
    """The verdict of the run, and why it is inconclusive if it is.

    `bad` are its findings, after diagnosis; `limit` is what total_limit allows the logits. Of `troubles` those count
    without which the verdict could have been another.
    """
    if bad and all(check.ok or not check.vital for check in checks):
        in_doubt = any(t.stage == "second look" for t in troubles) and all(f.ratio <= FARTHEST for f in bad)
        return ("inconclusive", Inconclusive("trouble")) if in_doubt else ("diverged", None)
    why = _inconclusive(sites, checks, next_token, limit)
    if why is None and any(t.stage in VITAL for t in troubles):
        why = Inconclusive("trouble")
    return ("inconclusive", why) if why else ("match", None)


def _inconclusive(
    sites: Sequence[Measurement], checks: Sequence[Check], next_token: NextToken | None, limit: float
) -> Inconclusive | None:
    if not all(check.ok for check in checks):
        return Inconclusive("check failed")
    logits = logits_of(sites)
    if logits is None:
        return Inconclusive("no site")
    if left_out := sum(m.gap is not None and m.gap.kind == "left out" for m in sites):
        return Inconclusive("left out", count=left_out)
    if logits.verdict == "unmeasured":
        return Inconclusive("logits unmeasured")
    if logits.total_ratio is not None and not logits.total_ratio <= limit:
        return Inconclusive("logits off", ratio=logits.total_ratio)
    if next_token is not None and next_token.unexplained_flips:
        return Inconclusive("flips", count=next_token.unexplained_flips)
    if rough := sum(m.gap is not None and m.gap.kind == "too rough" for m in sites):
        return Inconclusive("too rough", count=rough)
    nobody_saw = covered(sites).unexamined
    return Inconclusive("unexamined", count=nobody_saw) if nobody_saw else None


def covered(sites: Sequence[Measurement]) -> Coverage:
    """How many of the known sites were measured, and of how many operations no verdict speaks."""
    return Coverage(sum(s.verdict != "unmeasured" for s in sites), len(sites), len(unexamined(sites)))


def _environment(sides: Sides, measured: Measured, observer: Observer) -> Environment:
    run, working = sides.run, sides.reference.working.dtype
    kinds = [m.dtype for m in measured.sites.values()]
    return Environment(
        model=run.checkpoint.name,
        fingerprint=sides.dump.info.fingerprint or run.checkpoint.fingerprint(),
        candidate=sides.name,
        prompt=run.prompt,
        tokens=len(run.token_ids[0]),
        batch=len(run.token_ids),
        working_dtype=run.dtype,
        candidate_dtype=max(set(kinds), key=kinds.count) if kinds else "unknown",
        truth_dtype="float64" if working is torch.float32 else "float32",
        device=run.device,
        attention=run.options.attention,
        versions=versions(),
        command=run.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds={what: round(seconds, 3) for what, seconds in observer.seconds.items()},
        options=run.options.given(),
        calls=run.calls if len(run.calls) > 1 else (),
    )
