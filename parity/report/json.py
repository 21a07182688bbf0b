"""report.json: a Comparison on disk, schema 1."""

from __future__ import annotations

import json
import re
from pathlib import Path

from parity.errors import UsageError
from parity.results import SCHEMA, Comparison, from_json, to_json

# A list of numbers over many lines. No string can look so: a line break in it would be escaped.
_NUMBERS = re.compile(r"\[\n[-+.0-9eE,\n ]+\]")


def dumps(comparison: Comparison) -> str:
    """The Comparison as JSON text; the same Comparison gives the same bytes."""
    text = json.dumps(to_json(comparison), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return _NUMBERS.sub(lambda found: re.sub(r"\n *", "", found[0]), text)


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
