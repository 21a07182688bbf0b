"""The commands about engines: what a rollout's log-probabilities say, and which operations vary."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from parity.cli.commands import Candidate, Json, Model, Names, TrustRemoteCode
from parity.cli.console import observed, print_json, writable
from parity.cli.run_options import with_run_options
from parity.errors import UsageError
from parity.options import HOW, IMPL, RunOptions, shell
from parity.preflight import check_options
from parity.reference.checkpoint import EMBEDDED

Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. [default: the checkpoint's]", rich_help_panel=HOW)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …", rich_help_panel=HOW)]
Attention = Annotated[str, typer.Option(help="The reference's attention: eager or sdpa.", rich_help_panel=HOW)]


def logprobs(
    rollout: Annotated[Path, typer.Argument(help="Token ids with log-probabilities: JSON lines or safetensors.")],
    model: Model = None,
    temperature: Annotated[
        float, typer.Option(help="The temperature that both sides' log-probabilities are meant at.")
    ] = 1.0,
    earlier: Annotated[
        list[str] | None,
        typer.Option(help="A checkpoint that the engine may still have had: a directory or hub id; may be repeated."),
    ] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    attention: Attention = "eager",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Say whether a rollout's log-probabilities are the reference's up to rounding; if not, why and from where.

    Read are the shapes of vLLM (server with return_token_ids, RequestOutput), SGLang (/generate with
    return_logprob), TRL and verl (prompt_ids, completion_ids or response_ids, logprobs), slime, and verl's or TRL's
    tensors in a safetensors file. Exit code 0: rounding, 1: not, 2: trouble or undecided.
    """
    check_options(
        RunOptions(model=model, dtype=dtype, device=device, attention=attention, trust_remote_code=trust_remote_code),
        has_dump=True,
    )
    if not 0 < temperature < float("inf"):
        raise UsageError(f"--temperature {temperature:g}: log-probabilities need one above 0.")
    from rich.console import Console

    from parity.json_values import to_json
    from parity.report.rollouts import show_rollouts
    from parity.rollouts.compare import RolloutOptions, compare_rollouts

    options = RolloutOptions(
        model or EMBEDDED, dtype, device, attention, temperature, tuple(earlier or ()), trust_remote_code
    )
    with observed(quiet=json) as observer:
        report = compare_rollouts(rollout, options, shell(["parity", *sys.argv[1:]]), observer)
    if json:
        print_json(to_json(report))
    else:
        show_rollouts(report, Console(highlight=False))
    raise typer.Exit(report.exit_code)


@with_run_options(
    "chunks", "decode", "greedy", "noise", "power", "allow_unexamined", "faults", "layers", "accept", "exact"
)
def invariance(
    run: RunOptions,
    candidate: Candidate = IMPL,
    names: Names = None,
    against: Annotated[
        str | None, typer.Option(help="Another candidate, each operation of which is asked on the first one's inputs.")
    ] = None,
    batch: Annotated[str, typer.Option(help="The same row so many times: 3,8.")] = "3",
    chunks: Annotated[str, typer.Option(help="The prompt in chunks of so many tokens: 16,64.")] = "",
    decode: Annotated[int, typer.Option(help="The last K tokens one by one.")] = 0,
    threads: Annotated[str, typer.Option(help="With so many threads of torch: 1,2.")] = "",
    exact: Annotated[bool, typer.Option("--exact", help="Exit code 1 where any bit differs.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of a report, if one is wanted.")] = None,
    json: Json = False,
) -> None:
    """Say which operations give other bits when the same row runs in a batch, in chunks, decoded, with other threads.

    Every operation is asked on the same inputs, and the reference itself is asked too. Exit code 0: the same, or
    without --exact within rounding; 1: not; 2: trouble.
    """
    if out is not None:
        writable(out)
    settings = [_sizes("--batch", batch), _sizes("--chunks", chunks), _sizes("--threads", threads)]
    from rich.console import Console

    from parity.candidates.base import open_candidate
    from parity.engines.invariance import Settings, as_module
    from parity.engines.invariance import invariance as ask
    from parity.report.invariance import as_json, show_invariance, write_invariance
    from parity.run_spec import run_spec

    opened = as_module(open_candidate(candidate, names))
    other = as_module(open_candidate(against, names)) if against else None
    spec = run_spec(run, opened.said(), shell(["parity", *sys.argv[1:]]))
    varied = Settings(settings[0], settings[1], decode, settings[2])
    with observed(quiet=json) as observer:
        found = ask(spec, opened, varied, observer, against=other, exact=exact)
    if json:
        print_json(as_json(found))
    else:
        show_invariance(found, Console(highlight=False))
    if out is not None:
        page = write_invariance(found, out)
        if not json:
            print(f"report: {page}")
    raise typer.Exit(found.exit_code)


def _sizes(name: str, text: str) -> tuple[int, ...]:
    words = text.replace(",", " ").split()
    if not all(word.isascii() and word.isdecimal() and 0 < int(word) < 1 << 20 for word in words):
        raise UsageError(f"{name} {text!r}: no list of sizes. Give numbers such as 1,4.")
    return tuple(map(int, words))
