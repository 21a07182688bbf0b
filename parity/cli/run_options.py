"""The options of a run on the command line: read off `RunOptions`, so that they are written once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from parity.candidates.base import KINDS, is_dump
from parity.cli.hashes import are_hashes
from parity.cli.scale import check_scale
from parity.errors import UsageError
from parity.options import RunOptions
from parity.preflight import check_file, check_injection, check_options, check_spec


def with_run_options(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes `run: RunOptions` an option for each of its fields, but those that are left out."""
    rows = [row for row in dataclasses.fields(RunOptions) if row.name not in left_out]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def called(**given: Any) -> None:
            options = RunOptions(**{row.name: given.pop(row.name) for row in rows})
            _check_first(options, **given)
            command(run=options, **given)

        hints = get_type_hints(RunOptions)
        options = [
            inspect.Parameter(
                row.name, inspect.Parameter.KEYWORD_ONLY, default=row.default, annotation=_shown(row, hints)
            )
            for row in rows
        ]
        own = inspect.signature(command, eval_str=True).parameters.values()
        rest = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name != "run"]
        parameters = [*rest, *options]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return decorate


def _check_first(
    options: RunOptions,
    dumps: Sequence[Path] | None = None,
    candidate: str | None = None,
    names: Path | None = None,
    inject: str | None = None,
    **others: Any,
) -> None:
    """Raise for what is wrong without need of torch: a wrong option is not worth seconds of waiting."""
    files = list(dumps or [])
    if len(files) > 2:
        raise UsageError(f"{len(files)} dumps given. Give REFERENCE CANDIDATE, or CANDIDATE alone.")
    if not files and candidate and is_dump(candidate):
        files = [Path(candidate)]
    check_scale(others.get("shard"), others.get("engine"), others.get("workers", 1), len(files), options.device)
    check_options(options, has_dump=bool(files))
    for path in files:
        check_file(path)
    if names or files:
        from parity.dump import load_names, open_dump

        if names:
            load_names(names)
        if not are_hashes(files):
            for path in files:
                open_dump(path).close()
    if inject is not None:
        check_injection(inject, more=options.faults is not None)
    elif candidate and not files and candidate.partition(":")[0] not in KINDS:
        check_spec(candidate, "candidate")


def _shown(row: dataclasses.Field[Any], hints: dict[str, Any]) -> Any:
    shown = typer.Option(*row.metadata["flags"], help=row.metadata["help"], rich_help_panel=row.metadata["panel"])
    kind = list[str] | None if row.name == "prompt" else hints[row.name]  # which may be given again
    return Annotated[kind, shown]
