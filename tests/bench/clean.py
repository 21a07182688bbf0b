"""No clean port may be accused: random shapes, prompts, dtypes and legal variants, whole and sparse dumps.

    python -m tests.bench.clean --runs 5000 --jobs 8

Every run draws a small checkpoint of two layers, a prompt (short, long, of one repeated token, with a massive token),
a legal variant of tests.planted and the sites that its dump holds, and compares it as `parity diff` does. Each alarm
is one too many. Prints the alarms with their seeds (`--seed N --runs 1` repeats one), and a table.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from parity.candidates.base import open_candidate
from parity.compare.pipeline import diff
from parity.dump import ArchiveWriter, Dump
from parity.faults import CATALOGUE
from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.results import Comparison
from parity.run_spec import RunSpec
from tests import checkpoints
from tests.planted import CLEAN, build

DTYPES = ("float32", "float32", "bfloat16", "float16")
VARIANTS = tuple(v for v in CLEAN if not v.compile and v.threads is None)
KEPT = ("whole", "whole", "some", "few", "layers", "logits")
# A constant that is wrong by less than rounding is looked for in any run; the other faults only after an alarm.
FAULTS = tuple(fault for fault in CATALOGUE if fault.number)


@dataclass(frozen=True)
class Drawn:
    """One clean run, all of it drawn from its seed. `massive` is a factor on the embedding of the first token."""

    seed: int
    config: dict[str, Any]
    dtype: str
    tokens: tuple[int, ...]
    massive: float
    variant: str
    kept: str

    def __str__(self) -> str:
        shape = f"hidden {self.config['hidden_size']}, {len(self.tokens)} tokens ({len(set(self.tokens))} distinct)"
        massive = f", massive {self.massive:g}" if self.massive != 1 else ""
        return f"seed {self.seed}: {self.variant} {self.dtype}, {self.kept}, {shape}{massive}"


@dataclass(frozen=True)
class Outcome:
    """What a run said: alarms by site, the verdict if it is no match, the largest ratio and the largest of a row."""

    drawn: Drawn
    verdict: str = ""
    headline: str = ""
    wrong: tuple[str, ...] = ()
    imprecise: tuple[str, ...] = ()
    sites: int = 0
    ratio: float = 0.0
    row: float = 0.0
    total: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether nothing was said against a clean port."""
        return not self.wrong and not self.imprecise and self.verdict == "match"


def draw(seed: int) -> Drawn:
    """The run of a seed."""
    luck = random.Random(seed)
    wide = luck.random() < 0.05
    heads = luck.choice((1, 2, 2, 4))
    config = {
        "hidden_size": 1024 if wide else luck.choice((32, 48, 64, 80, 128, 200, 256)),
        "intermediate_size": luck.choice((48, 64, 112, 192)),
        "num_attention_heads": heads * luck.choice((1, 2, 3)),
        "num_key_value_heads": heads,
        "head_dim": luck.choice((8, 16, 20, 32, 64, 128)),
        "vocab_size": luck.choice((97, 211, 301)),
        "rms_norm_eps": luck.choice((1e-5, 1e-6)),
        "tied": luck.random() < 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": luck.choice((1e4, 12345.0, 5e5, 1e6))},
    }
    count = luck.choice((1, 2, 3, 5, 8, 13, 24, 48)) if luck.random() < 0.85 else luck.randint(100, 200)
    repeated = luck.random() < 0.15
    tokens = [luck.randrange(97)] * count if repeated else [luck.randrange(97) for _ in range(count)]
    dtype = luck.choice(DTYPES)
    variant = luck.choice([v for v in VARIANTS if v.dtypes != ("bfloat16",) or dtype == "bfloat16"])
    massive = luck.choice((100.0, 1000.0)) if luck.random() < 0.15 else 1.0
    return Drawn(seed, config, dtype, tuple(tokens), massive, variant.id, luck.choice(KEPT))


def run_one(seed: int) -> Outcome:
    """Make one comparison; a run that fails is an outcome too."""
    torch.set_num_threads(1)
    disable_progress_bar()
    drawn = draw(seed)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _summary(drawn, _compared(drawn, Path(folder)))
    except Exception as error:
        return Outcome(drawn, "error", f"{type(error).__name__}: {error}")


