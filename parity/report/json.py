"""report.json: a Comparison on disk, schema 2. Reports of schema 1 are read too (parity.report.schema1)."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from parity.errors import UsageError
from parity.report import schema1
from parity.results import SCHEMA, Comparison
from parity.untrusted import parse_json, what_is_no_file

# No text in a report is longer: a prompt of a million tokens.
_LONGEST = 1 << 22
_SHOWN = 40
_WORDS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


class MalformedError(Exception):
    """A value is not of the type that its key has; the message names the key."""


def dumps(comparison: Comparison) -> str:
    """The Comparison as JSON text, one line for each site; the same Comparison gives the same bytes."""
    items = (f" {_encode(key)}: {_lines(value)}" for key, value in to_json(comparison).items())
    return "{\n" + ",\n".join(items) + "\n}\n"


def _lines(value: Any) -> str:
    """JSON of a value, a list with one line for each item."""
    if not isinstance(value, list) or not value:
        return _encode(value)
    return "[\n" + ",\n".join(f"  {_encode(item)}" for item in value) + "\n ]"


def load(path: Path) -> Comparison:
    """Read report.json. Raises UsageError if it is missing, no report, of another schema or damaged."""
    odd = what_is_no_file(path)
    if odd:
        raise UsageError(f"{path}: not a report.json but {odd}. Give the file that `parity diff --out DIR` wrote.")
    try:
        raw = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{path}: not a report.json ({reason}). Give the file that `parity diff --out DIR` wrote."
        ) from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if isinstance(schema, bool) or schema not in (1, SCHEMA):
        raise UsageError(
            f"{path}: schema {_shown(schema)} found, this parity reads schemas 1 to {SCHEMA}. Run `parity diff` again."
        )
    try:
        comparison: Comparison = from_json(Comparison, schema1.upgraded(raw) if schema == 1 else raw)
    except MalformedError as error:
        raise UsageError(f"{path}: claims to be a report, but {error}. Run `parity diff` again.") from error
    return comparison


# -- values ---------------------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """Dataclasses as JSON values. Numbers that JSON lacks become the strings "inf", "-inf" and "nan"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def from_json(kind: Any, value: Any, key: str = "the report") -> Any:
    """The inverse of `to_json` for a dataclass, or for anything its fields are made of.

    Keys that are not known are ignored. Raises MalformedError where a value is not of the `kind`, or is missing;
    `key` is how the message names the value.
    """
    if dataclasses.is_dataclass(kind):
        return _object(kind, _expect(dict, value, key, "an object"), key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else from_json(next(a for a in arguments if a is not type(None)), value, key)
    if origin is typing.Literal:
        return _choice(arguments, value, key)
    if origin is tuple:
        items = _expect(list, value, key, "a list")
        return tuple(from_json(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        items = _expect(dict, value, key, "an object")
        return {
            from_json(str, name, key): from_json(arguments[1], v, f"{key}[{_shown(name)}]") for name, v in items.items()
        }
    return _simple(kind, value, key)


def _object(kind: Any, value: dict[str, Any], key: str) -> Any:
    hints = _hints(kind)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        inner = field.name if key == "the report" else f"{key}.{field.name}"
        if field.name in value:
            given[field.name] = from_json(hints[field.name], value[field.name], inner)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise MalformedError(f"{inner} is missing")
    return kind(**given)


_cached: dict[Any, dict[str, Any]] = {}


def _hints(kind: Any) -> dict[str, Any]:
    if kind not in _cached:
        _cached[kind] = typing.get_type_hints(kind)
    return _cached[kind]


def _choice(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise MalformedError(f"{key} is {_shown(value)}, not one of {', '.join(choices)}")
    return value


def _simple(kind: Any, value: Any, key: str) -> Any:
    if kind is float:
        number = _WORDS.get(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise MalformedError(f"{key} is {_shown(value)}, not a number")
        try:
            return float(number)
        except OverflowError as error:
            raise MalformedError(f"{key} is a number too large") from error
    if kind is int and isinstance(value, bool):
        raise MalformedError(f"{key} is {_shown(value)}, not a whole number")
    found = _expect(kind, value, key, {int: "a whole number", bool: "true or false", str: "a text"}[kind])
    if kind is str and len(found) > _LONGEST:
        raise MalformedError(f"{key} is a text of {len(found)} characters, more than {_LONGEST}")
    return found


def _expect(kind: Any, value: Any, key: str, called: str) -> Any:
    if not isinstance(value, kind):
        raise MalformedError(f"{key} is {_shown(value)}, not {called}")
    return value


def _shown(value: Any) -> str:
    """A value in a message: short, on one line, and harmless to a terminal."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**_SHOWN else "a very large number"
    shown = ascii(value)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"
