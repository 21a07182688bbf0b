"""What `parity diff` compares, by what it was given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from parity.options import RunOptions, shell

if TYPE_CHECKING:
    from parity.engine_report import Contrast
    from parity.observer import Observer
    from parity.results import Comparison


def diff_candidate(
    options: RunOptions, dumps: list[Path], candidate: str, names: Path | None, observer: Observer
) -> Comparison | Contrast:
    """Compare a candidate or a dump with the reference, or two dumps as `parity.api.diff_dumps` does."""
    from parity.api import compared, diff_dumps
    from parity.candidates.base import dump_file

    command = shell(["parity", *sys.argv[1:]])
    if len(dumps) == 2:
        return diff_dumps((dumps[0], dumps[1]), names, options, command, observer)
    return compared(dump_file(dumps[0], names) if dumps else candidate, names, options, command, observer)


def diff_injected(options: RunOptions, inject: str, observer: Observer) -> Comparison:
    """Compare the reference with a fault in it with the reference."""
    from parity.compare.inject import Injected
    from parity.compare.pipeline import diff as compare
    from parity.faults import parse
    from parity.reference.replay import Reference
    from parity.run_spec import run_spec

    run = run_spec(options, command=shell(["parity", *sys.argv[1:]]))
    reference = Reference(run.model())
    return compare(run, Injected(parse(inject, run.faults), reference, observer), observer, reference)
