"""Expected texts kept as files: PARITY_BLESS=1 writes them anew, for a human to read in the diff."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def check(name: str, text: str) -> None:
    """The text is what tests/golden/NAME says."""
    path = FOLDER / name
    if os.environ.get("PARITY_BLESS") == "1":
        path.write_text(text, encoding="utf-8", newline="\n")
    assert path.is_file(), f"no {path.name}; PARITY_BLESS=1 writes it"
    assert text == path.read_text(encoding="utf-8"), f"not as in {path.name}; if that is meant, PARITY_BLESS=1"
