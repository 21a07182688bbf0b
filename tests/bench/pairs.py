"""Two engines against each other: no alarm on legal pairs, and what fixed alarms say of the same pairs.

    python -m tests.bench.pairs --jobs 16

Every pair draws a tiny checkpoint of some architecture, a rollout sampled from it, and two legal engines: eager and
fused attention, other dtypes, threads or batches, a variant of tests.planted. Then 20 ports with a planted bug stand
against transformers. Each pair is judged as `parity diff A B` does, and by the alarms that training code has: mean
exp|Δ log p| of the sampled tokens above 1.05, and KL of the whole distributions above 0.015. Prints both tables.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from parity.candidates.base import Candidate, open_candidate
from parity.dump import ArchiveWriter, open_dump
from parity.engine_report import Contrast
from parity.engines.contrast import contrast
from parity.observer import Observer
from parity.options import RunOptions
from parity.record.arrays import to_torch
from parity.reference.checkpoint import find
from parity.run_spec import RunSpec
from tests import checkpoints
from tests.planted import BUGS, CLEAN, Variant, build, threads

MEAN_EXP, KL = 1.05, 0.015
ARCHITECTURES = ("qwen3", "qwen3", "llama", "qwen2", "gemma3_text", "mistral", "phi3", "olmo2", "gpt_neox", "qwen3_moe")
LOW = ("bfloat16", "float16")
PORTS = tuple(
    v for v in CLEAN if not v.compile and v.threads is None and v.batch == 1 and not v.engine_dtype and not v.dump_dtype
)
PROMPT, LENGTHS = 4, (12, 24, 48, 96)


@dataclass(frozen=True)
class Engine:
    """One engine: transformers with an attention, or a variant of the port; its dtype; threads and rows beside."""

    attention: str = "eager"
    dtype: str = "bfloat16"
    variant: Variant | None = None
    threads: int = 1
    rows: int = 1

    def __str__(self) -> str:
        name = self.variant.id if self.variant else self.attention
        more = [f"threads {self.threads}"] * (self.threads > 1) + [f"batch {self.rows}"] * (self.rows > 1)
        return " ".join((name, self.dtype, *more))

    def opened(self, path: Path) -> Candidate:
        """The engine with the weights of a checkpoint."""
        if self.variant is not None:
            return open_candidate(build(self.variant, path, self.dtype))
        return open_candidate(f"hf:?attn={self.attention}&dtype={self.dtype}")


@dataclass(frozen=True)
class Pair:
    """Two engines on one checkpoint; `kind` is what they differ in, `seed` draws the checkpoint's sizes and tokens."""

    kind: str
    seed: int
    architecture: str
    engines: tuple[Engine, Engine]
    length: int

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.architecture}, {self.engines[0]} and {self.engines[1]}, {self.length} tokens"


@dataclass(frozen=True)
class Outcome:
    """What parity says of a pair, and the two figures; `found` where the second engine's findings are at its bug."""

    pair: Pair
    verdict: str
    said: str
    mean_exp: float
    kl: float
    found: bool


def clean_pair(seed: int) -> Pair:
    """The legal pair of a seed."""
    luck = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    architecture = "qwen3" if kind == "port" else luck.choice(ARCHITECTURES[: -1 if kind == "batch" else None])
    # The port's variants are made for two dtypes.
    dtype = luck.choice(("float32", "bfloat16") if kind == "port" else ("float32", *LOW))
    attention = luck.choice(("eager", "sdpa"))
    one = Engine(attention, dtype)
    others: dict[str, Callable[[], Engine]] = {
        "attention": lambda: Engine("sdpa" if attention == "eager" else "eager", dtype),
        "dtype": lambda: Engine(attention, luck.choice([d for d in ("float32", *LOW) if d != dtype])),
        "threads": lambda: Engine(attention, dtype, threads=2),
        "batch": lambda: Engine(attention, dtype, rows=luck.choice((2, 3, 5))),
        "port": lambda: Engine(dtype=dtype, variant=luck.choice([v for v in PORTS if dtype in v.dtypes])),
    }
    return Pair(kind, seed, architecture, (one, others[kind]()), luck.choice(LENGTHS))


KINDS = ("attention", "dtype", "threads", "batch", "port")


