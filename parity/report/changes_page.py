"""What changed between two reports, as one HTML file that needs no network."""

from __future__ import annotations

from pathlib import Path

from parity.errors import UsageError
from parity.report.changes import KINDS, Changes, Kind
from parity.report.files import whole
from parity.report.html import page
from parity.results import Comparison

_MEANINGS: dict[Kind, str] = {
    "new": "New: right before, wrong now",
    "worse": "Worse",
    "lost": "No longer measured",
    "fixed": "Fixed: wrong before, right now",
    "better": "Better",
}


def write_changes(sides: tuple[Comparison, Comparison], found: Changes, folder: Path) -> Path:
    """Write index.html into a folder; returns its path. Raises UsageError where that cannot be."""
    path = folder / "index.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            temporary.write_text(render_changes(sides, found), encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}). Give another --out.") from error
    return path


def render_changes(sides: tuple[Comparison, Comparison], found: Changes) -> str:
    """The page. The same reports give the same bytes."""
    counts = ", ".join(f"{len(found.of(kind))} {kind}" for kind in KINDS if found.of(kind)) or "no operation changed"
    return page(
        "changes.html.j2",
        found=found,
        sides=sides,
        kinds=KINDS,
        meanings=_MEANINGS,
        counts=counts,
        headline=f"{found.verdicts[0]} → {found.verdicts[1]}: {counts}",
    )
