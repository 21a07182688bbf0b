"""The command line. Heavy libraries are imported by the command that needs them, never by `--help`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parity.cli.console import explain, print_json, progress_bar, writable, write_report
from parity.compare.options import EMBEDDED, Ask
from parity.errors import UsageError

if TYPE_CHECKING:
    from parity.compare.pipeline import Progress
    from parity.results import Comparison

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Where does a port of a language model differ from transformers, and is it a bug or rounding?",
)

_ASK = "What both sides are asked"
_RUN = "How they run"
_OUT = "What comes out"

Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="Text to run.", rich_help_panel=_ASK)]
PromptFile = Annotated[Path | None, typer.Option(help="A file that holds the text.", rich_help_panel=_ASK)]
Tokens = Annotated[
    str | None, typer.Option(help="Token ids: '1 2 3', or a file with one row a line.", rich_help_panel=_ASK)
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help=f"A directory or hub id; without it the embedded {EMBEDDED}.",
        rich_help_panel=_ASK,
    ),
]
DType = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16. [default: the checkpoint's]", rich_help_panel=_RUN),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …", rich_help_panel=_RUN)]
Attention = Annotated[str, typer.Option(help="The reference's attention: eager or sdpa.", rich_help_panel=_RUN)]
Inner = Annotated[
    bool, typer.Option("--inner", help="Also scores and probs, in memory of tokens².", rich_help_panel=_RUN)
]
Candidate = Annotated[
    str,
    typer.Option("--candidate", "-c", help="module:factory, file.py:factory, or a dump.", rich_help_panel=_ASK),
]
Names = Annotated[
    Path | None, typer.Option(help="A name map (JSON): the candidate's names to the reference's.", rich_help_panel=_ASK)
]
UserFaults = Annotated[
    str | None, typer.Option("--faults", help="Your own faults: module:FAULTS or file.py:FAULTS.", rich_help_panel=_ASK)
]
Json = Annotated[bool, typer.Option("--json", help="The report alone, as JSON on stdout.", rich_help_panel=_OUT)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Every site.", rich_help_panel=_OUT)]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(version("parity"))
        except PackageNotFoundError:
            print("not installed")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Set what holds for every command (the debug flag is read by `main`, outside of typer)."""


@app.command()
def diff(
    dumps: Annotated[list[Path] | None, typer.Argument(help="Dumps: REFERENCE CANDIDATE, or CANDIDATE alone.")] = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    tokens: Tokens = None,
    model: Model = None,
    candidate: Candidate = "impl.qwen3:load",
    inject: Annotated[
        str | None,
        typer.Option(
            help="FAULT[=NUMBER][@LAYER]: the candidate is the reference with this fault.", rich_help_panel=_ASK
        ),
    ] = None,
    faults: UserFaults = None,
    noise: Annotated[
        int,
        typer.Option(help="Passes with stochastic rounding that say how far rounding may go.", rich_help_panel=_RUN),
    ] = 0,
    dtype: DType = None,
    device: Device = "cpu",
    attention: Attention = "eager",
    inner: Inner = False,
    names: Names = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the report.", rich_help_panel=_OUT)] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Pictures too, as SVG and PNG.", rich_help_panel=_OUT)] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare a candidate with the reference: which operation is wrong, and is it a bug or rounding?

    Exit code 0: match, 1: diverged, 2: trouble or inconclusive.
    """
    ask = Ask(prompt, prompt_file, tokens, model, dtype, device, attention, inner, faults, noise)
    folder = out or (None if json else Path("reports") / datetime.now().strftime("%Y%m%d-%H%M%S"))
    if folder is not None:
        writable(folder)
    with progress_bar(quiet=json) as progress:
        if inject is not None:
            comparison = _diff_injected(ask, inject, progress)
        else:
            comparison = _diff(ask, dumps or [], candidate, names, progress)
    write_report(comparison, folder, json=json, verbose=verbose, plots=plots)
    raise typer.Exit(comparison.exit_code)


@app.command()
def record(
    out: Annotated[Path, typer.Option("--out", "-o", help="The dump to write, *.h5.")],
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    tokens: Tokens = None,
    model: Model = None,
    candidate: Annotated[
        str | None, typer.Option("--candidate", "-c", help="Record this candidate in place of the reference.")
    ] = None,
    dtype: DType = None,
    device: Device = "cpu",
    attention: Attention = "eager",
    inner: Inner = False,
) -> None:
    """Record every activation of the reference (or of a candidate) to an HDF5 dump.

    The token ids are written beside it, as text that any language can read.
    """
    question = Ask(prompt, prompt_file, tokens, model, dtype, device, attention, inner).question()
    writable(out.parent)
    from parity.compare.pipeline import record_candidate, record_reference
    from parity.dump import write_tokens

    out.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar(quiet=False) as progress:
        if candidate:
            missing = record_candidate(question, candidate, out)
        else:
            missing = []
            record_reference(question, out, progress)
    ids = out.with_suffix(".tokens.txt")
    write_tokens(ids, question.token_ids)
    print(f"{out}: {len(question.token_ids[0])} tokens, {out.stat().st_size / 1e6:.1f} MB; token ids in {ids}")
    for site in missing:
        print(f"not recorded, no module of this name: {site}")


@app.command()
def check(
    dump: Annotated[Path, typer.Argument(help="The dump to look at.")],
    model: Model = None,
    names: Names = None,
    tokens: Tokens = None,
) -> None:
    """Say whether a dump is well-formed and complete, and what each missing site costs. Runs no model.

    Exit code 0: every site can be measured, 1: some cannot, 2: trouble.
    """
    from rich.console import Console

    from parity.compare.dump_check import check as check_dump
    from parity.dump import open_dump
    from parity.report.terminal import show_check

    with open_dump(dump, names) as opened:
        if not tokens and opened.info.token_ids is None:
            raise UsageError(f"{dump}: does not say its token ids. Add parity.token_ids, or give --tokens.")
        ask = Ask(tokens=tokens, model=model)
        question = ask.question(None if tokens else opened.info.token_ids, opened.info.model)
        found = check_dump(opened, question.reference(), len(question.token_ids), len(question.token_ids[0]))
    show_check(found, Console(highlight=False))
    raise typer.Exit(0 if found.is_complete else 1)


@app.command()
def sites(model: Model = None, inner: Inner = False, json: Json = False) -> None:
    """List what a port may dump: names, axes, sizes and dtypes."""
    from parity.reference.known_sites import known_sites

    known = known_sites(model or EMBEDDED, inner=inner)
    if json:
        print_json([{"site": s.name, "dims": list(s.dims), "shape": list(s.sizes), "dtype": s.dtype} for s in known])
        return
    width = max(len(s.name) for s in known)
    for s in known:
        axes = " ".join(f"{d}={n}" if n else d for d, n in zip(s.dims, s.sizes, strict=True))
        print(f"{s.name:{width}}  {axes}  {s.dtype}")


@app.command()
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

    if new is None:
        if out is not None:
            writable(out)
        write_report(report_json.load(old), out, json=False, verbose=verbose, plots=True)
        return
    found = changes(report_json.load(old), report_json.load(new))
    show_changes(found, Console(highlight=False))
    raise typer.Exit(1 if found.is_worse else 0)


@app.command()
def faults(
    word: Annotated[str | None, typer.Argument(help="The id of one to explain, or a word to search for.")] = None,
    more: UserFaults = None,
    json: Json = False,
) -> None:
    """List the known porting bugs, all or those about a word, or explain one: what it does, how to fix it."""
    from parity.faults import CATALOGUE, load_user_faults, matching

    catalogue = CATALOGUE + (load_user_faults(more) if more else ())
    chosen = matching(word, catalogue) if word else list(catalogue)
    if json:
        fields = ("id", "title", "sites", "fix", "source", "needs")
        print_json([{field: getattr(fault, field) for field in fields} for fault in chosen])
    elif len(chosen) == 1:
        print(explain(chosen[0]))
    else:
        width = max(len(fault.id) for fault in chosen)
        for fault in chosen:
            print(f"{fault.id:{width}}  {fault.title}")


@app.command()
def power(
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    tokens: Tokens = None,
    model: Model = None,
    faults: UserFaults = None,
    dtype: DType = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Say which known bugs a run on this prompt would reveal, and which not: no candidate is needed."""
    from parity import words
    from parity.compare.inject import power_of
    from parity.report.json import to_json

    question = Ask(prompt, prompt_file, tokens, model, dtype, device, faults=faults).question()
    with progress_bar(quiet=json) as progress:
        found = power_of(question, progress)
    if json:
        print_json(to_json(found))
        return
    untried = f", {len(found.not_tried)} were not tried" if found.not_tried else ""
    print(f"{len(found.visible)} faults would be seen, {len(found.invisible)} would not{untried}")
    width = max((len(item.fault) for item in found.unseen), default=0)
    for item in found.unseen:
        print(f"{item.fault:{width}}  {'; '.join(filter(None, words.unseen(item, found.dtype)))}")