def _compared(drawn: Drawn, folder: Path) -> Comparison:
    variant = next(v for v in VARIANTS if v.id == drawn.variant)
    path = checkpoints.qwen3(folder / "model", layers=2, dtype=drawn.dtype, **drawn.config)
    if drawn.massive != 1:
        _enlarge(path / "model.safetensors", drawn.tokens[0], drawn.massive)
    rows = (drawn.tokens,) * variant.batch
    run = RunSpec(find(str(path)), rows, drawn.dtype, RunOptions(power=False, allow_unexamined=True), faults=FAULTS)
    reference = Reference(run.model())
    sites = reference.working.sites
    dims = {site.name: site.dims for site in sites}
    full = open_candidate(build(variant, path, drawn.dtype)).record(run, sites, folder / "full.h5")
    with full, ArchiveWriter(folder / "kept.h5", full.info) as writer:
        for site in _kept(drawn, full, list(dims)):
            array = full.read(site)
            writer.add(site, array.astype(variant.dump_dtype) if variant.dump_dtype else array, dims[site])
    return diff(run, open_candidate(folder / "kept.h5"), reference=reference)


def _enlarge(path: Path, token: int, factor: float) -> None:
    """Make one token's embedding so large that its activations are massive."""
    weights = load_file(path)
    weights["model.embed_tokens.weight"][token] *= factor
    save_file(weights, path, metadata={"format": "pt"})


def _kept(drawn: Drawn, full: Dump, sites: Sequence[str]) -> list[str]:
    """The sites that a dump holds, the logits always among them."""
    have = [site for site in sites if site in full.entries]
    luck = random.Random(drawn.seed)
    share = {"whole": 1.0, "some": 0.5, "few": 0.15}.get(drawn.kept, 0.0)
    layers = drawn.kept == "layers"
    return [s for s in have if s == have[-1] or luck.random() < share or (layers and s.rsplit(".", 1)[-1].isdigit())]


def _summary(drawn: Drawn, found: Comparison) -> Outcome:
    measured = [s for s in found.sites if s.ratio is not None]
    alarm = {v: tuple(f"{s.site} {s.ratio:.3g} {s.reason}" for s in measured if s.verdict == v) for v in
             ("wrong", "imprecise", "nonfinite")}  # fmt: skip
    finite = [s for s in measured if s.row_max is not None and s.ratio is not None and s.verdict != "exact"]
    return Outcome(
        drawn,
        found.verdict,
        found.headline,
        alarm["wrong"] + alarm["nonfinite"],
        alarm["imprecise"],
        len(measured),
        max((s.ratio or 0.0 for s in finite), default=0.0),
        max((s.row_max or 0.0 for s in finite), default=0.0),
        max((s.total_ratio or 0.0 for s in measured[-1:]), default=0.0),
    )


def _table(outcomes: Sequence[Outcome]) -> None:
    print("\n| legal variant | runs | sites | wrong | imprecise | inconclusive | ratio | row | logits |")
    print("|---" * 9 + "|")
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.drawn.variant, []).append(outcome)
    for name, group in (*sorted(groups.items()), ("**all**", outcomes)):
        inconclusive = sum(o.verdict != "match" and not o.wrong and not o.imprecise for o in group)
        counts = [len(group), sum(o.sites for o in group), sum(len(o.wrong) for o in group)]
        counts += [sum(len(o.imprecise) for o in group), inconclusive]
        largest = [max(values) for values in zip(*((o.ratio, o.row, o.total) for o in group), strict=True)]
        print(f"| {name} | {' | '.join(map(str, counts))} | {' | '.join(f'{value:.2f}' for value in largest)} |")


def outcomes_of(seeds: Sequence[int], jobs: int) -> Iterable[Outcome]:
    """The outcomes in the order of the seeds, of as many processes."""
    if jobs == 1:
        yield from map(run_one, seeds)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_one, seeds, chunksize=8)


def main() -> None:
    """Make the runs; exit code 1 if any of them raised an alarm."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=200)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--seed", type=int, default=0, help="the first seed")
    given = options.parse_args()
    start, outcomes = time.perf_counter(), list[Outcome]()
    for outcome in outcomes_of(range(given.seed, given.seed + given.runs), given.jobs):
        outcomes.append(outcome)
        if not outcome.is_clean:
            print(f"{outcome.drawn}: {outcome.headline}", *outcome.wrong[:3], *outcome.imprecise[:3], sep="\n    ")
        if len(outcomes) % 50 == 0:
            print(f"{len(outcomes)} of {given.runs}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    _table(outcomes)
    alarmed = sum(not o.is_clean for o in outcomes)
    print(f"\n{alarmed} of {len(outcomes)} clean runs raised an alarm; {time.perf_counter() - start:.0f} s")
    sys.exit(alarmed > 0)


if __name__ == "__main__":
    main()
