"""Published numbers, checked: RoPE in bfloat16, and a port's own validation that rounding was to explain.

    python -m tests.bench.published                 on real weights (SmolLM2-135M, dequantized)
    python -m tests.bench.published --model DIR     on a checkpoint of yours, such as the real Qwen3-0.6B
    python -m tests.bench.published --jobs 8 --into FILE   FILE keeps what is done

The validation: a Rust port of Qwen3-0.6B was accepted with an MSE of the logits of 8.48e-3, 9.18e-3 and 1.35e-2 at
three prompts, above its threshold of 1e-3, "due to bf16", with cosine above 0.999 and the same next token. What does
rounding alone make there, and which faults of the catalogue, in one layer or in all, would have passed beside it?
Each that passes is then shown to parity. Writes tests/bench/PUBLISHED.md, unless --few.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from parity.candidates.base import open_candidate
from parity.compare.inject import Injected
from parity.compare.pipeline import diff
from parity.errors import ParityError
from parity.faults import CATALOGUE, Injection, parse
from parity.observer import Observer
from parity.options import RunOptions
from parity.record.arrays import to_torch
from parity.reference.checkpoint import Checkpoint, find
from parity.reference.replay import Reference
from parity.reference.tokenizer import tokenize
from parity.results import BAD
from parity.run_spec import RunSpec
from tests.bench.examined import logit_figures, naming
from tests.bench.outcomes import Examined, append, read
from tests.bench.published_page import ACCEPTED, page
from tests.real_models import checkpoint_of, tokens_of

PAGE = Path(__file__).with_name("PUBLISHED.md")
PROMPTS = ("Hello", "The capital of France is", "What is 2+2?")
FAMILY = "published"
LEGAL = ("hf:?attn=sdpa", "hf:?attn=eager&dtype=float32")
FEW = ("norm-eps", "act-gelu-tanh", "weight-int8", "rope-theta")
STORY = 64  # tokens on which parity is asked about what has passed


def run_of(checkpoint: Checkpoint, ids: tuple[int, ...]) -> RunSpec:
    """A run of some tokens in bfloat16."""
    options = RunOptions(model=str(checkpoint.path), dtype="bfloat16", power=False)
    return RunSpec(checkpoint, (ids,), "bfloat16", options)


class Validation:
    """The three prompts on one model, with the reference's logits for each."""

    def __init__(self, path: Path) -> None:
        checkpoint = find(str(path))
        self.runs = [run_of(checkpoint, tuple(tokenize(checkpoint, prompt).ids)) for prompt in PROMPTS]
        self.reference = Reference(self.runs[0].model())
        self.story = run_of(checkpoint, tokens_of(path, STORY))
        self.plain = [self._logits(f"hf:?attn={run.options.attention}", run) for run in self.runs]

    def examine(self, candidate: str) -> Examined:
        """A legal candidate (`hf:…`) or a fault (`ID@LAYER`) at the prompts, and parity's word on it if it passes."""
        start = time.perf_counter()
        key = (FAMILY, self.runs[0].checkpoint.path.name, "bfloat16", candidate)
        bug = "" if candidate.startswith("hf:") else candidate
        try:
            figures = [
                logit_figures(self._logits(candidate, run), plain, run.ids)
                for run, plain in zip(self.runs, self.plain, strict=True)
            ]
        except ParityError as error:
            return Examined(*key, bug, "not run", str(error).splitlines()[0])
        shown: dict[str, Any] = {name: [f[name] for f in figures] for name in ("mse", "cosine", "same_token")}
        verdict, headline, said = "not asked", "", {}
        if bug and passes(shown):
            compared = diff(self.story, self._candidate(candidate), None, self.reference)
            verdict, headline = compared.verdict, compared.headline
            names = [[f.fault.id, *f.fault.rivals] if f.fault else [] for f in compared.findings]
            said = {
                "flagged": tuple(site.site for site in compared.sites if site.verdict in BAD),
                "named": tuple(n[0] if n else "unknown" for n in names),
                "naming": naming(names, frozenset({parse(candidate).fault.id})),
            }
        seconds = time.perf_counter() - start
        return Examined(*key, bug, verdict, headline, figures=shown, seconds=seconds, **said)

    def _candidate(self, text: str) -> Any:
        if text.startswith("hf:"):
            return open_candidate(text)
        return Injected(parse(text), self.reference, Observer())

    def _logits(self, text: str, run: RunSpec) -> Tensor:
        sites = self.reference.working.sites
        with (
            tempfile.TemporaryDirectory() as folder,
            self._candidate(text).record(run, sites, Path(folder) / "run.h5") as dump,
        ):
            return to_torch(dump.read(sites[-1].name))


def passes(figures: dict[str, Any]) -> bool:
    """Whether the author would have accepted: the MSE that he put down to bfloat16, his cosine, his next token."""
    close = all(mse <= ACCEPTED for mse in figures["mse"]) and all(cosine > 0.999 for cosine in figures["cosine"])
    return close and all(figures["same_token"])


def candidates(path: Path, few: bool) -> Iterator[str]:
    """Legal ones; then every fault of the catalogue in the middle layer and in all."""
    yield from LEGAL
    middle = int(find(str(path)).config()["num_hidden_layers"]) // 2
    for fault in CATALOGUE:
        if fault.regime or (few and fault.id not in FEW):
            continue
        value = fault.number.typical[0] if fault.number else 0.0
        yield from (str(Injection(fault, value, layer)) for layer in (middle, None))


def work(path: Path, share: tuple[str, ...], file: Path) -> list[Examined]:
    """The candidates of one process that the file does not have yet."""
    torch.set_num_threads(1)
    disable_progress_bar()
    done = {run.key[-1] for run in read(file) if run.family == FAMILY and run.model == path.name}
    todo = [candidate for candidate in share if candidate not in done]
    if not todo:
        return []
    on, runs = Validation(path), list[Examined]()
    for candidate in todo:
        runs.append(on.examine(candidate))
        append(file, runs[-1:])
    return runs


def main() -> int:
    """Compute all, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a checkpoint, in place of SmolLM2")
    parser.add_argument("--few", action="store_true", help="some faults, and no page")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--into", type=Path, help="a file that keeps the runs")
    given = parser.parse_args()
    path = (given.model or checkpoint_of("smollm2")).resolve()
    file = given.into or Path(tempfile.mkdtemp()) / "runs.jsonl"
    every = tuple(candidates(path, given.few))
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        shares = [every[part :: given.jobs] for part in range(given.jobs)]
        for future in as_completed([pool.submit(work, path, share, file) for share in shares]):
            for run in future.result():
                print(f"{run.what}: {run.verdict} {', '.join(run.named)}", file=sys.stderr)
    planted = sum(not each.startswith("hf:") for each in candidates(path, few=False))
    text = page([run for run in read(file) if run.family == FAMILY and run.model == path.name], planted)
    print(text)
    if not given.few:
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
