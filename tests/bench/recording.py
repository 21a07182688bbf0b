"""What recording costs: one forward pass of a candidate with every site written to disk, beside a plain one.

    python -m tests.bench.recording [--tokens 256] [--rounds 3]

On `impl` with the shape of Qwen3-0.6B and random weights in bfloat16 (see tests.bench.large_model). Passes with and
without recording alternate; prints the medians and their ratio, and how much was written.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from impl.qwen3 import load
from parity.candidates.base import open_candidate
from parity.dump import open_dump
from parity.reference.checkpoint import find
from parity.run_spec import RunSpec
from tests.bench.large_model import make_checkpoint


def seconds(action: Callable[[], object]) -> float:
    """Wall seconds of an action."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    """Print the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    path = make_checkpoint(Path(tempfile.gettempdir()), layers=28, hidden=1024)
    question = RunSpec(find(str(path)), (tuple(7919 * i % 151000 for i in range(given.tokens)),), "bfloat16")
    sites = question.model().sites
    module = load(path, "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "candidate.h5"

        def record() -> None:
            open_candidate(module).record(question, sites, dump).close()

        module(question.ids)  # what is done once only
        rounds = [(seconds(lambda: module(question.ids)), seconds(record)) for _ in range(given.rounds)]
        size, count = dump.stat().st_size / 1e6, len(open_dump(dump).entries)
    plain, recorded = (median(times) for times in zip(*rounds, strict=True))
    print(f"plain {plain:.2f} s, recorded {recorded:.2f} s: {recorded / plain:.2f}x, {count} sites, {size:.0f} MB")


if __name__ == "__main__":
    main()
