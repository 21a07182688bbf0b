"""Files that are whole or absent, and one-line reasons where one cannot be read or written."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

from parity.errors import DumpError


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """Give a temporary name in the same directory; rename it if the block succeeds, remove it if not.

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
    """Turn what the operating system refuses (disk full, no permission) into a DumpError; let Ctrl-C wait."""
    try:
        with _uninterrupted():
            yield
    except (OSError, RuntimeError) as error:  # h5py raises both
        raise DumpError(f"{path}: cannot be written — {_reason(error)} — check its directory and disk") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into a DumpError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise DumpError(f"{path}: cannot be read — {_reason(error)} — check its permissions and disk") from error


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end of the block only: HDF5 cannot close a file whose opening was cut short."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):  # nothing interrupts us
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *signalled: pending.append(signalled))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pending:
            handler(*pending[0])


class Outlet(io.FileIO):
    """A file that never refuses to be written: it keeps the first error, and drops what comes after.

    HDF5 loses an error that meets it while it closes a dataset, and crashes when it then closes the file.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of the data at the current place."""
        rest = memoryview(data)
        size = len(rest)
        try:
            while rest and self.error is None:  # the system may take less than it is offered
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None, /) -> int:
        """Cut the file, or extend it, to a size."""
        try:
            return super().truncate(size) if self.error is None else 0
        except OSError as error:
            self.error = error
            return 0

    def check(self) -> None:
        """Raise the first error."""
        if self.error is not None:
            raise self.error


def require_file(path: Path) -> None:
    """Raise DumpError unless `path` is a file with something in it."""
    with reading(path):
        if not path.exists():
            raise DumpError(f"{path}: does not exist — no such file — check the name, or record the run first")
        if path.is_dir():
            raise DumpError(f"{path}: is a directory — expected a file — name the dump inside it")
        if path.stat().st_size == 0:
            raise DumpError(f"{path}: is an empty file — 0 bytes — record the run again")


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file, read-only and not yet in memory. Views of them keep the file mapped."""
    with reading(path):
        return np.asarray(np.memmap(path, np.uint8, mode="r"))  # slicing the memmap itself is slow


def _reason(error: OSError | RuntimeError) -> str:
    """Why, in one line: libraries put whole paragraphs into an error."""
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
