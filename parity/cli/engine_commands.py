"""The commands about engines: what a rollout's log-probabilities say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from parity.cli.commands import Json, Model, TrustRemoteCode, app
from parity.cli.console import observed, print_json
from parity.errors import UsageError
from parity.options import HOW, RunOptions, shell
from parity.preflight import check_options
from parity.reference.checkpoint import EMBEDDED

Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. [default: the checkpoint's]", rich_help_panel=HOW)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …", rich_help_panel=HOW)]
Attention = Annotated[str, typer.Option(help="The reference's attention: eager or sdpa.", rich_help_panel=HOW)]


@app.command()
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
