"""What a SPEC of `--weights` means: a candidate's own numbers, in the file that its runtime reads."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from parity.errors import ModelError, UsageError
from parity.reference.checkpoint import Weights

OWN = "checkpoint"  # the SPEC of the model's own weights
# kind:PATH in a SPEC → a class that is made of the path, and of what follows a "?".
KINDS: dict[str, str] = {
    "gguf": "parity.reference.gguf_weights:GgufWeights",
    "mlx": "parity.reference.mlx_weights:MlxWeights",
    "onnx": "parity.reference.onnx_weights:OnnxWeights",
}


def check_weights(spec: str) -> None:
    """Raise UsageError for a SPEC of no known kind, and ModelError where there is no such file."""
    kind, path, _ = _parts(spec)
    if kind not in KINDS or not str(path):
        known = ", ".join(f"{kind}:PATH" for kind in KINDS)
        raise UsageError(f"--weights {spec!r:.60}: write one of {known}, or {OWN} for those of the model.")
    if not path.exists():
        raise ModelError(f"weights {spec}: no such file. Give its path from {Path.cwd()}.")


def open_weights(spec: str | None) -> Weights | None:
    """The weights that a SPEC means; None where these are the model's. Raises UsageError and ModelError."""
    if spec in (None, OWN):
        return None
    check_weights(str(spec))
    kind, path, names_from = _parts(str(spec))
    module, _, name = KINDS[kind].partition(":")
    made = getattr(import_module(module), name)
    opened: Weights = made(path, Path(names_from)) if names_from else made(path)
    return opened


def _parts(spec: str) -> tuple[str, Path, str]:
    """Kind and path, and the file that `onnx:FILE?names_from=FILE` names."""
    kind, _, rest = spec.partition(":")
    if kind != "onnx":
        return kind, Path(rest), ""
    path, _, names_from = rest.partition("?names_from=")
    return kind, Path(path), names_from