def bug_pairs(count: int) -> list[Pair]:
    """Pairs of transformers and a port with a planted bug, of so many kinds."""
    bugs = [b for b in BUGS if b.kind == "bug" and not b.needs and "bfloat16" in b.dtypes and b.min_tokens <= 64]
    chosen = [bugs[i * len(bugs) // count] for i in range(count)]
    return [Pair(b.id, i, "qwen3", (Engine(), Engine(variant=b)), 96) for i, b in enumerate(chosen)]


def run_one(pair: Pair) -> Outcome:
    """Record both engines and judge them; a run that fails is an outcome too."""
    torch.set_num_threads(1)
    disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _outcome(pair, Path(folder))
    except Exception as error:
        return Outcome(pair, "error", f"{type(error).__name__}: {error}", float("nan"), float("nan"), False)


def _outcome(pair: Pair, folder: Path) -> Outcome:
    write = checkpoints.qwen3 if pair.architecture == "qwen3" else partial(checkpoints.other, pair.architecture)
    path = write(folder / "model", dtype="float32" if pair.seed % 3 else "bfloat16")
    tokens = _sampled(path, pair)
    dumps = (folder / "first.h5", folder / "second.h5")
    for engine, dump in zip(pair.engines, dumps, strict=True):
        _record(engine, path, tokens, dump, pair.seed)
    found = contrast(dumps, None, RunOptions(model=str(path), power=False), "", Observer())
    first, second = (_logprobs(dump) for dump in dumps)
    ids = torch.tensor(tokens[1:])[:, None]
    delta = (first - second)[:-1].gather(-1, ids)[PROMPT - 1 :].abs()
    kl = (first.exp() * (first - second)).sum(-1)[PROMPT - 1 : -1].mean()
    said = found.second.headline if found.first.verdict == "match" else found.first.headline
    return Outcome(pair, found.verdict, said, float(delta.exp().mean()), float(kl), _is_found(pair, found))


def _is_found(pair: Pair, found: Contrast) -> bool:
    variant = pair.engines[1].variant
    sites = {site for finding in found.second.findings for site in finding.sites}
    guilty = variant.guilty_sites(range(4)) if variant else set()
    return bool(sites & guilty) and found.first.verdict == "match"


@torch.no_grad()
def _sampled(path: Path, pair: Pair) -> tuple[int, ...]:
    """A rollout: tokens that the model itself says after a few random ones."""
    torch.manual_seed(pair.seed)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = torch.randint(0, 200, (1, PROMPT))
    asked: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": pair.length - PROMPT}
    row = model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)[0]
    return tuple(map(int, row))


def _record(engine: Engine, path: Path, tokens: Sequence[int], dump: Path, seed: int) -> None:
    """Record what one engine computes for the tokens; other rows may stand beside them in its batch."""
    luck = random.Random(seed)
    others = [tuple(luck.randrange(200) for _ in tokens) for _ in range(engine.rows - 1)]
    run = RunSpec(find(str(path)), (tuple(tokens), *others), engine.dtype, RunOptions(power=False))
    candidate, sites = engine.opened(path), run.model().sites
    dims = {site.name: site.dims for site in sites}  # sizes may not tell tokens from heads
    whole = dump.with_suffix(".whole.h5")
    with threads(engine.threads), candidate.record(run, sites, whole) as recorded:
        alone = RunSpec(run.checkpoint, (tuple(tokens),), engine.dtype, run.options)
        with ArchiveWriter(dump, alone.info(str(engine))) as writer:
            for site, entry in recorded.entries.items():
                writer.add(site, recorded.read(site)[: None if engine.rows == 1 else 1], entry.dims or dims[site])
    candidate.close()
    whole.unlink()


def _logprobs(dump: Path) -> Tensor:
    """(t, vocab) of a recorded run, from its logits."""
    with open_dump(dump) as opened:
        *_, last = opened.entries
        logits = to_torch(opened.read(last))
    return logits.double().reshape(-1, logits.shape[-1]).log_softmax(-1)


def outcomes_of(pairs: Sequence[Pair], jobs: int) -> Iterator[Outcome]:
    """The outcomes in the order of the pairs, of as many processes."""
    if jobs == 1:
        yield from map(run_one, pairs)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_one, pairs, chunksize=2)


def _clean_table(outcomes: Sequence[Outcome]) -> None:
    print("\n| legal pairs differ in | pairs | parity: alarms | undecided | mean exp > 1.05 | KL > 0.015 | largest |")
    print("|---" * 7 + "|")
    for kind in (*KINDS, "**all**"):
        group = [o for o in outcomes if o.pair.kind == kind or kind == "**all**"]
        alarms = sum(o.verdict == "diverged" for o in group)
        undecided = sum(o.verdict not in ("match", "diverged") for o in group)
        fixed = [sum(o.mean_exp > MEAN_EXP for o in group), sum(o.kl > KL for o in group)]
        largest = f"{max((o.mean_exp for o in group), default=0):.3f}, {max((o.kl for o in group), default=0):.3g}"
        print(f"| {kind} | {len(group)} | {alarms} | {undecided} | {fixed[0]} | {fixed[1]} | {largest} |")


def _bug_table(outcomes: Iterable[Outcome]) -> None:
    print("\n| planted bug | parity | at its site | mean exp | alarm | KL | alarm |")
    print("|---" * 7 + "|")
    for o in outcomes:
        exp, kl = ("yes" if o.mean_exp > MEAN_EXP else "no", "yes" if o.kl > KL else "no")
        where = "yes" if o.found else "no"
        print(f"| {o.pair.kind} | {o.verdict} | {where} | {o.mean_exp:.3f} | {exp} | {o.kl:.3g} | {kl} |")


def main() -> None:
    """Judge the pairs; exit code 1 if a legal one raised an alarm, or a planted bug none."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=200)
    options.add_argument("--bugs", type=int, default=20)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--seed", type=int, default=0, help="the first seed")
    given = options.parse_args()
    start, done = time.perf_counter(), list[Outcome]()
    pairs = [*map(clean_pair, range(given.seed, given.seed + given.pairs)), *bug_pairs(given.bugs)]
    for outcome in outcomes_of(pairs, given.jobs):
        done.append(outcome)
        if outcome.pair.kind in KINDS and outcome.verdict != "match":
            print(f"{outcome.pair}: {outcome.verdict}, {outcome.said}", flush=True)
        if len(done) % 20 == 0:
            print(f"{len(done)} of {len(pairs)}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    legal, planted = done[: given.pairs], done[given.pairs :]
    _clean_table(legal)
    _bug_table(planted)
    alarms, seen = sum(o.verdict != "match" for o in legal), sum(o.verdict == "diverged" for o in planted)
    print(f"\n{alarms} of {len(legal)} legal pairs are no match, {seen} of {len(planted)} bugs are seen; ", end="")
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(alarms > 0 or seen < len(planted))


if __name__ == "__main__":
    main()
