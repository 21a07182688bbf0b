"""A report as files: report.json, index.html, report.md and plots/."""

from __future__ import annotations

from pathlib import Path

from parity.report import html, json, markdown
from parity.results import Comparison


def write_all(comparison: Comparison, folder: Path, *, plots: bool = True) -> dict[str, Path]:
    """Write the whole report; returns the paths by name. Pictures take longer than all the rest, and are optional."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Path] = {}
    if plots:
        from parity.report import plots as draw

        pictures = draw.write(comparison, folder / "plots")
    texts = {
        "report.json": json.dumps(comparison),
        "index.html": html.render(comparison),
        "report.md": markdown.render(comparison, pictures, folder),
    }
    written = {}
    for name, content in texts.items():
        written[name] = folder / name
        written[name].write_text(content, encoding="utf-8", newline="\n")
    return written | {f"plots/{name}": path for name, path in pictures.items()}
