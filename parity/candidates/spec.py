"""What `--candidate SPEC` may mean: a factory in a module or file, or a dump."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from parity.errors import CandidateError

Factory = Callable[..., Any]


def load_factory(spec: str) -> Factory:
    """The factory `load(model_dir, dtype, device) -> nn.Module` that `module:name` or `file.py:name` names.

    Raises CandidateError, saying whether it is the file, the module or the name that is missing.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise CandidateError(
            f"candidate {spec!r}: a factory is written module:function or file.py:function, "
            "for example impl.qwen3:load or my_port.py:load."
        )
    module = _from_file(spec, Path(where)) if where.endswith(".py") else _from_name(spec, where)
    factory = getattr(module, name, None)
    if not callable(factory):
        offered = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
        raise CandidateError(f"candidate {spec!r}: {where} has no function {name!r} (it has: {offered[:200]}).")
    found: Factory = factory
    return found


def _from_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise CandidateError(f"candidate {spec!r}: no file {path}. Give its path from {Path.cwd()}.")
    description = importlib.util.spec_from_file_location(f"parity_candidate_{path.stem}", path)
    assert description, "unreachable because the suffix is .py"
    assert description.loader, "unreachable for the same reason"
    module = importlib.util.module_from_spec(description)
    # Under a name of its own: a port may well be called json.py.
    sys.modules[f"parity_candidate_{path.stem}"] = module
    # A port usually imports its own neighbours.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        description.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise CandidateError(f"candidate {spec!r}: importing {path} failed with {describe(error)}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _from_name(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise CandidateError(
            f"candidate {spec!r}: no module {error.name!r}. Install it, or give file.py:function."
        ) from error
    except (Exception, SystemExit) as error:
        raise CandidateError(f"candidate {spec!r}: importing {name} failed with {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An error of somebody else's code in one line, with the place where it happened."""
    place = ""
    if error.__traceback__ is not None:
        last = error.__traceback__
        while last.tb_next is not None:
            last = last.tb_next
        place = f" ({Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{place}" if text else f"{type(error).__name__}{place}"


def is_dump(spec: str) -> bool:
    """Whether a candidate SPEC names a dump rather than a factory."""
    path = Path(spec)
    return path.is_dir() or path.suffix in (".h5", ".hdf5", ".safetensors", ".npz")
