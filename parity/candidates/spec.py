"""What `--candidate SPEC` may mean: a factory in a module or file, or a dump."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from parity.errors import CandidateError
from parity.load_object import Kind, load

Factory = Callable[..., Any]

_FACTORY = Kind("candidate", "function", "impl.qwen3:load or my_port.py:load", CandidateError)


def load_factory(spec: str) -> Factory:
    """The factory `load(model_dir, dtype, device) -> nn.Module` that `module:name` or `file.py:name` names.

    Raises CandidateError, saying whether it is the file, the module or the name that is missing.
    """
    factory = load(spec, _FACTORY)
    if not callable(factory):
        raise CandidateError(f"candidate {spec!r}: found {type(factory).__name__}, expected a function.")
    found: Factory = factory
    return found


def is_dump(spec: str) -> bool:
    """Whether a candidate SPEC names a dump rather than a factory."""
    path = Path(spec)
    return path.is_dir() or path.suffix in (".h5", ".hdf5", ".safetensors", ".npz")
