"""Where the reference's weights are: a directory with config.json and safetensors, or a hub id."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity.errors import ModelError

EMBEDDED = "tiny-qwen3"
_EMBEDDED_DIR = Path(__file__).parent.parent / "models" / EMBEDDED


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: `name` as the user gave it, `path` the directory, `files` its safetensors."""

    name: str
    path: Path
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(file.stat().st_size for file in self.files)

    def open(self, stack: ExitStack, wanted: Callable[[str], bool] = lambda _key: True) -> list[Any]:
        """Its safetensors files that hold a wanted key, opened until the stack is closed.

        Only these are mapped into memory. Raises ModelError if one is damaged.
        """
        from safetensors import SafetensorError, safe_open

        index = self.path / "model.safetensors.index.json"
        places = _read_json(index).get("weight_map", {}) if index.is_file() else {}
        needed = {name for key, name in places.items() if wanted(key)}
        shards = []
        for file in self.files:
            if places and file.name not in needed:
                continue
            try:
                shards.append(stack.enter_context(safe_open(file, framework="pt")))
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"model {self.name!r}: {file} is no whole safetensors file ({error}). Download it again."
                ) from error
        return shards

    def tensor(self, name: str) -> Any:
        """One tensor of the checkpoint by name. Raises KeyError if it has none of that name."""
        with ExitStack() as stack:
            for shard in self.open(stack, lambda key: key == name):
                if name in shard.keys():  # noqa: SIM118
                    return shard.get_tensor(name)
        raise KeyError(name)

    def fingerprint(self) -> str:
        """A short hash of configuration and weights' names, shapes, dtypes and first bytes.

        Hashing every weight of a large model would take longer than running it; the header of each file
        and 64 KiB of its data tell checkpoints apart in practice.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in self.files:
            with file.open("rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(header + 65536))
        return digest.hexdigest()[:16]


def find(name: str) -> Checkpoint:
    """The checkpoint that `name` means: the embedded model, a directory, or a hub id.

    Raises ModelError, saying what was looked for where.
    """
    if name == EMBEDDED:
        return _open(name, _EMBEDDED_DIR)
    if Path(name).expanduser().is_dir():
        return _open(name, Path(name).expanduser())
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        raise ModelError(
            f"model {name!r}: no such directory. Give a directory with config.json and *.safetensors, "
            f"a hub id such as Qwen/Qwen3-0.6B, or leave it out for the embedded {EMBEDDED}."
        )
    return _open(name, _download(name))


def _open(name: str, path: Path) -> Checkpoint:
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise ModelError(f"model {name!r}: no config.json in {path} (found: {found}). Is it a Hugging Face checkpoint?")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    else:
        names = sorted(p.name for p in path.glob("*.safetensors"))
    missing = [shard for shard in names if not (path / shard).is_file()]
    if missing or not names:
        what = f"{missing[0]} is missing" if missing else "no *.safetensors"
        raise ModelError(
            f"model {name!r}: {what} in {path}. parity reads safetensors; convert or complete the download."
        )
    return Checkpoint(name, path, tuple(path / shard for shard in names))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}). Download the checkpoint again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object is expected, found {type(value).__name__}.")
    return value


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        # The hub client's error classes differ by version and by transport; each means: not to be had from here.
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {name!r}: not a directory here, and the hub did not deliver it{offline}: {reason[:200]}. "
            "Check the name, go online, or give a directory that holds the checkpoint."
        ) from error


def default_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that config.json declares; float32 where it declares none."""
    config = _read_json(checkpoint.path / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(dtype)
