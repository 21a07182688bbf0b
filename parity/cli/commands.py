"""The command line. Heavy libraries are imported by the command that needs them, never by `--help`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parity.cli.comparing import diff_candidate, diff_injected
from parity.cli.console import explain, observed, print_json, writable, write_engines, write_report
from parity.cli.hashes import are_hashes, diff_hashes
from parity.cli.run_options import with_run_options
from parity.cli.scale import diff_on_engine, write_part
from parity.options import IMPL, WHAT, RunOptions
from parity.preflight import check_file, check_options, check_output
from parity.reference.checkpoint import EMBEDDED
from parity.report.text import ranges
from parity.results import Comparison
from parity.sites import family, layer_of

if TYPE_CHECKING:
    from parity.engine_report import Contrast
    from parity.reference.known_sites import KnownSite

_OUT = "What comes out"
_WHO = "Who computes"

Candidate = Annotated[
    str,
    typer.Option("--candidate", "-c", help="module:factory, file.py:factory, or a dump.", rich_help_panel=WHAT),
]
Names = Annotated[
    Path | None, typer.Option(help="A name map (JSON): the candidate's names to the reference's.", rich_help_panel=WHAT)
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help=f"A directory or hub id; without it the embedded {EMBEDDED}."),
]
UserFaults = Annotated[str | None, typer.Option("--faults", help="Your own faults: module:FAULTS or file.py:FAULTS.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let transformers run Python that the checkpoint brings along.")
]
Json = Annotated[bool, typer.Option("--json", help="The report alone, as JSON on stdout.", rich_help_panel=_OUT)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Every site.", rich_help_panel=_OUT)]


@with_run_options()
def diff(
    run: RunOptions,
    dumps: Annotated[
        list[Path] | None, typer.Argument(help="Dumps: REFERENCE CANDIDATE, CANDIDATE alone, or two engines.")
    ] = None,
    candidate: Candidate = IMPL,
    inject: Annotated[
        str | None,
        typer.Option(
            help="FAULT[=NUMBER][@LAYER]: the candidate is the reference with this fault.", rich_help_panel=WHAT
        ),
    ] = None,
    names: Names = None,
    shard: Annotated[
        str | None, typer.Option(help="I/N: measure one part of N of a dump, to --out.", rich_help_panel=_WHO)
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="ray[:ADDRESS]: let workers measure a dump.", rich_help_panel=_WHO)
    ] = None,
    workers: Annotated[int, typer.Option(help="With --engine: how many.", rich_help_panel=_WHO)] = 2,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the report.", rich_help_panel=_OUT)] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Pictures too, as SVG and PNG.", rich_help_panel=_OUT)] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare a candidate with the reference: which operation is wrong, and is it a bug or rounding?

    Exit code 0: match, 1: diverged, 2: trouble or inconclusive.
    """
    if dumps and are_hashes(dumps):
        diff_hashes((dumps[0], dumps[1]), json=json, others=(out, inject, names))
    if shard is not None:
        write_part(run, (dumps or [Path(candidate)])[0], names, shard, out)
        raise typer.Exit
    folder = out or (None if json else Path("reports") / datetime.now().strftime("%Y%m%d-%H%M%S"))
    if folder is not None:
        writable(folder)
    comparison: Comparison | Contrast
    with observed(quiet=json) as observer:
        if inject is not None:
            comparison = diff_injected(run, inject, observer)
        elif engine is not None:
            comparison = diff_on_engine(run, (dumps or [Path(candidate)])[0], names, engine, workers, observer)
        else:
            comparison = diff_candidate(run, dumps or [], candidate, names, observer)
    if not isinstance(comparison, Comparison):
        write_engines(comparison, folder, json=json)
        raise typer.Exit(comparison.exit_code)
    write_report(comparison, folder, json=json, verbose=verbose, plots=plots)
    raise typer.Exit(comparison.exit_code)


@with_run_options("faults", "noise", "power", "allow_unexamined", "layers", "exact")
def record(
    run: RunOptions,
    out: Annotated[Path, typer.Option("--out", "-o", help="The dump to write: *.h5, or *.safetensors.")],
    candidate: Annotated[
        str | None, typer.Option("--candidate", "-c", help="Record this candidate in place of the reference.")
    ] = None,
    names: Names = None,
    hashed: Annotated[
        bool, typer.Option("--hash", help="Hashes of the bits in place of arrays: `parity diff` holds two together.")
    ] = False,
) -> None:
    """Record every activation of the reference (or of a candidate) to a dump.

    The token ids are written beside it, as text that any language can read.
    """
    from parity.api import recorded
    from parity.candidates.base import open_candidate

    check_output(out, hashed=hashed)
    writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    with observed(quiet=False) as observer:
        done = recorded(out, open_candidate(candidate, names) if candidate else None, run, observer, hashed=hashed)
    print(f"{out}: {done.tokens} tokens, {out.stat().st_size / 1e6:.1f} MB; token ids in {done.ids}")
    for site in done.missing:
        print(f"not recorded, no module of this name: {site}")


