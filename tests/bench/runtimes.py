"""Each runtime that parity knows on a small checkpoint: the commands, and what they print. Writes dumps/RUNTIMES.md.

    python -m tests.bench.runtimes

Needs what `parity[test]` brings, jax and cargo. Checkpoints are those of tests.checkpoints, two layers in float32.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGE = ROOT / "dumps" / "RUNTIMES.md"
TOKENS = "5 17 2 99 4 31 8 60 12 7"
_DIFF = f'parity diff --model model --tokens "{TOKENS}" --no-power -o report --candidate '

HEAD = """# Runtimes

Each with its commands and what they print, made by `python -m tests.bench.runtimes`: a small random Qwen3 of two layers
in float32, ten tokens. The [README](../README.md) says what each candidate takes.

"""


@dataclass(frozen=True)
class Runtime:
    """A section of the page. `made` are the names in FILES that the commands need, `install` is shown and not run."""

    title: str
    about: str
    commands: tuple[str, ...]
    made: tuple[str, ...] = ("model",)
    install: str = ""


RUNTIMES = (
    Runtime(
        "transformers", "Another attention, dtype or device of the reference itself.", (f"{_DIFF}'hf:model?attn=sdpa'",)
    ),
    Runtime(
        "llama.cpp",
        "A GGUF of Qwen3. The second file says another rope base in its metadata.",
        (f"{_DIFF}gguf:model.gguf", f"{_DIFF}gguf:base.gguf"),
        ("model", "model.gguf", "base.gguf"),
        "pip install 'parity[gguf]'",
    ),
    Runtime(
        "ONNX Runtime",
        "What torch.onnx.export(dynamo=True) wrote.",
        (f"{_DIFF}onnx:model.onnx",),
        ("model", "model.onnx"),
        "pip install 'parity[onnx]'",
    ),
    Runtime(
        "MLX",
        "The checkpoint itself, as mlx-lm loads it. The second is a Llama as transformers 5 writes it: mlx-lm 0.32 "
        "looks for `rope_theta` at the top of config.json, and takes 10000 where it stands in `rope_parameters`.",
        (f"{_DIFF}mlx:model", f"{_DIFF}mlx:llama".replace("--model model", "--model llama")),
        ("model", "llama"),
        "pip install 'parity[mlx]'",
    ),
    Runtime(
        "numpy, by hand",
        "A port that is no torch module writes a dump.",
        (
            f'parity record --model model --tokens "{TOKENS}" -o ref.h5',
            "python -m impl.qwen3_numpy model ref.tokens.txt numpy.safetensors",
            "parity diff ref.h5 numpy.safetensors --no-power -o report",
        ),
    ),
    Runtime(
        "JAX, by hand",
        "The same under jit, where each function returns the values at its sites beside its result.",
        (
            f'parity record --model model --tokens "{TOKENS}" -o ref.h5',
            "python -m impl.qwen3_jax model ref.tokens.txt jax.safetensors",
            "parity diff ref.h5 jax.safetensors --no-power -o report",
        ),
        install="pip install jax",
    ),
    Runtime(
        "Rust, by hand",
        "Standard library alone.",
        (
            f'parity record --model model --tokens "{TOKENS}" -o ref.h5',
            "cargo run -q --release --manifest-path impl/rust/Cargo.toml -- model ref.tokens.txt rust.safetensors",
            "parity diff ref.h5 rust.safetensors --no-power -o report",
        ),
    ),
)


def _model(folder: Path, name: str) -> None:
    from tests import checkpoints

    if name == "model":
        checkpoints.qwen3(folder / name, layers=2, dtype="float32")
    else:
        checkpoints.other(name, folder / name, num_hidden_layers=2, dtype="float32")


def _gguf(folder: Path, name: str) -> None:
    from tests.gguf_file import write_gguf

    write_gguf(folder / "model", folder / name, **({} if name == "model.gguf" else {"qwen3__rope__freq_base": 10000.0}))


def _onnx(folder: Path, name: str) -> None:
    from tests.onnx_file import export

    export(folder / "model", folder / name)


FILES: Mapping[str, Callable[[Path, str], None]] = {
    "model": _model,
    "llama": _model,
    "model.gguf": _gguf,
    "base.gguf": _gguf,
    "model.onnx": _onnx,
}


def printed(command: str, folder: Path) -> str:
    """What a command prints, run in `folder` with this Python; what goes to standard error is left out."""
    words = (
        command.replace("parity ", f"{sys.executable} -m parity.cli ", 1) if command.startswith("parity ") else command
    )
    words = words.replace("python -m", f"{sys.executable} -m", 1) if words.startswith("python ") else words
    words = words.replace("impl/rust/", f"{ROOT}/impl/rust/")
    settings = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "110", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, shell=True, cwd=folder, env=settings, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1 is a divergence
        raise SystemExit(f"{command}\n{done.stderr[-2000:]}")
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def section(runtime: Runtime, outputs: Mapping[str, str]) -> str:
    """A runtime's part of the page, from what its commands printed."""
    shown = [f"$ {runtime.install}"] if runtime.install else []
    for command in runtime.commands:
        shown += [f"$ {command}", *([outputs[command]] if outputs[command] else [])]
    return "\n".join([f"## {runtime.title}", "", runtime.about, "", "```", *shown, "```", ""])


def main() -> None:
    """Make the checkpoints, run every command, write the page."""
    with tempfile.TemporaryDirectory(prefix="parity-runtimes-") as name:
        folder, parts = Path(name), []
        for runtime in RUNTIMES:
            for file in runtime.made:
                if not (folder / file).exists():
                    FILES[file](folder, file)
            print(runtime.title, file=sys.stderr)
            parts.append(section(runtime, {command: printed(command, folder) for command in runtime.commands}))
    PAGE.write_text(HEAD + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
