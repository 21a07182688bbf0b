"""`parity diff` of two files of hashes: no model is needed, and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import typer

from parity.cli.console import print_json
from parity.errors import UsageError


def are_hashes(dumps: Sequence[Path]) -> bool:
    """Whether one of two dumps holds hashes, so that both must. Raises DumpError for a file that is damaged."""
    if len(dumps) != 2:
        return False
    from parity.dump.hashes import is_hashes

    return any(map(is_hashes, dumps))


def diff_hashes(dumps: tuple[Path, Path], *, json: bool, others: Sequence[object]) -> NoReturn:
    """Say where two hashed runs part, and leave with the exit code. Raises ParityError.

    `others` are options that mean nothing to hashes.
    """
    if any(other is not None for other in others):
        raise UsageError("hashes have no report, names or faults. Leave out --out, --names and --inject.")
    from rich.console import Console

    from parity.engines.hash_contrast import hash_contrast
    from parity.json_values import to_json
    from parity.report.hashes import show_hashes

    found = hash_contrast(dumps)
    if json:
        print_json({"verdict": found.verdict, **to_json(found)})
    else:
        show_hashes(found, Console(highlight=False))
    raise typer.Exit(found.exit_code)