def check(
    dump: Annotated[Path, typer.Argument(help="The dump to look at.")],
    model: Model = None,
    names: Names = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids: '1 2 3', or a file with one row a line.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say whether a dump is well-formed and complete, and what each missing site costs. Runs no model.

    Exit code 0: every site can be measured, 1: some cannot, 2: trouble.
    """
    check_file(dump)
    from rich.console import Console

    from parity.dump import open_dump
    from parity.report.terminal import show_check

    options = RunOptions(tokens=tokens, model=model, trust_remote_code=trust_remote_code)
    check_options(options, has_dump=True)
    with open_dump(dump, names) as opened:
        from parity.compare.dump_check import check as check_dump
        from parity.run_spec import run_spec

        run = run_spec(options, opened.info)
        found = check_dump(opened, run.model(), *run.ids.shape)
    show_check(found, Console(highlight=False))
    raise typer.Exit(0 if found.is_complete else 1)


def sites(
    model: Model = None,
    inner: Annotated[bool, typer.Option("--inner", help="Also scores and probs.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for every site of every layer.")] = False,
) -> None:
    """List what a port may dump: names, axes, sizes and dtypes; `*` stands for the number of each layer named."""
    from parity.reference.known_sites import known_sites

    known = known_sites(model or EMBEDDED, inner=inner, trust_remote_code=trust_remote_code)
    if json:
        print_json([{"site": s.name, "dims": list(s.dims), "shape": list(s.sizes), "dtype": s.dtype} for s in known])
        return
    for line in _listed(known, verbose=verbose):
        print(line)


def _listed(known: Sequence[KnownSite], *, verbose: bool) -> Iterator[str]:
    """A line for each site; sites of layers that only differ in the layer's number share one, unless `verbose`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for s in known:
        said = " ".join([*(f"{d}={n}" if n else d for d, n in zip(s.dims, s.sizes, strict=True)), "", s.dtype])
        layer = layer_of(s.name)
        name = s.name if verbose or layer is None else family(s.name)
        groups.setdefault((name, said), []).extend([] if layer is None else [layer])
    width = max(len(name) for name, _ in groups)
    for (name, said), layers in groups.items():
        yield f"{name:{width}}  {said}" + (f"  layers {ranges(layers)}" if "*" in name else "")


def report(
    old: Annotated[Path, typer.Argument(help="A report.json.")],
    new: Annotated[Path | None, typer.Argument(help="A later one: show what changed.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to render into.", rich_help_panel=_OUT)
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Render a report again, without a model; or show what changed between two.

    Exit code, of two reports: 0 if nothing got worse, 1 if something did.
    """
    from rich.console import Console

    from parity.report import json as report_json
    from parity.report.changes import changes
    from parity.report.changes import show as show_changes

    if out is not None:
        writable(out)
    if new is None:
        write_report(report_json.load(old), out, json=False, verbose=verbose, plots=True)
        return
    sides = report_json.load(old), report_json.load(new)
    found = changes(*sides)
    show_changes(found, Console(highlight=False))
    if out is not None:
        from parity.report.changes_page import write_changes

        print(f"page: {write_changes(sides, found, out)}")
    raise typer.Exit(1 if found.is_worse else 0)


def faults(
    word: Annotated[str | None, typer.Argument(help="The id of one to explain, or a word to search for.")] = None,
    more: UserFaults = None,
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print them as a page with a section each.")] = False,
) -> None:
    """List the known porting bugs, all or those about a word, or explain one: what it does, how to fix it."""
    from parity.faults import CATALOGUE, load_user_faults, matching

    catalogue = CATALOGUE + (load_user_faults(more) if more else ())
    chosen = matching(word, catalogue) if word else list(catalogue)
    if json:
        fields = ("id", "title", "sites", "fix", "source", "needs")
        print_json([{field: getattr(fault, field) for field in fields} for fault in chosen])
    elif markdown:
        from parity.faults.page import page

        print(page(chosen), end="")
    elif len(chosen) == 1:
        print(explain(chosen[0]))
    else:
        width = max(len(fault.id) for fault in chosen)
        for fault in chosen:
            print(f"{fault.id:{width}}  {fault.title}")


@with_run_options(
    "noise", "power", "attention", "inner", "allow_unexamined", "decode", "greedy", "chunks", "layers", "exact"
)
def power(run: RunOptions, json: Json = False) -> None:
    """Say which known bugs a run on this prompt would reveal, and which not: no candidate is needed."""
    from parity import words
    from parity.compare.inject import power_of
    from parity.json_values import to_json
    from parity.run_spec import run_spec

    with observed(quiet=json) as observer:
        found = power_of(run_spec(run), observer)
    if json:
        print_json(to_json(found))
        return
    untried = f", {len(found.not_tried)} were not tried" if found.not_tried else ""
    print(f"{len(found.visible)} faults would be seen, {len(found.invisible)} would not{untried}")
    width = max((len(item.fault) for item in found.unseen), default=0)
    for name, change in found.seen_from.items():
        print(f"{name:{width}}  seen from a change of about {change:.2g}")
    for item in found.unseen:
        print(f"{item.fault:{width}}  {'; '.join(filter(None, words.unseen(item, found.dtype)))}")
