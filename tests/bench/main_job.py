"""What `parity diff` costs beside the script that everybody writes.

    python -m tests.bench.main_job [--rounds 3]

Runs, in turn and each in a process of its own, a bare script (import torch and transformers, load both models,
one forward of each) and `parity diff` on the embedded model with the same prompt; prints the ratio of the
processor time and of the wall time, medians of the rounds. Both run once before, so that Python has compiled what
they import, as it has for whoever starts them again.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent.parent
PROMPT = "The capital of France is"
BARE = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from impl.qwen3 import load
folder = {str(ROOT / "parity" / "models" / "tiny-qwen3")!r}
ids = AutoTokenizer.from_pretrained(folder)({PROMPT!r}, return_tensors="pt").input_ids
reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
candidate = load(folder, "bfloat16")
with torch.no_grad():
    print((reference(ids).logits - candidate(ids)).abs().max())
"""


def spent(command: list[str]) -> tuple[float, float]:
    """Wall seconds and processor seconds of a command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run(command, env=environment, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, processor


def main() -> None:
    """Print the medians and their ratios."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    rounds = options.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        diff = [sys.executable, "-m", "parity.cli", "diff", "--prompt", PROMPT, "--out", folder]
        bare, ours = [], []
        for _ in range(1 + rounds):
            bare.append(spent([sys.executable, "-c", BARE]))
            ours.append(spent(diff))
        bare, ours = bare[1:], ours[1:]
    for position, kind in enumerate(("wall", "processor")):
        a, b = (median(run[position] for run in runs) for runs in (bare, ours))
        print(f"{kind:9} bare script {a:5.1f} s, parity diff {b:5.1f} s: {b / a:.2f}x")


if __name__ == "__main__":
    main()
