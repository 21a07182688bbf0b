"""What the commands put out: reports, files, a progress bar."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.errors import UsageError
from parity.observer import Observer
from parity.troubles import surviving

if TYPE_CHECKING:
    from parity.engine_report import Contrast
    from parity.faults import Fault
    from parity.reasons import Trouble
    from parity.results import Comparison


def writable(folder: Path) -> None:
    """Make sure that a folder can be made and written to, and leave none behind. Raises UsageError."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise UsageError(f"{folder}: not writable. Choose another place with --out.")
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made ({error.strerror}). Choose another place with --out.") from error
    finally:
        for path in absent:
            with suppress(OSError):
                path.rmdir()


def write_report(comparison: Comparison, folder: Path | None, *, json: bool, verbose: bool, plots: bool) -> None:
    """Write the report's files, if it has a folder, and print it: as JSON alone, or as text.

    In a workflow of GitHub it goes to the summary of the step too.
    """
    from rich.console import Console

    from parity.report import json as report_json
    from parity.report.files import write_all
    from parity.report.markdown import append_step_summary
    from parity.report.terminal import show

    paths: dict[str, Path] = {}
    mistake: UsageError | None = None
    troubles: list[Trouble] = []
    try:
        if folder is not None:
            written = write_all(comparison, folder, plots=plots)
            comparison, paths = written.comparison, written.paths
        with surviving(troubles, "step summary"):
            append_step_summary(comparison)
    except UsageError as error:  # a full disk must not take away what a long run has found
        mistake = error
    comparison = replace(comparison, troubles=(*comparison.troubles, *troubles))
    if json:
        sys.stdout.write(report_json.dumps(comparison))
    else:
        show(comparison, Console(highlight=False), verbose=verbose)
        if paths:
            print(f"report: {paths.get('index.html', paths['report.json'])}")
    if mistake is not None:
        raise mistake


def write_engines(contrast: Contrast, folder: Path | None, *, json: bool) -> None:
    """Write the report of two engines, if it has a folder, and print it: as JSON alone, or as text."""
    from rich.console import Console

    from parity.report.contrast import as_json, show_contrast, write_contrast

    if json:
        print_json(as_json(contrast))
    else:
        show_contrast(contrast, Console(highlight=False))
    if folder is not None:
        page = write_contrast(contrast, folder)
        if not json:
            print(f"report: {page}")


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    import json

    print(json.dumps(value, indent=1))


@contextmanager
def observed(*, quiet: bool) -> Iterator[Observer]:
    """A bar with the current piece and an estimate; silent where nobody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield Observer()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield Observer(lambda what, done, total: bar.update(task, description=what, completed=done, total=total))


def explain(fault: Fault) -> str:
    """A fault in a few lines."""
    number = (
        f"number   {fault.number.name}; seen: {', '.join(f'{v:g}' for v in fault.number.typical)}"
        if fault.number
        else ""
    )
    lines = [
        fault.id,
        f"what     {fault.title}",
        f"shows    at {', '.join(site or 'the output of a layer' for site in fault.sites)}",
        f"fix      {fault.fix}",
        number,
        f"needs    {fault.needs}" if fault.needs else "",
        f"seen in  {fault.source}" if fault.source else "",
    ]
    return "\n".join(line for line in lines if line)
