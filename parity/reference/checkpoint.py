"""Where the reference's weights are: a directory with config.json and safetensors, or a hub id."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from parity.errors import ModelError
from parity.untrusted import parse_json, what_is_no_file

EMBEDDED = "tiny-qwen3"
_EMBEDDED_DIR = Path(__file__).parent.parent / "models" / EMBEDDED
_LONGEST_JSON = 1 << 27  # bytes: the index of the largest models has a tenth


class Weights(Protocol):
    """Numbers for a model from elsewhere: a quantized file, read back to float32 one tensor at a time."""

    name: str
    are_all: bool
    """Whether every tensor of the model must be among them."""

    def tensor(self, name: str) -> Any:
        """A tensor by its name in transformers, in float32; None if there is none."""
        ...

    def format(self, name: str) -> str:
        """The format in which it is kept; empty if there is none."""
        ...

    def grid(self, name: str) -> Any:
        """What a quantized format keeps of it (parity.reference.grids.Grid); None for another, or an unknown one."""
        ...

    def as_kept(self, name: str, stored: Any) -> Any:
        """The checkpoint's own numbers as this tensor would have them; None where it is quantized."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: `name` as the user gave it, `path` the directory, `files` its safetensors.

    `trust_remote_code` lets transformers run Python that the checkpoint brings along. Numbers that `weights` have take
    the place of its own.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    trust_remote_code: bool = False
    weights: Weights | None = None

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(file.stat().st_size for file in self.files)

    def open(self, stack: ExitStack, wanted: Callable[[str], bool] = lambda _key: True) -> list[Any]:
        """Its safetensors files that hold a wanted key, opened until the stack is closed.

        Only these are mapped into memory. Raises ModelError if one is damaged.
        """
        from safetensors import SafetensorError, safe_open

        places = _weight_map(self.path)
        needed = {name for key, name in places.items() if wanted(key)}
        shards = []
        for file in self.files:
            if places and file.name not in needed:
                continue
            try:
                shards.append(stack.enter_context(safe_open(file, framework="pt")))
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"model {self.name!r}: {file} is not a complete safetensors file ({error}). Download it again."
                ) from error
        return shards

    def tensor(self, name: str) -> Any:
        """One tensor by name, of the `weights` where they have it. Raises KeyError if there is none of that name."""
        other = None if self.weights is None else self.weights.tensor(name)
        if other is not None:
            return other
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
                digest.update(stream.read(min(header, _LONGEST_JSON) + 65536))
        return digest.hexdigest()[:16]

    def config(self) -> dict[str, Any]:
        """What config.json says. Raises ModelError."""
        return _read_json(self.path / "config.json")


def find(name: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint that `name` means: the embedded model, a directory, or a hub id.

    Raises ModelError, saying what was looked for where.
    """
    if name == EMBEDDED:
        return _open(name, _EMBEDDED_DIR, False)
    if Path(name).expanduser().is_dir():
        return _open(name, Path(name).expanduser(), trust_remote_code)
    if not looks_like_hub_id(name):
        raise ModelError(
            f"model {name!r}: no such directory. Give a directory with config.json and *.safetensors, "
            f"a hub id such as Qwen/Qwen3-0.6B, or leave it out for the embedded {EMBEDDED}."
        )
    return _open(name, _download(name), trust_remote_code)


def looks_like_hub_id(name: str) -> bool:
    """Whether a model's name that is not a directory can only mean `owner/name` on the hub."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def _open(name: str, path: Path, trust_remote_code: bool) -> Checkpoint:
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise ModelError(f"model {name!r}: no config.json in {path} (found: {found}). Is it a Hugging Face checkpoint?")
    # Libraries open any of the files, and would wait at a FIFO for ever.
    for file in sorted(path.iterdir()):
        if (what := what_is_no_file(file)) not in ("", "a directory"):
            raise ModelError(f"model {name!r}: {file.name} in {path} is {what}, no file. Remove it.")
    _refuse_quantized(name, _read_json(path / "config.json"))
    names = sorted(set(_weight_map(path).values())) or sorted(p.name for p in path.glob("*.safetensors"))
    missing = [shard for shard in names if not (path / shard).is_file()]
    if missing or not names:
        what = f"{missing[0]} is missing" if missing else "no *.safetensors"
        raise ModelError(
            f"model {name!r}: {what} in {path}. parity reads safetensors; convert or complete the download."
        )
    return Checkpoint(name, path, tuple(path / shard for shard in names), trust_remote_code)


def _weight_map(path: Path) -> dict[str, str]:
    """Which file of a checkpoint in several holds which tensor; empty for a checkpoint in one."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    places = _read_json(index).get("weight_map", {})
    if not isinstance(places, dict):
        raise ModelError(f"{index}: weight_map is {places!r:.60}, expected a table. Download the checkpoint again.")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index}: names the file {name!r:.60}, which is not in its directory. Correct it.")
    return places


def _refuse_quantized(name: str, config: dict[str, Any]) -> None:
    """Quantized weights need code of their own; read as they are they would be other numbers."""
    for table in (config, config.get("text_config")):
        found = table.get("quantization_config") if isinstance(table, dict) else None
        if found:
            method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
            raise ModelError(
                f"model {name!r}: its weights are quantized (quant_method {method!r:.40}), which parity does not read. "
                "Give the checkpoint that they were made from."
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > _LONGEST_JSON:
            raise ModelError(f"{path}: {size} bytes long, which no such file is. Download the checkpoint again.")
        value = parse_json(path.read_text(encoding="utf-8"), unique=False)  # published ones repeat keys
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
        # The hub client's error classes differ by version and by transport; each means that it is not available here.
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelError(
            f"model {name!r}: not a directory here, and the hub did not deliver it{offline}: {first_sentence(error)}. "
            "Check the name, go online, or give a directory that holds the checkpoint."
        ) from error


def first_sentence(error: Exception) -> str:
    """What a library says of an error, up to the end of a sentence: it is followed by advice for its own users."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= _LONGEST_REASON:
        return text.rstrip(".")
    sentence = re.split(r"(?<=[.!?]) ", text, maxsplit=1)[0]
    return (
        sentence.rstrip(".") if len(sentence) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON].rpartition(' ')[0]} …"
    )


_LONGEST_REASON = 240  # characters


def foreign_code(checkpoint: Checkpoint, error: Exception) -> str:
    """What to say of an error that came from not running the checkpoint's own Python; empty for any other error."""
    if checkpoint.trust_remote_code or "trust_remote_code" not in str(error):
        return ""
    return "it wants Python code that the checkpoint brings along (auto_map). Give --trust-remote-code if you trust it"


def default_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that config.json declares; float32 where it declares none."""
    config = checkpoint.config()
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(dtype)
