"""Dataclasses as JSON values and back, every key checked on the way."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

# No text in a report is longer: a prompt of a million tokens.
_LONGEST = 1 << 22
_SHOWN = 40
_WORDS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


class MalformedError(Exception):
    """A value is not of the type that its key has; the message names the key."""


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
            from_json(str, name, key): from_json(arguments[1], v, f"{key}[{shown(name)}]") for name, v in items.items()
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
        raise MalformedError(f"{key} is {shown(value)}, not one of {', '.join(choices)}")
    return value


def _simple(kind: Any, value: Any, key: str) -> Any:
    if kind is float:
        number = _WORDS.get(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise MalformedError(f"{key} is {shown(value)}, not a number")
        try:
            return float(number)
        except OverflowError as error:
            raise MalformedError(f"{key} is a number too large") from error
    if kind is int and isinstance(value, bool):
        raise MalformedError(f"{key} is {shown(value)}, not a whole number")
    found = _expect(kind, value, key, {int: "a whole number", bool: "true or false", str: "a text"}[kind])
    if kind is str and len(found) > _LONGEST:
        raise MalformedError(f"{key} is a text of {len(found)} characters, more than {_LONGEST}")
    return found


def _expect(kind: Any, value: Any, key: str, called: str) -> Any:
    if not isinstance(value, kind):
        raise MalformedError(f"{key} is {shown(value)}, not {called}")
    return value


def shown(value: Any) -> str:
    """A value in a message: short, on one line, and harmless to a terminal."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**_SHOWN else "a very large number"
    shown = ascii(value)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"
