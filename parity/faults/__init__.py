"""The catalogue of known porting bugs: what diagnosis tries, what `parity faults` lists."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from parity.errors import UsageError
from parity.faults import (
    architecture,
    attention,
    bounds,
    cache,
    cache_rows,
    cache_seen,
    embedding_and_head,
    experts,
    flash,
    input_blocks,
    mask,
    mlp,
    norm,
    norm_precision,
    padding,
    positions,
    precision,
    qk_norm,
    residual,
    rope,
    rope_precision,
    rope_scaling,
    rope_tables,
    router,
    scans,
    softmax,
    weight_numbers,
    weights,
)
from parity.faults.fault import Fault, Number, Scope, shows_at
from parity.load_object import Kind, load

__all__ = [
    "CATALOGUE",
    "Fault",
    "Injection",
    "Number",
    "Scope",
    "by_id",
    "fault",
    "load_user_faults",
    "matching",
    "parse",
    "regimes",
    "shows_at",
]

CATALOGUE: tuple[Fault, ...] = (
    *rope.FAULTS,
    *rope_precision.FAULTS,
    *rope_scaling.FAULTS,
    *rope_tables.FAULTS,
    *positions.FAULTS,
    *qk_norm.FAULTS,
    *norm.FAULTS,
    *norm_precision.FAULTS,
    *attention.FAULTS,
    *softmax.FAULTS,
    *bounds.FAULTS,
    *cache.FAULTS,
    *cache_rows.FAULTS,
    *cache_seen.FAULTS,
    *flash.FAULTS,
    *mask.FAULTS,
    *padding.FAULTS,
    *mlp.FAULTS,
    *router.FAULTS,
    *experts.FAULTS,
    *scans.FAULTS,
    *architecture.FAULTS,
    *residual.FAULTS,
    *embedding_and_head.FAULTS,
    *weights.FAULTS,
    *weight_numbers.FAULTS,
    *precision.FAULTS,
    *input_blocks.FAULTS,
)

_USERS = Kind("faults", "tuple", "my_faults.py:FAULTS", UsageError)


def by_id(id: str, catalogue: Iterable[Fault] = CATALOGUE) -> Fault:
    """The fault of this id. Raises UsageError, naming the nearest ones."""
    known = {fault.id: fault for fault in catalogue}
    if id in known:
        return known[id]
    near = difflib.get_close_matches(id, known, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else "`parity faults` lists them."
    raise UsageError(f"no fault has the id {id!r}. {hint}")


def matching(word: str, catalogue: Iterable[Fault] = CATALOGUE) -> list[Fault]:
    """The fault of this id, or else those with the word in id, title or fix, in either case.

    Raises UsageError where there is none, naming the nearest ids.
    """
    known = list(catalogue)
    found = [fault for fault in known if fault.id == word]
    found = found or [f for f in known if word.lower() in f"{f.id}\n{f.title}\n{f.fix}".lower()]
    return found or [by_id(word, known)]


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
        raise UsageError(f"--inject {text!r}: {match[2]!r} is not a number.") from error
    return Injection(fault, value, int(match[3]) if match[3] else None)


def regimes(text: str, catalogue: Iterable[Fault] = CATALOGUE) -> tuple[Fault, ...]:
    """The regimes that `--accept ID,ID` names. Raises UsageError for one that is unknown, or is a bug and no regime."""
    known = list(catalogue)
    found = tuple(by_id(id.strip(), known) for id in text.split(",") if id.strip())
    for fault in found:
        if not fault.regime:
            others = ", ".join(one.id for one in known if one.regime)
            raise UsageError(f"--accept {fault.id}: that is a bug, no precision regime. Regimes are {others}.")
    return found


def load_user_faults(spec: str) -> tuple[Fault, ...]:
    """Faults that a user has written: `module:name` or `file.py:name`, where the name is of a tuple or list of Fault.

    Raises UsageError when they cannot be imported, are not faults, or bear an id that is already taken.
    """
    found = load(spec, _USERS)
    if not isinstance(found, (tuple, list)):
        raise UsageError(f"faults {spec!r}: found {type(found).__name__}, expected a tuple of parity.faults.Fault.")
    for number, fault in enumerate(found):
        if not isinstance(fault, Fault):
            raise UsageError(f"faults {spec!r}: found {type(fault).__name__} at [{number}], expected a Fault.")
    _check_ids(spec, [fault.id for fault in found])
    return tuple(found)


def _check_ids(spec: str, ids: list[str]) -> None:
    taken = {fault.id for fault in CATALOGUE}
    for id in ids:
        if id in taken:
            raise UsageError(f"faults {spec!r}: the id {id!r} is already taken. Give the fault another one.")
        taken.add(id)
