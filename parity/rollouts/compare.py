"""The straight way of a rollout: read, score, judge, explain, conclude."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from parity.errors import IncomparableError
from parity.observer import Observer
from parity.options import RunOptions
from parity.reference.checkpoint import default_dtype, find
from parity.reference.precision import truth_dtype
from parity.reference.replay import Reference
from parity.results import ROUNDING, Environment, RunVerdict
from parity.rollout_report import Cause, RolloutReport, Stretch
from parity.rollouts import causes
from parity.rollouts.figures import far_rows, figures, floor_of, ratio_of, storage_of, stretches
from parity.rollouts.files import Rollouts, read_rollouts
from parity.rollouts.scores import Question, Scores, Tokens, score
from parity.rollouts.tensors import Row
from parity.run_spec import DTYPES, RunSpec, versions

# Above this ratio no amount of extra rounding is plausible (parity.compare.judge has the same limit for a site).
FAR = 16.0


@dataclass(frozen=True)
class RolloutOptions:
    """How the reference is run: as in RunOptions. `temperature` is what both sides' log-probabilities are meant at.

    `earlier` are checkpoints whose weights the engine may still have had.
    """

    model: str
    dtype: str | None = None
    device: str = "cpu"
    attention: str = "eager"
    temperature: float = 1.0
    earlier: tuple[str, ...] = field(default=())
    trust_remote_code: bool = False


def compare_rollouts(
    path: Path, options: RolloutOptions, command: str = "", observer: Observer | None = None
) -> RolloutReport:
    """Judge the log-probabilities in a file. Raises DumpError, ModelError, UsageError and IncomparableError."""
    observer = observer or Observer()
    found = read_rollouts(path)
    run = _run_of(options.model, options, found.rows, command)
    tokens = Tokens.of(found.rows)
    question = Question(Reference(run.model()), found.rows, _finite(tokens), options.temperature)
    with observer.timed("log-probabilities"):
        scores = score(question, observer)
    judged = _judged(tokens, scores)
    report = _report(path, found, run, judged, tokens, options)
    with observer.timed("causes"):
        # A temperature shows where single tokens are rounding; everything else is looked for only where they are not.
        if report.verdict == "match":
            explained = list(_some([causes.temperature(judged, options.temperature)]))
        else:
            explained = sorted(_causes(judged, question, options), key=lambda cause: cause.remainder)
    # What is explained down to rounding is known not to be rounding itself.
    return replace(report, verdict="diverged" if explained else report.verdict, causes=tuple(explained))


def _run_of(model: str, options: RolloutOptions, rows: Sequence[Row], command: str) -> RunSpec:
    checkpoint = find(model, trust_remote_code=options.trust_remote_code)
    whole = sorted((row.prompt + row.completion for row in rows), key=len, reverse=True)
    how = RunOptions(model=model, dtype=options.dtype, device=options.device, attention=options.attention, power=False)
    return RunSpec(checkpoint, tuple(whole), options.dtype or default_dtype(checkpoint), how, command=command)


def _finite(tokens: Tokens) -> Tokens:
    """The tokens whose log-probability is a finite number."""
    some = np.isfinite(tokens.engine)
    if not some.any():
        raise IncomparableError(
            f"of {len(some)} log-probabilities none is finite. The engine's forward pass is broken: record a dump "
            "of it, and `parity diff` says where."
        )
    return Tokens(tokens.row[some], tokens.at[some], tokens.engine[some])


def _judged(tokens: Tokens, scores: Scores) -> causes.Judged:
    known = _finite(tokens)
    storage = storage_of(known.engine)
    return causes.Judged(known, scores, floor_of(scores.own, scores.ideal, scores.noise, storage), storage)


def _report(
    path: Path, found: Rollouts, run: RunSpec, judged: causes.Judged, tokens: Tokens, options: RolloutOptions
) -> RolloutReport:
    known, scores, floor = judged.tokens, judged.scores, judged.floor
    delta, drawn = known.engine - scores.own, floor.draws[:-1] + scores.ideal - scores.own
    by_position = stretches(known.at, judged.error, delta, floor, drawn)
    ratio = ratio_of(judged.error, floor)
    far = far_rows(known.row, judged.error, floor, FAR) if ratio <= ROUNDING else ()
    nonfinite = len(tokens.row) - len(known.row)
    slack = 8 * floor.rms + judged.storage.step(known.engine)
    positive = int((known.engine > np.maximum(slack, 1e-6)).sum())
    return RolloutReport(
        verdict=_verdict(ratio, bool(far or nonfinite or positive)),
        ratio=ratio,
        figures=figures(known.engine, scores.own, scores.ideal, floor),
        stretches=by_position,
        causes=(),
        rows=len(found.rows),
        tokens=len(tokens.row),
        asked=options.temperature,
        environment=_environment(path, run, options),
        format=found.format,
        storage=judged.storage.words,
        starts=_starts(by_position),
        far_rows=far,
        unread=sum(value is None for row in found.rows for value in row.logprobs),
        nonfinite=nonfinite,
        positive=positive,
    )


def _verdict(ratio: float, broken: bool) -> RunVerdict:
    if broken or not ratio <= FAR:
        return "diverged"
    return "match" if ratio <= ROUNDING else "inconclusive"


def _starts(found: Sequence[Stretch]) -> int | None:
    """The first token that is off, where those before it are rounding."""
    off = [stretch.start for stretch in found if stretch.ratio > ROUNDING]
    return off[0] if off and off[0] != found[0].start else None


def _causes(judged: causes.Judged, question: Question, options: RolloutOptions) -> Iterator[Cause]:
    lengths = [len(row.completion) for row in question.rows]
    yield from _some(causes.shifts(judged, lengths))
    yield from _some([causes.temperature(judged, options.temperature)])
    best: dict[str, Cause] = {}
    for cause in _some(causes.truncations(judged, options.temperature)):
        if cause.kind not in best or cause.remainder < best[cause.kind].remainder:
            best[cause.kind] = cause
    yield from best.values()
    yield from _some(causes.faults(judged, question))
    for name in options.earlier:
        other = replace(question, reference=Reference(_run_of(name, options, question.rows, "").model()))
        scores = score(other, Observer())
        yield from _some([causes.checkpoint(judged, name, scores)])


def _some(found: Sequence[Cause | None] | Iterator[Cause | None]) -> Iterator[Cause]:
    return (cause for cause in found if cause is not None)


def _environment(path: Path, run: RunSpec, options: RolloutOptions) -> Environment:
    working = run.dtype
    return Environment(
        model=run.checkpoint.name,
        fingerprint=run.checkpoint.fingerprint(),
        candidate=str(path),
        prompt=None,
        tokens=max(map(len, run.token_ids)),
        batch=len(run.token_ids),
        working_dtype=working,
        candidate_dtype="unknown",
        truth_dtype=str(truth_dtype(DTYPES[working])).removeprefix("torch."),
        device=run.device,
        attention=options.attention,
        versions=versions(),
        command=run.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds={},
        options={"temperature": f"{options.temperature:g}"} if options.temperature != 1 else {},
    )
