"""Time and memory of a full verdict on a model of the real Qwen3-0.6B shape, with random weights.

    python -m tests.bench.large_model [--tokens 256] [--limit-mb N] [--offline] [--layers 28] [--hidden 1024]
                                      [--inject FAULT]

Makes the checkpoint once (1.2 GB, in the system's folder for temporary files), times one plain forward of
transformers in bfloat16, then runs `parity diff` in a process of its own and reads its peak memory from the
kernel. `--offline` compares a dump that was recorded before, so that only parity's own memory counts;
`--limit-mb` caps the address space of that process, as `ulimit -v` does. `--inject` compares the reference with
a fault in it, to see what the diagnosis costs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def make_checkpoint(folder: Path, layers: int, hidden: int) -> Path:
    """A Qwen3 with the sizes of the 0.6B model and random weights, in shards of 300 MB."""
    path = folder / f"parity-bench-qwen3-{layers}x{hidden}"
    if (path / "config.json").is_file():
        return path
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=40960,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path, max_shard_size="300MB")
    return path


def plain_forward(path: Path, tokens: str) -> float:
    """Seconds of one forward pass of transformers in bfloat16, the model being in memory; best of two."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    ids = torch.tensor([[int(t) for t in tokens.split()]])
    seconds = []
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            model(ids, use_cache=False)
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def measured(arguments: list[str], limit_mb: int | None) -> tuple[float, float, subprocess.CompletedProcess[str]]:
    """Run the command line of parity: seconds, peak resident MB, and the finished process."""

    def cap() -> None:
        if limit_mb:
            resource.setrlimit(resource.RLIMIT_AS, (limit_mb << 20, limit_mb << 20))

    watch = "import resource, runpy, sys\n"
    watch += "try: runpy.run_module('parity.cli', run_name='__main__', alter_sys=True)\n"
    watch += "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", watch, *arguments], capture_output=True, text=True, preexec_fn=cap, check=False
    )
    seconds = time.perf_counter() - start
    peak = int(done.stderr.strip().splitlines()[-1]) / 1024 if done.stderr.strip() else 0.0
    return seconds, peak, done


def main() -> None:
    """Print the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--limit-mb", type=int)
    options.add_argument("--offline", action="store_true")
    options.add_argument("--inject", metavar="FAULT")
    options.add_argument("--layers", type=int, default=28)
    options.add_argument("--hidden", type=int, default=1024)
    given = options.parse_args()
    folder = Path(tempfile.gettempdir())
    path = make_checkpoint(folder, given.layers, given.hidden)
    size = sum(f.stat().st_size for f in path.glob("*.safetensors")) / 1e6
    tokens = " ".join(str(7919 * i % 151000) for i in range(given.tokens))
    plain = plain_forward(path, tokens)
    print(f"checkpoint {size:.0f} MB; plain forward of {given.tokens} tokens in bfloat16: {plain:.1f} s")

    ask = ["--model", str(path), "--dtype", "bfloat16"]
    if given.offline:
        dump = folder / "parity-bench-candidate.h5"
        seconds, peak, done = measured(["record", *ask, "--tokens", tokens, "-o", str(dump)], None)
        print(f"record: {seconds:.1f} s, peak {peak:.0f} MB {done.stderr.strip().splitlines()[:-1]}")
        arguments = ["diff", str(dump), "--json"]
    else:
        arguments = ["diff", *ask, "--tokens", tokens, "--json", *(["--inject", given.inject] if given.inject else [])]
    seconds, peak, done = measured(arguments, given.limit_mb)
    if done.returncode == 2 and not done.stdout:
        raise SystemExit(done.stderr)
    report = json.loads(done.stdout)
    limit = f" under a limit of {given.limit_mb} MB" if given.limit_mb else ""
    print(f"diff{limit}: {report['verdict']}, {report['coverage']}, peak {peak:.0f} MB")
    for finding in report["findings"]:
        print(f"  {', '.join(finding['families'])}: {(finding['fault'] or {'id': 'unknown'})['id']}")
    print(f"diff: {seconds:.1f} s = {seconds / plain:.1f}x the plain forward, of which")
    for what, spent in report["environment"]["seconds"].items():
        print(f"  {what:18} {spent:6.1f} s  {spent / plain:5.2f}x")


if __name__ == "__main__":
    main()
