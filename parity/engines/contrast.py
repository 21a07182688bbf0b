"""A against B: two recorded engines, each judged on its own inputs, and how far they are from each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from torch import Tensor

from parity.candidates.base import dump_file
from parity.compare.pipeline import compare, opened
from parity.compare.sides import Sides
from parity.dump import RunInfo
from parity.engine_report import Contrast, Distance, Positions
from parity.engines.own_runs import own_runs
from parity.errors import IncomparableError, ModelError
from parity.observer import Observer
from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.run_spec import RunSpec, run_spec


def contrast(
    dumps: tuple[Path, Path], names: Path | str | None, options: RunOptions, command: str, observer: Observer
) -> Contrast:
    """Judge both dumps and measure their distance. Raises ParityError, IncomparableError if the tokens differ."""
    engines = [dump_file(path, names) for path in dumps]
    said = [engine.said() for engine in engines]
    runs = [_run_of(one, options, command) for one in said]
    _require_same_tokens(dumps, runs)
    references = [Reference(runs[0].model())]
    references.append(references[0] if _same(runs) else Reference(runs[1].model()))
    with ExitStack() as stack:
        sides: list[Sides] = []
        found = []
        for run, engine, reference in zip(runs, engines, references, strict=True):
            watched = replace(observer, troubles=[], seconds={})
            sides.append(stack.enter_context(opened(run, engine, watched, reference)))
            found.append(compare(sides[-1], watched))
        observer.show("distance of both", 0, 1)
        distances, ends = _distances(sides[0], sides[1])
    agreeing, positions, logprobs = _ends(ends, runs[0].ids)
    first, second = found
    called = tuple(info.producer or engine.name for info, engine in zip(said, engines, strict=True))
    return Contrast(first, second, tuple(distances), logprobs, called, _weights(runs), agreeing, positions)


def _run_of(said: RunInfo, options: RunOptions, command: str) -> RunSpec:
    """The run of one engine: on the model that was asked for, or on its own where that has other weights."""
    if options.model is not None and said.fingerprint is not None and said.model:
        asked = find(options.model, trust_remote_code=options.trust_remote_code)
        if asked.fingerprint() != said.fingerprint and _is_at_hand(said):
            options = replace(options, model=said.model)
    return run_spec(options, said, command)


def _is_at_hand(said: RunInfo) -> bool:
    try:
        return find(said.model or "").fingerprint() == said.fingerprint
    except ModelError:
        return False


def _require_same_tokens(dumps: tuple[Path, Path], runs: list[RunSpec]) -> None:
    if runs[0].token_ids != runs[1].token_ids:
        raise IncomparableError(
            f"{dumps[0]} and {dumps[1]} are runs on other token ids "
            f"({len(runs[0].token_ids[0])} and {len(runs[1].token_ids[0])} tokens). Record both on the same."
        )
    padded = [path for path, run in zip(dumps, runs, strict=True) if run.batch.text is not None]
    if padded:
        raise IncomparableError(f"{padded[0]}: holds a padded batch. Compare each dump with the reference by itself.")


def _same(runs: list[RunSpec]) -> bool:
    first, second = runs
    return first.checkpoint.path == second.checkpoint.path and first.dtype == second.dtype


def _weights(runs: list[RunSpec]) -> str:
    first, second = (run.checkpoint for run in runs)
    if first.fingerprint() == second.fingerprint():
        return ""
    return f"{first.name} ({first.fingerprint()}) and {second.name} ({second.fingerprint()})"


# Of each engine: its logits (b, t, vocab), the reference's in the engine's dtype, and exact ones.
_Ends = list[tuple[Tensor, Tensor, Tensor]]


def _distances(first: Sides, second: Sides) -> tuple[list[Distance], _Ends]:
    """Both engines at every site that both recorded, and their logits."""
    found: list[Distance] = []
    ends: _Ends = []
    sites = ({s.name: s for s in side.reference.working.sites} for side in (first, second))
    ours, theirs = sites
    for one, two in _both(first, second):
        for name in (site for site in one if site in two):
            a, b = first.recorded(ours[name]), second.recorded(theirs[name])
            if a is None or b is None or a.shape != b.shape or not a.is_floating_point():
                continue
            found.append(_distance(name, a, b, one[name], two[name]))
            if name == first.reference.working.sites[-1].name:
                ends = [(a, *one[name]), (b, *two[name])]
    return found, ends


_Values = dict[str, tuple[Tensor, Tensor]]


def _both(first: Sides, second: Sides) -> Iterator[tuple[_Values, _Values]]:
    """The references' own runs of both sides; of one, where it is the same."""
    own = own_runs(first.reference, first.run.batch)
    if first.reference is second.reference:
        yield from ((values, values) for _, values in own)
        return
    for mine, other in zip_longest(own, own_runs(second.reference, second.run.batch)):
        if mine is not None and other is not None:
            yield mine[1], other[1]


def _distance(name: str, a: Tensor, b: Tensor, one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> Distance:
    size = float(one[1].double().norm()) or 1.0
    apart = float((a.double() - b.double()).norm())
    rounding = sum(float((plain.double() - exact.double()).square().sum()) for plain, exact in (one, two)) ** 0.5
    equal = a.dtype == b.dtype and bool((a == b).all())
    return Distance(name, apart / size, rounding / size, equal)


def _ends(ends: _Ends, ids: Tensor) -> tuple[int | None, int, tuple[Positions, ...]]:
    """Positions whose top tokens agree, of how many, and the log-probabilities of the prompt's own tokens."""
    if not ends:
        return None, 0, ()
    first, second = (side[0] for side in ends)
    same = first.argmax(-1).cpu() == second.argmax(-1).cpu()
    if ids.shape[1] < 2:
        return int(same.sum()), same.numel(), ()
    ours, theirs = ([_logprobs(logits, ids) for logits in side] for side in ends)
    apart = (ours[0] - theirs[0]).abs()
    floor = ((ours[1] - ours[2]).square() + (theirs[1] - theirs[2]).square()).sqrt()
    spans, start = [], 1
    while start < ids.shape[1]:
        end = min(2 * start, ids.shape[1]) - 1
        part = slice(start - 1, end)
        spans.append(Positions(start, end, float(apart[:, part].mean()), float(floor[:, part].mean())))
        start *= 2
    return int(same.sum()), same.numel(), tuple(spans)


def _logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """(b, t − 1): of each token but the first, after those before it."""
    logs = logits[:, :-1].double().log_softmax(-1)
    return logs.gather(-1, ids[:, 1:, None].to(logs.device))[..., 0].cpu()
