"""The catalogue of known porting bugs: what diagnosis tries, what `parity faults` lists."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from parity.errors import UsageError
from parity.faults import (
    attention,
    ends,
    mask,
    mlp,
    norm,
    positions,
    precision,
    qk_norm,
    residual,
    rope,
    softmax,
    weights,
)
from parity.faults.fault import Fault, Number, Scope
from parity.faults.parts import shows_at

__all__ = ["CATALOGUE", "Fault", "Injection", "Number", "Scope", "by_id", "load_user_faults", "parse", "shows_at"]

CATALOGUE: tuple[Fault, ...] = (
    *rope.FAULTS,
    *positions.FAULTS,
    *qk_norm.FAULTS,
    *norm.FAULTS,
    *attention.FAULTS,
    *softmax.FAULTS,
    *mask.FAULTS,
    *mlp.FAULTS,
    *residual.FAULTS,
    *ends.FAULTS,
    *weights.FAULTS,
    *precision.FAULTS,
)


def by_id(id: str, catalogue: Iterable[Fault] = CATALOGUE) -> Fault:
    """The fault of this id. Raises UsageError, naming the nearest ones."""
    known = {fault.id: fault for fault in catalogue}
    if id in known:
        return known[id]
    near = difflib.get_close_matches(id, known, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else "`parity faults` lists them."
    raise UsageError(f"no fault has the id {id!r}. {hint}")


@dataclass(frozen=True)
class Injection:
    """A fault to plant: with which number, and in which layer (None: in all)."""

    fault: Fault
    value: float
    layer: int | None

    def __str__(self) -> str:
        number = f"={self.value:g}" if self.fault.number else ""
        return f"{self.fault.id}{number}{'' if self.layer is None else f'@{self.layer}'}"


def parse(text: str, catalogue: Iterable[Fault] = CATALOGUE) -> Injection:
    """What `--inject FAULT[=NUMBER][@LAYER]` asks for. Raises UsageError."""
    match = re.fullmatch(r"([^=@]+)(?:=([^@]+))?(?:@(\d+))?", text)
    if not match:
        raise UsageError(f"--inject {text!r}: write FAULT, FAULT@LAYER or FAULT=NUMBER@LAYER.")
    fault = by_id(match[1], catalogue)
    typical = fault.number.typical[0] if fault.number else 0.0
    try:
        value = float(match[2]) if match[2] else typical
    except ValueError as error:
        raise UsageError(f"--inject {text!r}: {match[2]!r} is no number.") from error
    return Injection(fault, value, int(match[3]) if match[3] else None)


def load_user_faults(spec: str) -> tuple[Fault, ...]:
    """Faults that a user has written: `module:NAME` or `file.py:NAME`, where NAME is an iterable of Fault.

    Raises UsageError when they cannot be imported, are no faults, or bear an id that is already taken.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise UsageError(f"faults {spec!r}: write module:NAME or file.py:NAME, for example my_faults.py:FAULTS.")
    module = _from_file(spec, Path(where)) if where.endswith(".py") else _from_name(spec, where)
    found = getattr(module, name, None)
    if not isinstance(found, (tuple, list)) or not all(isinstance(fault, Fault) for fault in found):
        kind = "is missing" if found is None else f"is {type(found).__name__}, not a tuple of parity.faults.Fault"
        raise UsageError(f"faults {spec!r}: {name} {kind} in {where}.")
    _check_ids(spec, [fault.id for fault in found])
    return tuple(found)


def _check_ids(spec: str, ids: list[str]) -> None:
    taken = {fault.id for fault in CATALOGUE}
    for id in ids:
        if id in taken:
            raise UsageError(f"faults {spec!r}: the id {id!r} is already taken. Give the fault another one.")
        taken.add(id)


def _from_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"faults {spec!r}: no file {path}. Give its path from {Path.cwd()}.")
    description = importlib.util.spec_from_file_location(path.stem, path)
    assert description, "unreachable because the suffix is .py"
    assert description.loader, "unreachable for the same reason"
    module = importlib.util.module_from_spec(description)
    try:
        description.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"faults {spec!r}: importing {path} failed with {_describe(error)}.") from error
    return module


def _from_name(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UsageError(f"faults {spec!r}: importing {name} failed with {_describe(error)}.") from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
