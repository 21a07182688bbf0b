"""How well does it work: legal variants must not alarm, planted bugs must be found where they are, and named.

    python -m tests.bench.localization          the table of the README
    python -m tests.bench.localization --all    every variant and bug in every way, torch.compile among them

Every run builds a candidate from a copy of impl, records it, and compares it as `parity diff` does. The bugs
are planted in the candidate, or in its checkpoint, by tests.planted, which shares no code with parity or with
transformers; tests.planted.causes says what each should be called and which number should be read off.
Prints the tables, and every run that was not as it should be.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from tests.bench.localization_run import NAMINGS, Named, Outcome, Run, run_one
from tests.bench.localization_runs import FEW, TINY, bug_runs, clean_runs, combined_runs, material
from tests.planted import CAUSES

WORKERS = 2


def show_clean(outcomes: Sequence[Outcome]) -> None:
    """Runs, sites, alarms and accusations of the legal variants, and the largest ratio of each."""
    print("\n| legal variant | runs | sites | wrong | imprecise | findings | largest ratio |")
    print("|---|---|---|---|---|---|---|")
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.run.plants[0].variant, []).append(outcome)
    for name, group in (*groups.items(), ("**all**", outcomes)):
        counts = [
            sum(each)
            for each in zip(*((o.sites, len(o.wrong), len(o.imprecise), o.findings) for o in group), strict=True)
        ]
        numbers = " | ".join(map(str, counts))
        print(f"| {name} | {len(group)} | {numbers} | {max(o.largest for o in group):.2f} |")


def show_bugs(title: str, outcomes: Sequence[Outcome]) -> None:
    """For each planted bug: localized exactly, named how, how many of its numbers are right, and what was said."""
    print(f"\n| {title} | runs | exact | {' | '.join(NAMINGS)} | constants | said |")
    print("|---" * (len(NAMINGS) + 5) + "|")
    groups: dict[str, list[tuple[Outcome, Named | None]]] = {}
    for outcome in outcomes:
        for plant, named in zip(outcome.run.plants, outcome.named or (None,) * len(outcome.run.plants), strict=True):
            groups.setdefault(plant.variant, []).append((outcome, named))
    for name, group in groups.items():
        named = [n for _, n in group if n is not None]
        how = Counter(n.naming for n in named)
        right, constants = sum(n.right for n in named), sum(n.constants for n in named)
        cells = [len(group), sum(o.is_exact for o, _ in group), *(how[naming] or "" for naming in NAMINGS)]
        said = "; ".join(dict.fromkeys(n.causes for n in named))
        numbers = f"{right} of {constants}" if constants else ""
        print(f"| {name} | {' | '.join(map(str, cells))} | {numbers} | {said} |")


def summary(outcomes: Sequence[Outcome]) -> str:
    """The shares over all runs with planted bugs."""
    named = [n for o in outcomes for n in o.named]
    exact = sum(o.is_exact for o in outcomes)
    text = f"{len(outcomes)} runs, {_share(exact, len(outcomes))} localized exactly"
    if drowned := sum(n.naming == "invisible" for n in named):
        text += f", {drowned} with a bug that drowns, as the report says"
    if known := [n for n in named if CAUSES[n.variant].faults]:
        first, tied = (sum(n.naming == naming for n in known) for naming in NAMINGS[:2])
        text += f"; of {len(known)} bugs of the catalogue {_share(first, len(known))} named first"
        text += f", {_share(first + tied, len(known))} first or tied"
    if constants := sum(n.constants for n in named):
        right = sum(n.right for n in named)
        text += f"; {_share(right, constants)} of constants within 2 standard errors"
    if outside := [n for n in named if not CAUSES[n.variant].faults]:
        unknown = _share(sum(n.naming == "unknown" for n in outside), len(outside))
        text += f"; of {len(outside)} bugs outside the catalogue {unknown} unknown, as it should be"
    return text


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole else "0"


def _explain(outcomes: Iterable[Outcome]) -> None:
    """Every run that was not as it should be."""
    for o in outcomes:
        missed = sorted(set(o.guilty) - set(o.wrong + o.imprecise))
        false = sorted(set(o.wrong + o.imprecise) - set(o.guilty))
        if o.error:
            print(f"  {o.run}: {o.error}")
        elif missed or false:
            print(f"  {o.run}: {o.verdict}, missed {missed[:4]} ({len(missed)}), false {false[:4]} ({len(false)})")
        for n in o.named:
            right = ("first", "tied") if CAUSES[n.variant].faults else ("unknown",)
            if n.naming not in right or n.right < n.constants:
                print(f"  {o.run}: {n.variant} is {n.naming}, {n.right} of {n.constants} constants: {n.causes}")


def _compared(runs: Sequence[Run], workers: int) -> list[Outcome]:
    """The outcomes in the order of the runs; says how far it is."""
    start = time.perf_counter()
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for outcome in pool.map(run_one, runs, chunksize=2):
            outcomes.append(outcome)
            if len(outcomes) % 25 == 0 or len(outcomes) == len(runs):
                seconds = time.perf_counter() - start
                print(f"{len(outcomes)} of {len(runs)} runs, {seconds:.0f} s", file=sys.stderr, flush=True)
    return outcomes


def _chosen(given: argparse.Namespace, folder: Path) -> tuple[list[Run], list[Run], list[Run]]:
    """Clean runs, runs with one bug, runs with several."""
    made = material(folder)
    clean = [] if given.bugs else list(clean_runs(made, everything=given.all))
    bugs = list(bug_runs(made, everything=given.all, half="float16" in given.dtypes))
    combined = [] if given.few else list(combined_runs(made))
    if given.few:
        bugs = [r for r in bugs if r.plants[0].variant in FEW]

    def wanted(run: Run) -> bool:
        there = any(given.only in p.variant for p in run.plants)
        return there and run.dtype in (given.dtypes or run.dtype) and not (given.quick and run.checkpoint == TINY)

    groups = ([replace(r, device=given.device) for r in runs if wanted(r)] for runs in (clean, bugs, combined))
    return tuple(groups)  # type: ignore[return-value]


def main() -> None:
    """Make the runs and print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--all", action="store_true", help="every variant and bug in every way; takes far longer")
    options.add_argument("--quick", action="store_true", help="the random checkpoints alone")
    options.add_argument("--only", default="", help="variants whose name holds this")
    options.add_argument("--bugs", action="store_true", help="no legal variants")
    options.add_argument("--few", action="store_true", help="a dozen bugs in place of all")
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtypes", nargs="*", default=[], help="only these")
    options.add_argument("--workers", type=int, default=WORKERS)
    given = options.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        clean, bugs, combined = _chosen(given, Path(folder))
        outcomes = _compared([*clean, *bugs, *combined], given.workers)
    done_clean, done_bugs = outcomes[: len(clean)], outcomes[len(clean) : len(clean) + len(bugs)]
    done_combined = outcomes[len(clean) + len(bugs) :]
    if done_clean:
        show_clean(done_clean)
    known = [o for o in done_bugs if CAUSES[o.run.plants[0].variant].faults]
    outside = [o for o in done_bugs if o not in known]
    for title, group in (
        ("planted bug", known),
        ("bug outside the catalogue", outside),
        ("several bugs at once", done_combined),
    ):
        if group:
            show_bugs(title, group)
            print(f"\n{title}: {summary(group)}")
    print("\nNot as it should be:")
    _explain(outcomes)
    print(f"\n{time.perf_counter() - start:.0f} s on {given.workers} processes, {given.device}")


if __name__ == "__main__":
    main()
