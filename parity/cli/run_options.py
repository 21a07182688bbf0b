"""The options of a run on the command line: read off `RunOptions`, so that they are written once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from parity.options import RunOptions


def with_run_options(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes `run: RunOptions` an option for each of its fields, but those that are left out."""
    rows = [row for row in dataclasses.fields(RunOptions) if row.name not in left_out]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def called(**given: Any) -> None:
            options = RunOptions(**{row.name: given.pop(row.name) for row in rows})
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


def _shown(row: dataclasses.Field[Any], hints: dict[str, Any]) -> Any:
    shown = typer.Option(*row.metadata["flags"], help=row.metadata["help"], rich_help_panel=row.metadata["panel"])
    return Annotated[hints[row.name], shown]
