"""report.json: a Comparison on disk, schema 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parity.errors import UsageError
from parity.results import SCHEMA, Comparison, from_json, to_json

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


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
    """Read report.json. Raises UsageError if it is missing, no report or of another schema."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: not a report.json ({error}). Give the file that `parity diff --out DIR` wrote."
        ) from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise UsageError(
            f"{path}: schema {schema!r} found, this parity reads schema {SCHEMA}. Run `parity diff` again."
        )
    try:
        comparison: Comparison = from_json(Comparison, raw)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: claims to be a report but is not whole ({error}). Run `parity diff` again."
        ) from error
    return comparison
