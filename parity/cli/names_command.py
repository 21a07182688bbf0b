"""`parity names`: a name map for a dump, proposed from its values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parity.cli.commands import Model, TrustRemoteCode
from parity.cli.console import observed, writable
from parity.options import RunOptions
from parity.preflight import check_options

if TYPE_CHECKING:
    from parity.compare.propose_names import Proposal


def names(
    dump: Annotated[Path, typer.Argument(help="A dump, with whatever names its tensors have.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The name map to write: JSON, as --names takes it.")],
    model: Model = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids: '1 2 3', or a file with one row a line.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Propose a name map for a dump: which tensor is which site, told by values; what is not sure is said.

    The reference is run on the dump's tokens. Exit code 0: every tensor has a name, 1: some have none, 2: trouble.
    """
    from parity.dump import open_dump

    options = RunOptions(tokens=tokens, model=model, trust_remote_code=trust_remote_code)
    check_options(options, has_dump=True)
    writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_dump(dump) as opened, observed(quiet=False) as observer:
        from parity.compare.hidden_states import with_hidden_states
        from parity.compare.propose_names import propose_names
        from parity.run_spec import run_spec

        run = run_spec(options, opened.info)
        reference = run.model()
        found = propose_names(with_hidden_states(opened, reference), reference, run, observer)
    out.write_text(json.dumps(found.names, indent=2) + "\n", encoding="utf-8")
    _say(found, out)
    raise typer.Exit(1 if found.doubts else 0)


def _say(found: Proposal, out: Path) -> None:
    from parity.report.text import visible
    from parity.sites import family

    def line(text: str) -> None:
        print(visible(text))

    for name, target in found.names.items():
        line(f"{name} → {_sites(target)}")
    for match in found.matches:
        if match.axes:
            line(f"{match.tensor}: its shape leaves its axes open; declare them in parity.dims: {match.axes}")
    for name, why in found.doubts.items():
        line(f"not sure  {name} {why}")
    for one in dict.fromkeys(map(family, found.unheld)):
        line(f"no tensor holds {one}")
    apart = max((match.apart for match in found.matches), default=0.0)
    total = len(found.matches) + len(found.doubts)
    print(f"{out}: {len(found.matches)} of {total} tensors named, at most {apart:.2g} apart from the reference")


def _sites(target: Any) -> str:
    return target if isinstance(target, str) else " + ".join(target["split"])
