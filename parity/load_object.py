"""Somebody else's Python by SPEC: `module:name`, or `file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from parity.errors import ParityError


@dataclass(frozen=True)
class Kind:
    """What is imported and how its errors say so.

    word     what the SPEC stands for, for example `candidate`
    thing    what it names, for example `function`
    example  a SPEC to show
    error    what is raised
    """

    word: str
    thing: str
    example: str
    error: type[ParityError]


def load(spec: str, kind: Kind) -> Any:
    """What a SPEC names.

    Raises the kind's error in one line, saying whether it is the file, the module or the name that is missing,
    or what went wrong inside of it.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise kind.error(
            f"{kind.word} {spec!r}: write module:{kind.thing} or file.py:{kind.thing}, for example {kind.example}."
        )
    # Whatever a module prints, standard output belongs to the report.
    with redirect_stdout(sys.stderr):
        module = _from_file(spec, Path(where), kind) if where.endswith(".py") else _from_name(spec, where, kind)
    if not hasattr(module, name):
        offered = ", ".join(_own_names(module)) or "nothing"
        raise kind.error(f"{kind.word} {spec!r}: {where} has no {kind.thing} {name!r} (it has: {offered[:200]}).")
    return getattr(module, name)


def _from_file(spec: str, path: Path, kind: Kind) -> ModuleType:
    if not path.is_file():
        raise kind.error(f"{kind.word} {spec!r}: no file {path}. Give its path from {Path.cwd()}.")
    # Under a name of its own: a port may well be called json.py.
    name = f"parity_{kind.word}_{path.stem}"
    description = importlib.util.spec_from_file_location(name, path)
    assert description, "unreachable because the suffix is .py"
    assert description.loader, "unreachable for the same reason"
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module
    # A port usually imports its own neighbours.
    neighbours = str(path.parent.resolve())
    sys.path.insert(0, neighbours)
    try:
        description.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise kind.error(f"{kind.word} {spec!r}: importing {path} failed with {describe(error)}") from error
    finally:
        sys.path.remove(neighbours)
    return module


def _from_name(spec: str, name: str, kind: Kind) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            text = f"no module {error.name!r}. Install it, or give file.py:{kind.thing}."
        else:
            text = f"importing {name} failed with {describe(error)}"
        raise kind.error(f"{kind.word} {spec!r}: {text}") from error


def _own_names(module: ModuleType) -> list[str]:
    """The public names that a module does not have from elsewhere."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and getattr(value, "__module__", module.__name__) == module.__name__
    ]


def describe(error: BaseException) -> str:
    """An error of somebody else's code in one line, with the last place of it that is neither ours nor a library's."""
    place = ""
    if error.__traceback__ is not None and not isinstance(error, SyntaxError):  # whose text says where
        frames = traceback.extract_tb(error.__traceback__)
        last = next((frame for frame in reversed(frames) if _is_users(frame.filename)), frames[-1])
        place = f" ({Path(last.filename).name}:{last.lineno})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{place}" if text else f"{type(error).__name__}{place}"


_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_OURS = str(Path(__file__).parent) + os.sep


def _is_users(file: str) -> bool:
    return not file.startswith((*_LIBRARIES, _OURS, "<"))


def misfit(function: Callable[..., Any], *arguments: str) -> str:
    """Why a function cannot be called with arguments of these names, in order; empty if it can, or nobody knows."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # not every function in C says
        return ""
    try:
        signature.bind(*arguments)
    except TypeError as error:
        return f"it takes {signature}, and is called with ({', '.join(arguments)}): {error}"
    return ""
