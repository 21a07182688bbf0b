"""Files that are whole or absent, and one-line reasons where one cannot be read or written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parity.errors import DumpError


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """Give a temporary name in the same directory; rename it to `path` if the block succeeds, remove it if not.

    A killed process leaves at most the temporary file, whose name says what it is.
    """
    if path.is_dir():
        raise DumpError(f"{path}: cannot be written — it is a directory — give the name of a file in it")
    if not path.parent.is_dir():
        raise DumpError(f"{path}: cannot be written — there is no directory {path.parent} — create it first")
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield temporary
        with writing(path):
            os.replace(temporary, path)
    except BaseException:  # KeyboardInterrupt too must leave nothing that looks whole
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses (disk full, no permission) into a DumpError."""
    try:
        yield
    except OSError as error:
        raise DumpError(f"{path}: cannot be written — {_reason(error)} — check its directory and the disk") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into a DumpError."""
    try:
        yield
    except OSError as error:
        raise DumpError(f"{path}: cannot be read — {_reason(error)} — check the file and its permissions") from error


def require_file(path: Path) -> None:
    """Raise DumpError unless `path` is a file with something in it."""
    with reading(path):
        if not path.exists():
            raise DumpError(f"{path}: there is no such file — check the name, or record the run first")
        if path.is_dir():
            raise DumpError(f"{path}: is a directory — expected a file — name the dump inside it")
        if path.stat().st_size == 0:
            raise DumpError(f"{path}: is an empty file — 0 bytes — record the run again")


def _reason(error: OSError) -> str:
    """Why, in one line: libraries put whole paragraphs into an OSError."""
    lines = str(error.strerror or error).splitlines()
    return lines[0] if lines else type(error).__name__
