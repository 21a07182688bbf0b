"""Where the time of a comparison goes, as a row of a table for each number of tokens.

    python -m tests.bench.speed_table [--device cuda] [--tokens 256 2048] [--layers 28] [--hidden 1024] [--offline]

On random weights in bfloat16 with the shape of Qwen3-0.6B (see tests.bench.large_model), `impl` being the candidate.
With --offline it is recorded before, in a process of its own, so that its weights are no part of what is measured.
Beside each comparison runs, in a process of its own, a bare script: imports, one loading, one forward pass of
transformers. Seconds of wall time; GB at the peak, of the GPU as torch's allocator counts them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.large_model import make_checkpoint

ROOT = Path(__file__).parent.parent.parent
BARE = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
path, device, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager").eval().to(device)
ids = torch.tensor([[7919 * i % 151000 for i in range(tokens)]], device=device)
spent = []
with torch.no_grad():
    for _ in range(1 + int(sys.argv[4])):
        start = time.perf_counter()
        float(model(ids, use_cache=False).logits[0, -1, -1])
        spent.append(time.perf_counter() - start)
print(json.dumps(min(spent)))
"""
WATCHED = """
import json, resource, runpy, sys
try:
    runpy.run_module("parity.cli", run_name="__main__", alter_sys=True)
finally:
    torch = sys.modules.get("torch")
    gpu = torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0
    print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, gpu / 1e9]), file=sys.stderr)
"""
STAGES = ("record candidate", "replay", "measure", "diagnose", "wrong constants", "power")


def run(code: str, *arguments: str) -> tuple[float, str, str]:
    """Wall seconds, output and errors of a script in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if not done.stdout:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start, done.stdout, done.stderr


def row(path: Path, device: str, tokens: int, *, offline: bool) -> list[str]:
    """The figures of one comparison."""
    forward = float(run(BARE, str(path), device, str(tokens), "2")[1])
    bare = run(BARE, str(path), device, str(tokens), "0")[0]
    ids = " ".join(str(7919 * i % 151000) for i in range(tokens))
    asked = ["--model", str(path), "--device", device]
    given = [*asked, "--dtype", "bfloat16", "--tokens", ids]
    if offline:
        dump = str(path.with_name(f"{path.name}-{tokens}.h5"))
        run(WATCHED, "record", *given, "--candidate", "impl.qwen3:load", "--out", dump)
        given = [*asked, dump]
    diff, said, errors = run(WATCHED, "diff", *given, "--json")
    report, (host, gpu) = json.loads(said), json.loads(errors.strip().splitlines()[-1])
    stages = report["environment"]["seconds"]
    figures = [forward, bare, diff, *(stages.get(stage, 0.0) for stage in STAGES), host, gpu]
    return [f"{tokens} tokens: {report['verdict']}", *(f"{figure:.2f}" for figure in figures)]


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu")
    options.add_argument("--tokens", type=int, nargs="+", default=[256, 2048])
    options.add_argument("--layers", type=int, default=28)
    options.add_argument("--hidden", type=int, default=1024)
    options.add_argument("--offline", action="store_true")
    given = options.parse_args()
    path = make_checkpoint(Path(tempfile.gettempdir()), given.layers, given.hidden)
    heads = ["", "plain forward", "bare script", "diff", *STAGES, "host GB", "GPU GB"]
    print(" | ".join(heads))
    for tokens in given.tokens:
        print(" | ".join(row(path, given.device, tokens, offline=given.offline)), flush=True)


if __name__ == "__main__":
    main()
