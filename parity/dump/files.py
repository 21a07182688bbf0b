"""Files that are whole or absent, and one-line reasons where one cannot be read or written."""

from __future__ import annotations

import io
import mmap
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

from parity.errors import DumpError
from parity.untrusted import require_content

_HOST = f"@{socket.gethostname()}"  # others, on a shared disk, have processes of their own

UNQUESTIONED = 1 << 26  # bytes that an array may need however few are stored
MOST_COMPRESSED = 100  # times


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """Give a temporary name in the same directory; rename it if the block succeeds, remove it if not.

    A killed process leaves at most the temporary file, whose name says what it is; the next one removes it.
    """
    if path.is_dir():
        raise DumpError(f"{path}: cannot be written — it is a directory — give the name of a file in it")
    if not path.parent.is_dir():
        raise DumpError(f"{path}: cannot be written — there is no directory {path.parent} — create it first")
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}{_HOST}")
    _remove_stale(path)
    try:
        yield temporary
        with writing(path):
            os.replace(temporary, path)
    except BaseException:  # KeyboardInterrupt too must leave nothing that looks whole
        temporary.unlink(missing_ok=True)
        raise


def _remove_stale(path: Path) -> None:
    """Remove the temporary files of this file that dead processes of this machine left behind."""
    beginning = f".{path.name}.partial-"
    with writing(path):
        left = [file for file in path.parent.iterdir() if file.name.startswith(beginning) and file.name.endswith(_HOST)]
        for file in left:
            pid = file.name[len(beginning) : -len(_HOST)]
            if pid.isdecimal() and not _lives(int(pid)):
                file.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


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
    """Let Ctrl-C and SIGTERM act at the end of the block: HDF5 cannot close a file whose opening was cut short."""
    if threading.current_thread() is not threading.main_thread():  # nothing interrupts us
        yield
        return
    handlers = {s: h for s in (signal.SIGINT, signal.SIGTERM) if callable(h := signal.getsignal(s))}
    pending: list[tuple[int, FrameType | None]] = []
    for signalled in handlers:
        signal.signal(signalled, lambda *arguments: pending.append(arguments))
    try:
        yield
    finally:
        for signalled, handler in handlers.items():
            signal.signal(signalled, handler)
        if pending:
            handlers[signal.Signals(pending[0][0])](*pending[0])


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
        require_content(path)


def require_stored(what: str, needed: int, stored: int) -> None:
    """Raise DumpError if an array needs far more bytes than the file stores for it: it would fill the memory.

    Activations hardly compress; what shrinks a hundredfold, or is not stored at all, was made to do harm.
    """
    if needed > max(UNQUESTIONED, MOST_COMPRESSED * stored):
        raise DumpError(
            f"{what} needs {needed} bytes of memory — the file stores {stored} for it — write its values uncompressed"
        )


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file, read-only and not yet in memory. Views of them keep the file mapped.

    They are an array (n,) of n bytes.
    """
    with reading(path):
        return np.asarray(np.memmap(path, np.uint8, mode="r"))  # slicing the memmap itself is slow


def give_back(array: npt.NDArray[Any]) -> None:
    """Let the system have the memory of the mapped file that an array (any shape) is a view of, if it is one.

    What is looked at again is read again; so a dump that is read once from end to end never stays in memory whole.
    """
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def _reason(error: OSError | RuntimeError) -> str:
    """Why, in one line: libraries put whole paragraphs into an error."""
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
