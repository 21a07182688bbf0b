"""A report as files: report.json, index.html, report.md and plots/. Each is there whole, or as it was before."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from parity.errors import UsageError
from parity.reasons import Trouble
from parity.report import html, json, markdown
from parity.results import Comparison
from parity.troubles import surviving


@dataclass(frozen=True)
class Written:
    """What was written, by name; and the Comparison with what failed in writing it, which every file says."""

    paths: dict[str, Path]
    comparison: Comparison


def write_all(comparison: Comparison, folder: Path, *, plots: bool = True) -> Written:
    """Write the whole report. Pictures take longer than all the rest, and are optional.

    What cannot be drawn or rendered is left out, and is one of the Comparison's troubles. Raises UsageError where the
    folder cannot be written.
    """
    with _refused(folder):
        folder.mkdir(parents=True, exist_ok=True)
        comparison, pictures = _drawn(comparison, folder / "plots") if plots else (comparison, {})
    comparison, texts = _rendered(comparison, pictures, folder)
    write_texts(folder, texts)
    paths = {name: folder / name for name in texts} | {f"plots/{name}": path for name, path in pictures.items()}
    return Written(paths, comparison)


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write texts by file name into a folder, each whole or not at all. Raises UsageError."""
    with _refused(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in texts.items():
            with whole(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8", newline="\n")


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: the report cannot be written ({error.strerror}). Give another --out."
        ) from error


def _drawn(comparison: Comparison, folder: Path) -> tuple[Comparison, dict[str, Path]]:
    """Draw the pictures; none if one of them fails."""
    troubles: list[Trouble] = []
    pictures: dict[str, Path] = {}
    with surviving(troubles, "pictures"):
        from parity.report import plots

        pictures = plots.write(comparison, folder, whole)
    return _with(comparison, troubles), pictures


def _rendered(comparison: Comparison, pictures: Mapping[str, Path], folder: Path) -> tuple[Comparison, dict[str, str]]:
    """The texts by file name. Where one fails the others are rendered once more, to say so."""
    texts: dict[str, str] = {}
    troubles: list[Trouble] = []
    with surviving(troubles, "page"):
        texts["index.html"] = html.render(comparison)
    with surviving(troubles, "markdown"):
        texts["report.md"] = markdown.render(comparison, pictures, folder)
    told = _with(comparison, troubles)
    if troubles and "index.html" in texts:
        texts["index.html"] = html.render(told)
    if troubles and "report.md" in texts:
        texts["report.md"] = markdown.render(told, pictures, folder)
    return told, {"report.json": json.dumps(told)} | texts


def _with(comparison: Comparison, troubles: Sequence[Trouble]) -> Comparison:
    return replace(comparison, troubles=(*comparison.troubles, *troubles)) if troubles else comparison


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when all is written; whatever happens before, it goes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
