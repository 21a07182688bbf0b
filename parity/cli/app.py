"""The commands by name. Only the one that is asked for is imported and built: to build all would take a while."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

# Where each command is, and the first line of its help.
COMMANDS = {
    "diff": (
        "commands",
        "Compare a candidate with the reference: which operation is wrong, and is it a bug or rounding?",
    ),
    "record": ("commands", "Record every activation of the reference (or of a candidate) to a dump."),
    "check": (
        "commands",
        "Say whether a dump is well-formed and complete, and what each missing site costs. Runs no model.",
    ),
    "names": (
        "names_command",
        "Propose a name map: which tensor or submodule is which site, told by values; what is not sure is said.",
    ),
    "sites": (
        "commands",
        "List what a port may dump: names, axes, sizes and dtypes; `*` stands for the number of each layer named.",
    ),
    "show": (
        "show_command",
        "Show what a dump holds, by layer and site: norms, largest numbers, outlier channels, what is dead "
        "or not finite.",
    ),
    "report": ("commands", "Render a report again, without a model; or show what changed between two."),
    "merge": (
        "scale",
        "Make one report of parts that many processes computed; what a missing part has is left out, "
        "and never a match.",
    ),
    "faults": (
        "commands",
        "List the known porting bugs, all or those about a word, or explain one: what it does, how to fix it.",
    ),
    "power": (
        "commands",
        "Say which known bugs a run on this prompt would reveal, and which not: no candidate is needed.",
    ),
    "logprobs": (
        "engine_commands",
        "Say whether a rollout's log-probabilities are the reference's up to rounding; if not, why and from where.",
    ),
    "invariance": (
        "engine_commands",
        "Say which operations give other bits when the same row runs in a batch, in chunks, decoded, "
        "with other threads.",
    ),
}


def app_for(arguments: Sequence[str]) -> typer.Typer:
    """The command line for some arguments: it has all commands, of which only the one that is asked for can run."""
    app = typer.Typer(
        add_completion=True,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Where does a port of a language model differ from transformers, and is it a bug or rounding?",
    )
    app.callback()(options)
    # Where a shell asks what could come next, the line so far is in the environment.
    so_far = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    said = so_far.split()[1:] if os.environ.get("_PARITY_COMPLETE") else arguments
    asked = next((argument for argument in said if not argument.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        if name == asked:
            app.command(name)(getattr(import_module(f"parity.cli.{module}"), name))
        else:
            app.command(name, help=summary)(_unasked)
    return app


def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Set what holds for every command (the debug flag is read by `main`, outside of typer)."""


def _unasked() -> None:
    raise AssertionError("unreachable because the command on the line is the one that is built")


def _version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(version("parity"))
    except PackageNotFoundError:
        print("not installed")
    raise typer.Exit
