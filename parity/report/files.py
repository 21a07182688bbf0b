"""A report as files: report.json, index.html, report.md and plots/. Each is there whole, or as it was before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parity.errors import UsageError
from parity.report import html, json, markdown
from parity.results import Comparison


def write_all(comparison: Comparison, folder: Path, *, plots: bool = True) -> dict[str, Path]:
    """Write the whole report; returns the paths by name. Pictures take longer than all the rest, and are optional.

    Raises UsageError where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures: dict[str, Path] = {}
        if plots:
            from parity.report import plots as draw

            pictures = draw.write(comparison, folder / "plots", whole)
        texts = {
            "report.json": json.dumps(comparison),
            "index.html": html.render(comparison),
            "report.md": markdown.render(comparison, pictures, folder),
        }
        for name, content in texts.items():
            with whole(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: the report cannot be written ({error.strerror}). Give another --out."
        ) from error
    return {name: folder / name for name in texts} | {f"plots/{name}": path for name, path in pictures.items()}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when all is written; whatever happens before, it goes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
