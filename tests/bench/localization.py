"""How well does it work: legal variants must not alarm, planted bugs must be found where they are.

    python -m tests.bench.localization [--quick]

Every run builds a candidate from a copy of impl, records it, and compares it as `parity diff` does. The bugs
are planted in the candidate by tests.planted, which shares no code with parity or with transformers.
Prints the two tables of the README, and every run that was not as it should be.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from impl.qwen3 import Config
from parity.faults import CATALOGUE
from parity.reference.checkpoint import find
from tests.planted import BUGS, CLEAN, build, threads

TINY = "tiny-qwen3"
DTYPES = ("float32", "bfloat16", "float16")
WORKERS = 2
FEW = (
    "rope-interleaved",
    "rope-theta-default",
    "norm-one-plus-w",
    "qk-norm-skipped-q",
    "attention-scale-hidden",
    "mask-none",
    "mask-window-half",
    "gqa-tile",
    "act-gelu",
    "residual-dropped-attention",
    "weight-1.01",
    "embed-row-plus-1",
)
_VARIANTS = {v.id: v for v in (*CLEAN, *BUGS)}


@dataclass(frozen=True)
class Run:
    """One comparison to make."""

    checkpoint: str
    dtype: str
    tokens: tuple[int, ...]
    variants: tuple[str, ...]
    layers: tuple[tuple[int, ...] | None, ...]  # for each variant; None: everywhere
    device: str = "cpu"

    @property
    def label(self) -> str:
        """The run in words."""
        where = "+".join(
            f"{v}@{','.join(map(str, layers))}" if layers else v
            for v, layers in zip(self.variants, self.layers, strict=True)
        )
        return f"{where} {self.dtype} {Path(self.checkpoint).name} T={len(self.tokens)}"


@dataclass(frozen=True)
class Outcome:
    """What came out: sites that were flagged and that should have been, the verdict and the largest ratio."""

    run: Run
    verdict: str
    wrong: tuple[str, ...]
    imprecise: tuple[str, ...]
    guilty: tuple[str, ...]
    sites: int
    largest: float
    error: str = ""
    causes: tuple[tuple[str, str, tuple[str, ...], str], ...] = ()  # family, fault, rivals, constants


def run_one(run: Run) -> Outcome:
    """Make one comparison; a run that fails is an outcome too."""
    import torch

    torch.set_num_threads(1)
    try:
        return _compare(run)
    except Exception as error:
        return Outcome(run, "error", (), (), (), 0, 0.0, f"{type(error).__name__}: {error}")


_references: dict[tuple[str, str], Any] = {}


def _compare(run: Run) -> Outcome:
    from parity.compare import reference_for
    from parity.question import Question

    checkpoint = find(run.checkpoint)
    variants = [_VARIANTS[v] for v in run.variants]
    # A legal variant needs no diagnosis, but must not be accused of a wrong constant.
    faults = CATALOGUE if any(v.guilty for v in variants) else tuple(f for f in CATALOGUE if f.number)
    question = Question(
        checkpoint, (run.tokens,) * max(v.batch for v in variants), run.dtype, run.device, faults=faults
    )
    key = (run.checkpoint, run.dtype)
    reference = _references.setdefault(key, None) or reference_for(question)
    _references[key] = reference
    count = len(reference.working.layers)
    layers = [chosen if chosen is not None else tuple(range(count)) for chosen in run.layers]
    module = build(variants[0], checkpoint.path, run.dtype, layers[0])
    for variant, chosen in zip(variants[1:], layers[1:], strict=True):
        variant.apply(module, chosen)
    module.to(run.device)
    with threads(variants[0].threads):
        result = _diff(question, module, variants[0].dump_dtype, reference)
    flagged = {v: tuple(s.site for s in result.sites if s.verdict == v) for v in ("wrong", "imprecise", "nonfinite")}
    guilty = {site for v, chosen in zip(variants, layers, strict=True) for site in v.guilty_sites(chosen)}
    ratios = [s.ratio for s in result.sites if s.ratio is not None]
    return Outcome(
        run,
        result.verdict,
        flagged["wrong"] + flagged["nonfinite"],
        flagged["imprecise"],
        # What comes after a NaN cannot be judged, and is said to be unmeasured.
        tuple(s.site for s in result.sites if s.site in guilty and s.verdict != "unmeasured"),
        len(ratios),
        max(ratios),
        causes=tuple(_cause(f) for f in result.findings),
    )


def _cause(finding: Any) -> tuple[str, str, tuple[str, ...], str]:
    fault = finding.fault
    if fault is None:
        return finding.family, "unknown", (), ""
    constants = ", ".join(f"{n} = {r.value:.4g} ± {r.stderr:.1g} (not {r.expected:g})" for n, r in fault.reads.items())
    return finding.family, fault.id, fault.rivals, constants


def _diff(question: Any, module: Any, dump_dtype: str, reference: Any) -> Any:
    from parity.candidates import torch_module
    from parity.compare import diff_dump, diff_module
    from parity.dump import ArchiveWriter, open_dump

    if not dump_dtype:
        return diff_module(question, module, "planted", reference)
    with tempfile.TemporaryDirectory() as folder:
        narrow, wide = Path(folder) / "narrow.h5", Path(folder) / "wide.h5"
        torch_module.record(
            module, question.ids.to(question.device), reference.working.sites, narrow, question.info("planted")
        )
        dims = {site.name: site.dims for site in reference.working.sites}
        with open_dump(narrow) as dump, ArchiveWriter(wide, dump.info) as writer:
            for site in dump.entries:
                writer.add(site, dump.read(site).astype(dump_dtype), dims[site])
        with open_dump(wide) as dump:
            return diff_dump(question, dump, reference)


# -- which runs ----------------------------------------------------------------------------------------------


def clean_runs(checkpoints: dict[str, Sequence[tuple[int, ...]]]) -> Iterator[Run]:
    """Every legal variant on every checkpoint, prompt and dtype."""
    for checkpoint, prompts in checkpoints.items():
        for variant in CLEAN:
            for dtype in DTYPES:
                # What makes sense in both of the others does in float16.
                if dtype in variant.dtypes or (dtype == "float16" and set(variant.dtypes) == {"float32", "bfloat16"}):
                    # Compiling takes most of a minute, whatever the prompt.
                    for tokens in prompts[2:3] if variant.compile else prompts:
                        yield Run(checkpoint, dtype, tokens, (variant.id,), (None,))


def bug_runs(checkpoints: dict[str, Sequence[tuple[int, ...]]], *, half: bool = False) -> Iterator[Run]:
    """Every planted bug on its own, in all layers and in one, on the longest prompt of each checkpoint.

    `half` adds float16 where bfloat16 shows the bug.
    """
    for checkpoint, prompts in checkpoints.items():
        for variant in BUGS:
            if not variant.fits(Config.read(find(checkpoint).path / "config.json")):
                continue
            places: list[tuple[int, ...] | None] = [None] if variant.everywhere_only else [None, (2,)]
            for layers in places:
                for dtype in (*variant.dtypes, *["float16"] * (half and "bfloat16" in variant.dtypes)):
                    yield Run(checkpoint, dtype, prompts[-1], (variant.id,), (layers,))


def combined_runs(checkpoint: str, tokens: tuple[int, ...]) -> Iterator[Run]:
    """Two and three independent bugs at once, in different layers."""
    groups = (
        (("rope-interleaved", (0,)), ("act-gelu", (2,))),
        (("gqa-tile", (1,)), ("residual-dropped-mlp", (3,))),
        (("qk-norm-skipped-q", (1,)), ("act-relu", (0,)), ("mask-none", (3,))),
        (("rope-theta-default", (0,)), ("attention-sink", (2,)), ("norm-one-plus-w", (3,))),
    )
    for group in groups:
        for dtype in ("float32", "bfloat16"):
            ids, layers = zip(*group, strict=True)
            yield Run(checkpoint, dtype, tokens, ids, layers)


# -- the tables ----------------------------------------------------------------------------------------------


def show_clean(outcomes: Sequence[Outcome]) -> None:
    """Runs, sites and alarms of the legal variants, and the largest ratio of each."""
    print("\n| legal variant | runs | sites | wrong | imprecise | largest ratio |\n|---|---|---|---|---|---|")
    for variant, group in _by_variant(outcomes):
        wrong, rough = sum(len(o.wrong) for o in group), sum(len(o.imprecise) for o in group)
        worst = max(o.largest for o in group)
        print(f"| {variant} | {len(group)} | {sum(o.sites for o in group)} | {wrong} | {rough} | {worst:.2f} |")
    total = sum(o.sites for o in outcomes)
    alarms = sum(len(o.wrong) for o in outcomes)
    largest = max(o.largest for o in outcomes)
    print(f"\n{len(outcomes)} clean runs, {total} sites, {alarms} wrong, largest ratio {largest:.2f}")


def show_bugs(outcomes: Sequence[Outcome]) -> None:
    """How many runs of each planted bug were localized exactly."""
    print("\n| planted bug | runs | exact | verdicts | missed | false | named |\n|---|---|---|---|---|---|---|")
    for variant, group in _by_variant(outcomes):
        exact = sum(is_exact(o) for o in group)
        missed = sum(len(set(o.guilty) - set(o.wrong + o.imprecise)) for o in group)
        false = sum(len(set(o.wrong + o.imprecise) - set(o.guilty)) for o in group)
        kinds = "/".join(sorted({o.verdict for o in group}))
        named = "; ".join(dict.fromkeys(_names(o) for o in group))
        print(f"| {variant} | {len(group)} | {exact} | {kinds} | {missed} | {false} | {named} |")
    exact = sum(is_exact(o) for o in outcomes)
    print(f"\n{len(outcomes)} runs with planted bugs, {exact} localized exactly ({exact / len(outcomes):.1%})")


def _names(outcome: Outcome) -> str:
    return " & ".join(
        f"{fault}{' = ' + ' = '.join(rivals) if rivals else ''}{' [' + constants + ']' if constants else ''}"
        for _, fault, rivals, constants in outcome.causes
    )


def is_exact(outcome: Outcome) -> bool:
    """Whether the flagged sites are exactly the guilty ones."""
    return not outcome.error and set(outcome.wrong + outcome.imprecise) == set(outcome.guilty)


def _by_variant(outcomes: Iterable[Outcome]) -> list[tuple[str, list[Outcome]]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault("+".join(outcome.run.variants), []).append(outcome)
    return list(groups.items())


def _explain(outcomes: Iterable[Outcome]) -> None:
    for o in outcomes:
        missed = sorted(set(o.guilty) - set(o.wrong + o.imprecise))
        false = sorted(set(o.wrong + o.imprecise) - set(o.guilty))
        print(f"  {o.run.label}: {o.error or f'missed {missed[:4]} ({len(missed)}), false {false[:4]} ({len(false)})'}")


def main() -> None:
    """Run both suites and print them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="the random checkpoint alone")
    options.add_argument("--only", default="", help="variants whose name holds this")
    options.add_argument("--bugs", action="store_true", help="no legal variants")
    options.add_argument("--few", action="store_true", help="a dozen bugs in place of all")
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtypes", nargs="*", default=[], help="only these")
    options.add_argument("--workers", type=int, default=WORKERS)
    given = options.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = _checkpoints(Path(folder), quick=given.quick)
        random = next(iter(checkpoints))
        clean = [] if given.bugs else [r for r in clean_runs(checkpoints) if given.only in r.variants[0]]
        bugs = [
            r
            for r in (
                *bug_runs({random: checkpoints[random]}, half="float16" in given.dtypes),
                *_tiny_bugs(checkpoints),
            )
            if given.only in r.variants[0]
        ]
        combined = [] if given.only else list(combined_runs(random, checkpoints[random][-1]))
        runs = [replace(r, device=given.device) for r in (*clean, *bugs, *combined)]
        if given.few:
            bugs, combined = [r for r in bugs if r.variants[0] in FEW], []
            runs = [replace(r, device=given.device) for r in (*clean, *bugs)]
        if given.dtypes:
            runs = [r for r in runs if r.dtype in given.dtypes]
            clean = [r for r in clean if r.dtype in given.dtypes]
        with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
            outcomes = []
            for outcome in pool.map(run_one, runs, chunksize=4):
                outcomes.append(outcome)
                if len(outcomes) % 50 == 0:
                    print(f"{len(outcomes)} of {len(runs)} runs", file=sys.stderr, flush=True)
    done_clean, done_bugs = outcomes[: len(clean)], outcomes[len(clean) :]
    if done_clean:
        show_clean(done_clean)
        _explain(o for o in done_clean if o.error or o.wrong or o.imprecise)
    if done_bugs:
        show_bugs(done_bugs)
        _explain(o for o in done_bugs if not is_exact(o))
    print(f"\n{time.perf_counter() - start:.0f} s on {given.workers} processes, {given.device}")


