"""`parity show`: what a dump holds."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parity.cli.commands import Json, Names, TrustRemoteCode, Verbose
from parity.cli.console import observed, print_json, writable

if TYPE_CHECKING:
    from parity.show.lens import LensLine


def show(
    dump: Annotated[Path, typer.Argument(help="The dump to look at.")],
    site: Annotated[
        str | None, typer.Argument(help="A site, the end of its name (mlp.act_fn), layers.3, or a pattern with *.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Another dump: how far each site is apart.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The checkpoint, for what it would say after each layer."),
    ] = None,
    names: Names = None,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for index.html and pictures (SVG).")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a dump holds, by layer and site: norms, largest numbers, outlier channels, what is dead or not finite.

    Of a single site also its histogram, a map of tokens and channels, and what each head attends to. Runs no model
    but for the lens. Nothing here is a verdict: that is what `parity diff` gives.
    """
    from rich.console import Console

    from parity.dump import open_dump
    from parity.json_values import to_json
    from parity.show.looked import look
    from parity.show.terminal import show as show_looked

    if out is not None:
        writable(out)
    with ExitStack() as stack:
        opened = stack.enter_context(open_dump(dump, names))
        other = stack.enter_context(open_dump(against, names)) if against else None
        lens: tuple[LensLine, ...] = ()
        if model is not None:
            from parity.show.lens import logit_lens

            lens = logit_lens(opened, model, trust_remote_code=trust_remote_code)
        with observed(quiet=json) as observer:
            looked = look(opened, site, other, lens, observer)
    if out is not None:
        from parity.show.page import write

        page = write(looked, out)
    if json:
        print_json(to_json(looked))
        return
    show_looked(looked, Console(highlight=False), verbose=verbose)
    if out is not None:
        print(f"page: {page}")
