"""Rollouts: no clean one may be accused, and each way to be wrong is told from the others.

    python -m tests.bench.rollouts --jobs 16

Every rollout draws a tiny checkpoint of some architecture, its prompts, their number, the length of what is sampled,
dtype, attention, how many rows the engine runs together, a temperature and how the file rounds. It is judged
as `parity logprobs` does: clean, and then with a known mistake. Prints what is said of each.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from parity.report.rollouts import headline
from parity.rollouts.compare import RolloutOptions, compare_rollouts
from tests import checkpoints
from tests.rollouts import Row, sample, trl

ARCHITECTURES = ("qwen3", "qwen3", "llama", "qwen2", "gemma3_text", "mistral", "olmo2", "gpt_neox")
DTYPES = ("float32", "bfloat16", "float16")
# What is wrong, and what must be said of it: the kind of the cause; none is known of weights that nobody names.
MISTAKES = {"temperature twice": "temperature", "stale weights": "", "shift": "shift", "float16 cache": "fault"}


@dataclass(frozen=True)
class Drawn:
    """One rollout, all of it drawn from its seed; `mistake` is empty for a clean one."""

    seed: int
    architecture: str
    dtype: str
    attention: str
    rows: int
    tokens: int
    together: int
    temperature: float
    decimals: int | None
    mistake: str = ""

    def __str__(self) -> str:
        stored = "" if self.decimals is None else f", {self.decimals} decimals"
        batch = f"{self.rows} rows of {self.tokens} tokens, {self.together} together"
        engine = f"{self.architecture} {self.dtype} {self.attention}"
        return f"seed {self.seed}: {self.mistake or 'clean'}: {engine}, {batch}, temperature {self.temperature}{stored}"


@dataclass(frozen=True)
class Outcome:
    """What was said of a rollout: verdict, kinds of its causes, the ratio, the headline."""

    drawn: Drawn
    verdict: str
    kinds: tuple[str, ...]
    ratio: float
    said: str

    @property
    def is_right(self) -> bool:
        """Whether a clean one is a match, and a wrong one is told by its cause."""
        if not self.drawn.mistake:
            return self.verdict == "match"
        cause = MISTAKES[self.drawn.mistake]
        return self.verdict == "diverged" and (self.kinds[:1] == (cause,) if cause else not self.kinds)


def draw(seed: int, mistake: str = "") -> Drawn:
    """The rollout of a seed."""
    luck = random.Random(seed)
    # Of the float16 cache of a model in 16 bits nothing is left to see, or less than rounding makes.
    dtype = "float32" if mistake == "float16 cache" else luck.choice(DTYPES)
    return Drawn(
        seed,
        luck.choice(ARCHITECTURES),
        dtype,
        luck.choice(("eager", "sdpa")),
        luck.choice((2, 4, 6) if mistake else (1, 2, 4, 6)),
        luck.choice((12, 24, 48)),
        luck.choice((1, 1, 2, 5)),
        0.8 if mistake.startswith("temperature") else luck.choice((1.0, 1.0, 0.7, 1.3)),
        None if mistake else luck.choice((None, None, 4, 6)),
        mistake,
    )


def run_one(drawn: Drawn) -> Outcome:
    """Sample a rollout and judge it; a run that fails is an outcome too."""
    torch.set_num_threads(1)
    disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _judged(drawn, Path(folder))
    except Exception as error:
        return Outcome(drawn, "error", (), float("nan"), f"{type(error).__name__}: {error}")


def _judged(drawn: Drawn, folder: Path) -> Outcome:
    write = checkpoints.qwen3 if drawn.architecture == "qwen3" else partial(checkpoints.other, drawn.architecture)
    path = write(folder / "model", dtype="bfloat16")
    rows = _sampled(drawn, path)
    if drawn.mistake == "shift":
        rows = [(p, c, values[1:] + values[:1]) for p, c, values in rows]
    if drawn.decimals is not None:
        rows = [(p, c, [round(v, drawn.decimals) for v in values]) for p, c, values in rows]
    if drawn.mistake == "stale weights":
        _move(path / "model.safetensors")
    options = RolloutOptions(str(path), drawn.dtype, temperature=drawn.temperature)
    found = compare_rollouts(trl(folder / "rollout.jsonl", rows), options)
    return Outcome(drawn, found.verdict, tuple(cause.kind for cause in found.causes), found.ratio, headline(found))


def _sampled(drawn: Drawn, path: Path) -> list[Row]:
    twice = drawn.mistake.startswith("temperature")
    return sample(
        path,
        drawn.dtype,
        rows=drawn.rows,
        tokens=drawn.tokens,
        temperature=drawn.temperature**2 if twice else drawn.temperature,
        cache_dtype=torch.float16 if drawn.mistake == "float16 cache" else None,
        seed=drawn.seed + 4,
        attention=drawn.attention,
        together=drawn.together,
    )


def _move(path: Path) -> None:
    """Make a training step of the weights: the engine has had those before it."""
    weights = load_file(path)
    generator = torch.Generator().manual_seed(7)
    for value in weights.values():
        value.mul_(1 + 0.1 * torch.randn(value.shape, generator=generator).to(value.dtype))
    save_file(weights, path, metadata={"format": "pt"})


def outcomes_of(drawn: Sequence[Drawn], jobs: int) -> Iterator[Outcome]:
    """The outcomes in the order of the rollouts, of as many processes."""
    if jobs == 1:
        yield from map(run_one, drawn)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_one, drawn, chunksize=2)


def main() -> None:
    """Judge the rollouts; exit code 1 if a clean one was accused, or a wrong one not told."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clean", type=int, default=200)
    options.add_argument("--wrong", type=int, default=20, help="of each mistake")
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--seed", type=int, default=0, help="the first seed")
    given = options.parse_args()
    start = time.perf_counter()
    drawn = [draw(seed) for seed in range(given.seed, given.seed + given.clean)]
    drawn += [draw(seed, mistake) for mistake in MISTAKES for seed in range(given.seed, given.seed + given.wrong)]
    total, right = Counter[str](), Counter[str]()
    largest = 0.0
    for outcome in outcomes_of(drawn, given.jobs):
        kind = outcome.drawn.mistake or "clean"
        total[kind] += 1
        right[kind] += outcome.is_right
        largest = max(largest, outcome.ratio if kind == "clean" else 0.0)
        if not outcome.is_right:
            print(f"{outcome.drawn}: {outcome.verdict} ({outcome.ratio:.3g}), {outcome.said}", flush=True)
    print("\n| rollouts | | judged rightly |\n|---|---|---|")
    for kind, count in total.items():
        print(f"| {kind} | {count} | {right[kind]} |")
    print(f"\nlargest ratio of a clean one {largest:.2f}; {time.perf_counter() - start:.0f} s")
    sys.exit(right != total)


if __name__ == "__main__":
    main()
