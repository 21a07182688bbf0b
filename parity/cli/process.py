"""The process around a command: its signals, its streams, and its errors, each in one line."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from parity.cli.app import app_for
from parity.errors import ParityError, printable

TERMINATED = 128 + signal.SIGTERM


def main() -> None:
    """Entry point: errors become one line and exit code 2; `--debug` shows where they came from."""
    debug = "--debug" in sys.argv
    # Libraries make a million objects that stay; to look for garbage after every 700 takes a tenth of the run.
    gc.set_threshold(50_000)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of much before it fails with one line
    _read_to_the_end()
    if debug:
        _show_what_is_survived()
    with _terminable() as terminated:
        try:
            arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
            app_for(arguments)(arguments, prog_name="parity")
        except ParityError as error:
            if debug:
                raise
            say(str(error))
        except SystemExit:
            if terminated:
                sys.exit(TERMINATED)
            raise
        except Exception as error:
            if debug:
                raise
            reason = " ".join(str(error).split())
            say(f"internal error: {type(error).__name__}: {reason[:300]}. --debug shows where.")
    sys.exit(2)


def _show_what_is_survived() -> None:
    """The traceback of what failed and did not end the run, on stderr."""
    log = logging.getLogger("parity")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.DEBUG)


def say(text: str) -> None:
    """Print an error as one line, in which nothing from a file or a library reaches the terminal as a command."""
    print(f"parity: {printable(' '.join(text.splitlines()))}", file=sys.stderr)


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """SIGTERM interrupts as Ctrl-C does, so that all is cleaned up; the list says whether one came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where Python lets no one listen
        yield came
        return

    def interrupt(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


class _Outlet(io.FileIO):
    """Standard output that its reader may close, as `| head` does: the rest is dropped, the exit code stays."""

    def write(self, data: Any, /) -> int:
        """Write what the reader takes."""
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            return len(data)


def _read_to_the_end() -> None:
    if sys.stdout is not sys.__stdout__ or sys.stdout is None:  # a test or a notebook looks at it
        return
    raw = _Outlet(sys.stdout.fileno(), "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw), sys.stdout.encoding, errors="backslashreplace", line_buffering=raw.isatty()
    )
