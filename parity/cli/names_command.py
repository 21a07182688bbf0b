"""`parity names`: a name map, proposed from values."""

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
    candidate: Annotated[str, typer.Argument(help="A dump; or module:factory, file.py:factory of a torch module.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The name map to write: JSON, as --names takes it.")],
    model: Model = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids: '1 2 3', or a file with one row a line.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Propose a name map: which tensor or submodule is which site, told by values; what is not sure is said.

    The reference is run on the same tokens. Exit code 0: something was named, 1: nothing was, 2: trouble.
    """
    from parity.candidates.base import is_dump

    options = RunOptions(tokens=tokens, model=model, trust_remote_code=trust_remote_code)
    check_options(options, has_dump=is_dump(candidate))
    writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    with observed(quiet=False) as observer:
        from parity.compare.propose_names import proposal_for

        found = proposal_for(candidate, options, observer)
    out.write_text(json.dumps(found.names, indent=2) + "\n", encoding="utf-8")
    _say(found, out)
    raise typer.Exit(0 if found.names else 1)


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
