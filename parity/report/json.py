"""report.json: a Comparison on disk, schema 2. Reports of schema 1 are read too (parity.report.schema1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parity.errors import UsageError
from parity.json_values import MalformedError, from_json, shown, to_json
from parity.report import schema1
from parity.results import SCHEMA, Comparison
from parity.untrusted import parse_json, what_is_no_file

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
            f"{path}: schema {shown(schema)} found, this parity reads schemas 1 to {SCHEMA}. Run `parity diff` again."
        )
    try:
        comparison: Comparison = from_json(Comparison, schema1.upgraded(raw) if schema == 1 else raw)
    except MalformedError as error:
        raise UsageError(f"{path}: claims to be a report, but {error}. Run `parity diff` again.") from error
    return comparison