# -- what the commands do ------------------------------------------------------------------------------------


def _diff(ask: Ask, dumps: list[Path], candidate: str, names: Path | None, progress: Progress) -> Comparison:
    from parity.candidates.spec import is_dump

    if len(dumps) > 2:
        raise UsageError(f"{len(dumps)} dumps given. Give REFERENCE CANDIDATE, or CANDIDATE alone.")
    if not dumps and is_dump(candidate):
        dumps = [Path(candidate)]
    if not dumps:
        from parity.compare.pipeline import diff_live
        from parity.dump import load_names

        return diff_live(ask.question(), candidate, progress, load_names(names) if names else None)
    return _diff_dumps(ask, dumps, names, progress)


def _diff_injected(ask: Ask, inject: str, progress: Progress) -> Comparison:
    from parity.compare.inject import diff_injected
    from parity.faults import parse

    question = ask.question()
    return diff_injected(question, parse(inject, question.faults), progress)


def _diff_dumps(ask: Ask, dumps: list[Path], names: Path | None, progress: Progress) -> Comparison:
    from parity.compare.pipeline import diff_dump, reference_for, working_dtype
    from parity.dump import open_dump

    with open_dump(dumps[0]) as first, open_dump(dumps[-1], names) as last:
        ids = None if ask.says_what_to_run else (first.info.token_ids or last.info.token_ids)
        if ids is None and not ask.says_what_to_run:
            raise UsageError(
                f"{dumps[-1]}: does not say its token ids. Give --prompt or --tokens, or add parity.token_ids."
            )
        ask.dtype = ask.dtype or working_dtype(last)
        question = ask.question(ids, first.info.model)
        for dump in (first, last):
            _same_model(dump, question.checkpoint)
        return diff_dump(question, last, reference_for(question), progress)


def _same_model(dump: Any, checkpoint: Any) -> None:
    from parity.errors import IncomparableError

    theirs = dump.info.fingerprint
    if theirs is not None and theirs != checkpoint.fingerprint():
        raise IncomparableError(
            f"{dump.path}: records model {dump.info.model!r} (fingerprint {theirs}), but {checkpoint.name!r} "
            f"has fingerprint {checkpoint.fingerprint()}. Give --model the checkpoint that was recorded."
        )
