"""What recording and comparing cost beside tools that others use for it, in one process: ratios of processor time.

    python -m tests.bench.peers [--tokens 128] [--layers 4] [--hidden 512] [--rounds 3]

On random weights in bfloat16 with the shape of Qwen3 (see tests.bench.large_model). Recording, as times a plain forward
pass: parity; transformers' model_addition_debugger, which writes every input and output in full; SGLang's dumper.
Comparing two recordings of all sites, as times a naive script that widens both to float64 and computes MSE, cosine and
largest difference in numpy: parity, with ULPs and non-finite numbers too; SGLang's comparator. What SGLang brings wants
its engine, and is skipped with that reason. All take their turns in each round; medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import AutoModelForCausalLM, model_addition_debugger_context

from parity.candidates.base import open_candidate
from parity.compare.metrics import Metrics, measuring
from parity.dump import open_dump
from parity.record.arrays import to_torch
from parity.reference.checkpoint import find
from parity.reference.transfer import run_together
from parity.run_spec import RunSpec
from tests.bench.large_model import make_checkpoint

Action = Callable[[], object]
_SGLANG = "its engine is not driven here" if importlib.util.find_spec("sglang") else "SGLang is not installed"


def spent(actions: dict[str, Action], rounds: int) -> dict[str, float]:
    """Processor seconds of each, medians of rounds in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.process_time()
            action()
            times[name].append(time.process_time() - start)
    return {name: median(some) for name, some in times.items()}


def naive(a: Path, b: Path) -> dict[str, tuple[float, float, float]]:
    """What everybody writes: MSE, cosine and largest difference of each site, in float64."""
    found = {}
    with open_dump(a) as ours, open_dump(b) as theirs:
        for site in ours.entries:
            x, y = (dump.read(site).astype(np.float64).ravel() for dump in (ours, theirs))
            cosine = float(x @ y / np.sqrt((x @ x) * (y @ y)))
            found[site] = (float(np.square(x - y).mean()), cosine, float(np.abs(x - y).max()))
    return found


def compared(a: Path, b: Path) -> dict[str, Metrics]:
    """The same by parity."""
    with open_dump(a) as ours, open_dump(b) as theirs:
        pairs = {site: (to_torch(ours.read(site)), to_torch(theirs.read(site))) for site in ours.entries}
        return {site: run_together([measuring(x, y)])[0] for site, (x, y) in pairs.items()}


def agree(plain: dict[str, tuple[float, float, float]], ours: dict[str, Metrics]) -> bool:
    """Whether both have come to the same numbers."""
    return all(
        np.allclose((m.mse, m.cosine, m.max_abs), plain[site], rtol=1e-5, atol=1e-12) for site, m in ours.items()
    )


@torch.no_grad()
def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    path = make_checkpoint(Path(tempfile.gettempdir()), given.layers, given.hidden)
    run = RunSpec(find(str(path)), (tuple(7919 * i % 151000 for i in range(given.tokens)),), "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    sites = run.model().sites
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def plain() -> None:
            model(run.ids, use_cache=False)

        def record(to: str) -> None:
            open_candidate(model).record(run, sites, folder / to).close()

        def debug() -> None:
            shutil.rmtree(folder / "debug", ignore_errors=True)
            with model_addition_debugger_context(model, str(folder / "debug"), do_prune_layers=False, use_repr=False):
                plain()

        plain()  # what is done once only
        recording = spent({"plain": plain, "parity": lambda: record("a.h5"), "debugger": debug}, given.rounds)
        model.model.norm.weight.mul_(1.001)
        record("b.h5")
        a, b = folder / "a.h5", folder / "b.h5"
        assert agree(naive(a, b), compared(a, b)), "both say the same"
        comparing = spent({"naive": lambda: naive(a, b), "parity": lambda: compared(a, b)}, given.rounds)
        speed = 2 * a.stat().st_size / comparing["parity"] / 1e9
    print("recording, times a plain forward pass")
    print(f"  parity                              {recording['parity'] / recording['plain']:.2f}x")
    print(f"  transformers' addition debugger     {recording['debugger'] / recording['plain']:.2f}x")
    print(f"  SGLang's dumper                     skipped: {_SGLANG}")
    print("comparing two recordings, times a naive script in float64")
    print(f"  parity                              {comparing['parity'] / comparing['naive']:.2f}x ({speed:.2f} GB/s)")
    print(f"  SGLang's comparator                 skipped: {_SGLANG}")


if __name__ == "__main__":
    main()
