"""The command line of a comparison by many processes: parts, what they make together, and engines that run them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parity.cli.console import observed, writable, write_report
from parity.errors import UsageError
from parity.options import RunOptions, shell
from parity.shards import Shard

if TYPE_CHECKING:
    from parity.compare.parts import Asked
    from parity.observer import Observer
    from parity.results import Comparison

# Who computes, and where it goes: options that are no part of the question.
_BESIDE = ("--engine", "--workers", "--shard", "--out", "-o")


def check_scale(shard: str | None, engine: str | None, workers: int, files: int, device: str) -> None:
    """Raise UsageError for shards and engines that cannot be had; `files` dumps are given."""
    given = [flag for flag, value in (("--shard", shard), ("--engine", engine)) if value is not None]
    if len(given) > 1:
        raise UsageError("--shard is one process of many, --engine starts them. Give one of the two.")
    if given and files != 1:
        raise UsageError(f"{given[0]} needs what was recorded. Record the candidate, and give its dump alone.")
    if workers < 1:
        raise UsageError(f"--workers {workers}: give a number of processes, 1 or more.")
    if shard is not None:
        Shard.parse(shard)
    if engine is not None:
        from parity.scale import check_engine

        check_engine(engine, device)


def write_part(run: RunOptions, dump: Path, names: Path | None, shard: str, out: Path | None) -> None:
    """Compute a part, unless it is there, and say so. Raises UsageError."""
    from parity.scale import compute_part

    if out is None:
        raise UsageError(f"--shard {shard}: say with --out to which file its part goes.")
    writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    with observed(quiet=False) as observer:
        sites = compute_part(_asked(run, dump, names), Shard.parse(shard), out, observer)
    print(f"{out}: part {shard}, {sites} sites; parity merge makes a report of all parts")


def diff_on_engine(
    run: RunOptions, dump: Path, names: Path | None, engine: str, workers: int, observer: Observer
) -> Comparison:
    """The comparison by the workers of an engine."""
    from parity.scale import diff_on

    return diff_on(engine, workers, _asked(run, dump, names), observer)


def merge(
    parts: Annotated[list[Path], typer.Argument(help="What `parity diff DUMP --shard I/N -o PART` wrote.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the report.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The report alone, as JSON on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every site.")] = False,
) -> None:
    """Make one report of parts that many processes computed; what a missing part has is left out, and never a match.

    Exit code as that of `parity diff`.
    """
    from parity.scale import merge as merged

    if out is not None:
        writable(out)
    with observed(quiet=json) as observer:
        comparison = merged(parts, observer)
    write_report(comparison, out, json=json, verbose=verbose, plots=False)
    raise typer.Exit(comparison.exit_code)


def _asked(run: RunOptions, dump: Path, names: Path | None) -> Asked:
    """The comparison, so that a process elsewhere knows it: no file of a prompt, and no word of who computes."""
    from dataclasses import replace

    from parity.compare.parts import Asked

    options = replace(run, prompt=run.texts or None, prompt_file=None, prompts=None)
    return Asked(str(dump), None if names is None else str(names), options, shell(["parity", *_question(sys.argv[1:])]))


def _question(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    skipped = False
    for argument in arguments:
        skipped, was = not skipped and argument in _BESIDE, skipped
        if not (skipped or was or argument.partition("=")[0] in _BESIDE):
            kept.append(argument)
    return kept