def _tiny_bugs(checkpoints: dict[str, Sequence[tuple[int, ...]]]) -> list[Run]:
    """A few bugs on the trained checkpoint, in one of its 28 layers."""
    wanted = ("rope-interleaved", "act-gelu", "gqa-tile", "norm-eps-1e-3", "mask-window-half", "qk-norm-skipped")
    if TINY not in checkpoints:
        return []
    runs = bug_runs({TINY: checkpoints[TINY]})
    return [r for r in runs if r.layers[0] is not None and r.variants[0].startswith(wanted)]


def _checkpoints(folder: Path, *, quick: bool) -> dict[str, Sequence[tuple[int, ...]]]:
    """Checkpoints by path, each with five prompts, the longest last."""
    from tests import checkpoints

    random = checkpoints.qwen3(folder / "random", layers=4)
    found: dict[str, Sequence[tuple[int, ...]]] = {str(random): [_tokens(n, 301) for n in (1, 7, 20, 33, 61)]}
    if not quick:
        found[TINY] = [_tokens(n, 1000) for n in (1, 5, 20, 33, 64)]
    return found


def _tokens(count: int, vocabulary: int) -> tuple[int, ...]:
    return tuple((97 * i * i + 31 * i + 7 * count) % vocabulary for i in range(count))


if __name__ == "__main__":
    main()
