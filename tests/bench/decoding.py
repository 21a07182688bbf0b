"""Decoding, caches, chunks, padding and batches: planted bugs must be found and named, and clean runs must match.

    python -m tests.bench.decoding [--jobs 16] [--only mistral,stale-row] [--dtypes float32,bfloat16]

Planted are the bugs of tests.planted (decoding, caches, padding), in copies of `impl`. Clean are `impl` and
transformers' own models with their own caches, each in five ways. Prints both tables.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers.utils.logging import disable_progress_bar

from impl.qwen3 import Qwen3, load
from parity.candidates.base import open_candidate
from parity.compare.pipeline import diff
from parity.errors import ParityError
from parity.options import RunOptions
from parity.results import BAD, Comparison
from parity.run_spec import RunSpec, run_spec
from tests.architectures import make
from tests.checkpoints import qwen3
from tests.planted.caches import CACHES
from tests.planted.decoding import LATE, LATE_CHUNK
from tests.planted.padding import BUGS

DTYPES = ("float32", "bfloat16")
IMPL = "impl"
# Full attention, windows, latent attention, mixtures, linear attention, convolutions and state spaces.
ARCHITECTURES = (
    IMPL, "llama", "qwen2", "qwen3", "phi", "gpt_neox", "olmo2", "glm4", "smollm3", "cohere",
    "mistral", "gemma2", "gemma3", "olmo3", "cohere2", "exaone4", "starcoder2",
    "deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe", "gpt_oss", "granitemoe",
    "qwen3_next", "lfm2", "mamba2", "jamba", "falcon_h1",
)  # fmt: skip
# More tokens than the windows of 11 have.
LENGTHS = (20, 27, 16)
WAYS: dict[str, dict[str, Any]] = {
    "decode": {"rows": 1, "decode": 5},
    "chunks": {"rows": 1, "chunks": "8,7,5"},
    "batch, decode": {"rows": -3, "decode": 3},
    "padded left, decode": {"rows": 3, "pad": "left", "decode": 3},
    "padded right": {"rows": 3, "pad": "right"},
}

# What transformers itself computes otherwise than in one pass; parity finds it at the state.
OTHERWISE = {("jamba", "chunks"): "transformers' Mamba begins every chunk with an empty state (mamba_selective_scan)"}


@dataclass(frozen=True)
class Outcome:
    """One run. `outcome` is match, alarm, inconclusive, refused or n/a (OTHERWISE) of a clean one; named, unnamed,
    wrong name, elsewhere or unseen of a planted bug; crash of any."""

    name: str
    way: str
    dtype: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Planted:
    """A bug of tests.planted and how it is run: `guilty` families, right `names` (none if it has none)."""

    id: str
    apply: Callable[[Qwen3], None]
    guilty: tuple[str, ...]
    names: tuple[str, ...]
    options: dict[str, Any]
    dtypes: tuple[str, ...] = DTYPES


def _row(length: int, seed: int) -> str:
    return " ".join(str((97 * i * i + 31 * i * (seed + 1) + 7) % 200 + 3) for i in range(length))


def _tokens(rows: int, lengths: Sequence[int] = LENGTHS) -> str:
    """So many rows, of one length where the number is negative."""
    return "\n".join(_row(lengths[0] if rows < 0 else lengths[i], i) for i in range(abs(rows)))


def planted_bugs() -> Iterator[Planted]:
    """All of them, each with a run that shows it."""
    one, many, padded = _tokens(1, (13,)), _tokens(-3, (13,)), _tokens(3, (8, 13, 6))
    for bug in LATE:
        yield Planted(bug.id, bug.apply, bug.guilty, bug.faults, {"tokens": one, "decode": 4})
    for bug in LATE_CHUNK:
        yield Planted(bug.id, bug.apply, bug.guilty, bug.faults, {"tokens": one, "chunks": "5,8"})
    for read in CACHES:
        options = {"tokens": one if read.rows == 1 else many, "decode": 4}
        yield Planted(read.id, read.apply, read.guilty, read.faults, options, read.dtypes)
    for pad in BUGS:
        for side in pad.pad:
            options = {"tokens": padded, "pad": side, **dict(pad.options)}
            yield Planted(f"{pad.id} ({side})", pad.apply, pad.guilty, pad.faults, options)


def examine(name: str, dtype: str) -> list[Outcome]:
    """The runs of one planted bug, or of one architecture in all ways."""
    torch.set_num_threads(1)
    disable_progress_bar()
    bug = next((bug for bug in planted_bugs() if bug.id == name), None)
    with tempfile.TemporaryDirectory(prefix="parity-decoding-") as folder:
        own = bug is not None or name == IMPL
        path = Path(folder) / "model"
        path = qwen3(path, layers=2) if own else make(name, path, dtype)
        if bug is not None:
            return [_timed(bug.id, "planted", dtype, lambda: _of_bug(bug, path, dtype))]
        spec = "impl.qwen3:load" if own else "hf:"
        return [
            Outcome(name, way, dtype, "n/a", OTHERWISE[name, way])
            if (name, way) in OTHERWISE
            else _timed(name, way, dtype, lambda way=way: _of_clean(spec, way, path, dtype))
            for way in WAYS
        ]


def _timed(name: str, way: str, dtype: str, run: Callable[[], tuple[str, str]]) -> Outcome:
    start = time.perf_counter()
    try:
        outcome, detail = run()
    except ParityError as error:
        outcome, detail = "refused", str(error)
    except Exception as error:
        outcome, detail = "crash", f"{type(error).__name__}: {error}"[:200]
    return Outcome(name, way, dtype, outcome, detail, time.perf_counter() - start)


def _asked(path: Path, dtype: str, options: dict[str, Any]) -> RunSpec:
    return run_spec(RunOptions(model=str(path), dtype=dtype, power=False, **options))


def _of_clean(spec: str, way: str, path: Path, dtype: str) -> tuple[str, str]:
    options = dict(WAYS[way])
    found = diff(_asked(path, dtype, {"tokens": _tokens(options.pop("rows")), **options}), open_candidate(spec))
    bad = [f"{m.site} {m.verdict} {m.ratio or 0:.3g}" for m in found.sites if m.verdict in BAD]
    if bad or found.findings:
        return "alarm", ", ".join(bad[:3])
    return found.verdict, "" if found.verdict == "match" else found.headline


def _of_bug(bug: Planted, path: Path, dtype: str) -> tuple[str, str]:
    model = load(path, dtype)
    bug.apply(model)
    return _judged(diff(_asked(path, dtype, bug.options), open_candidate(model)), bug)


def _judged(found: Comparison, bug: Planted) -> tuple[str, str]:
    families = {family for finding in found.findings for family in finding.families}
    said = [finding.fault.id if finding.fault else "?" for finding in found.findings]
    detail = f"{', '.join(sorted(families)) or 'nothing'}; said {', '.join(said) or 'nothing'}"
    if not families:
        return "unseen", detail
    if families != {name if name == "lm_head" else f"model.layers.*.{name}" for name in bug.guilty}:
        return "elsewhere", detail
    if set(said) <= set(bug.names):
        return "named", ", ".join(dict.fromkeys(said))
    return ("unnamed" if set(said) <= {*bug.names, "?"} else "wrong name"), detail


def tables(found: Iterable[Outcome]) -> str:
    """Both tables, and their totals."""
    clean, planted = [], []
    for one in found:
        (planted if one.way == "planted" else clean).append(one)
    lines = ["| planted bug | dtype | outcome | |", "|---|---|---|---|"]
    lines += [f"| {one.name} | {one.dtype} | {one.outcome} | {one.detail} |" for one in planted]
    by_name: dict[tuple[str, str], dict[str, str]] = {}
    for one in clean:
        by_name.setdefault((one.name, one.dtype), {})[one.way] = one.outcome
    lines += ["", f"| clean | dtype | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 2) + "|"]
    lines += [
        f"| {name} | {dtype} | {' | '.join(ways.get(way, '') for way in WAYS)} |"
        for (name, dtype), ways in by_name.items()
    ]
    lines += ["", *(f"{name} {one.way} {one.dtype}: {one.outcome}: {one.detail}" for one in clean
                    if one.outcome != "match" for name in [one.name])]  # fmt: skip
    return "\n".join([*lines, "", _total("planted", planted), _total("clean", clean)])


def _total(what: str, found: Sequence[Outcome]) -> str:
    counted = Counter(one.outcome for one in found)
    bugs = f" of {len({one.name for one in found})} bugs" if what == "planted" else ""
    return f"{len(found)} {what} runs{bugs}: {', '.join(f'{n} {outcome}' for outcome, n in counted.most_common())}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="architectures and bugs, with commas between them")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    arguments = parser.parse_args()
    bugs = {bug.id: bug.dtypes for bug in planted_bugs()}
    names = arguments.only.split(",") if arguments.only else [*bugs, *ARCHITECTURES]
    dtypes = arguments.dtypes.split(",")
    jobs = [(name, dtype) for name in names for dtype in dtypes if dtype in bugs.get(name, DTYPES)]
    start, found = time.perf_counter(), list[Outcome]()
    with ProcessPoolExecutor(min(arguments.jobs, len(jobs)), get_context("spawn")) as pool:
        for done in as_completed([pool.submit(examine, *job) for job in jobs]):
            found += done.result()
            print(*(f"{one.name} {one.way} {one.dtype}: {one.outcome}" for one in done.result()),
                  sep="\n", file=sys.stderr, flush=True)  # fmt: skip
    order = {job: i for i, job in enumerate(jobs)}
    print(tables(sorted(found, key=lambda one: order[one.name, one.dtype])))
    print(f"{time.perf_counter() - start:.0f} s, {sum(one.seconds for one in found):.0f} s of runs", file=sys.stderr)
    return int(any(one.outcome in ("alarm", "crash", "elsewhere", "unseen", "wrong name") for one in found))


if __name__ == "__main__":
    sys.exit(main())
