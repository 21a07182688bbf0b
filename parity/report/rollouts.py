"""A rollout's report as text: the verdict, what explains it, the usual figures beside their floors, by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity.report.terminal import STYLES, line
from parity.report.text import number, plural, ranges, visible
from parity.results import ROUNDING
from parity.rollout_report import Cause, Figure, RolloutReport, Stretch


def show_rollouts(report: RolloutReport, console: Console) -> None:
    """Print the report."""
    line(
        console,
        Text.assemble((report.verdict.upper(), STYLES[report.verdict]), "  ", visible(headline(report))),
    )
    env = report.environment
    asked = f", temperature {report.asked:g}" if report.asked != 1 else ""
    sides = f"{visible(env.candidate)} ({report.format}) against {visible(env.model)}"
    amount = f"{plural(report.tokens, 'token')} of {plural(report.rows, 'row')}"
    line(console, Text(f"{sides}: {amount}, {visible(env.working_dtype)} on {visible(env.device)}{asked}", style="dim"))
    for sentence in remarks(report):
        line(console, Text(visible(sentence)))
    console.print()
    console.print(_table(("figure", "value", "rounding makes", "up to", "usual alarm"), _figures(report.figures)))
    console.print()
    console.print(_table(("sampled token", "tokens", "mean |Δ|", "rounding makes", "ratio"), _lines(report.stretches)))
    line(
        console,
        Text(
            "Δ: the file's log-probability less the reference's; rounding makes: the same figure of engines that only "
            "round, drawn at random; ratio: distance from the exact values over that of rounding",
            style="dim",
        ),
    )


def headline(report: RolloutReport) -> str:
    """What the verdict rests on."""
    if report.nonfinite:
        return f"{plural(report.nonfinite, 'log-probability', 'log-probabilities')} not finite"
    if report.causes:
        return cause_in_words(report.causes[0], report.asked)
    if report.positive:
        return f"{report.positive} of {report.tokens} numbers are above 0: these are no log-probabilities"
    if report.verdict == "match":
        return f"the log-probabilities are within rounding in {report.environment.working_dtype}"
    if report.far_rows:
        rows = ranges(report.far_rows)
        return f"rows {rows} (from 0) are far off, the others are rounding: as after an update of the weights"
    if report.verdict == "inconclusive":
        return f"{number(report.ratio)}x as far off as rounding: more than it usually makes, less than a bug must"
    if report.starts:
        where = f"from sampled token {report.starts} on: the cache, or what decoding does otherwise than the prompt"
    else:
        where = "from the first sampled token on: other weights or a wrong operation"
    return f"{number(report.ratio)}x as far off as rounding, {where}"


def cause_in_words(cause: Cause, asked: float) -> str:
    """What reproduces the log-probabilities."""
    if cause.kind == "shift":
        where = "later" if cause.value > 0 else "earlier"
        return f"shifted: each log-probability is that of the token one {where}"
    if cause.kind == "temperature":
        return _temperature(cause, asked)
    if cause.kind == "fault":
        return cause.title
    if cause.kind == "checkpoint":
        return f"stale weights: the log-probabilities are those of {cause.id}"
    if cause.kind == "top-k":
        return f"renormalized over the {cause.value:g} likeliest tokens (top-k {cause.value:g})"
    return f"renormalized over the likeliest tokens that make up {cause.value:g} (top-p {cause.value:g})"


def _temperature(cause: Cause, asked: float) -> str:
    read = f"they are those at temperature {cause.value:.4g} ± {cause.stderr:.1g}"
    slack = max(5 * cause.stderr, 1e-3 * asked)
    if asked != 1 and abs(cause.value - asked**2) <= slack:
        return f"the temperature {asked:g} is applied twice: {read}"
    if asked != 1 and abs(cause.value - 1) <= slack:
        return f"the temperature {asked:g} is not applied: {read}"
    return f"another temperature than {asked:g}: {read}"


def remarks(report: RolloutReport) -> Iterator[str]:
    """What else there is to say, a sentence each."""
    for position, cause in enumerate(report.causes):
        if position:
            yield f"cannot be told apart from: {cause_in_words(cause, report.asked)}"
        else:
            yield (
                f"explains {100 * cause.explained:.4g} % of the error, remainder {number(cause.remainder)}x "
                "what rounding makes"
            )
    if report.verdict != "match" and not report.causes and not report.far_rows:
        yield (
            "no temperature, shift, truncation, cache format or --earlier checkpoint explains it; record a dump of the "
            "engine for one of these prompts, and `parity diff` says which operation it is"
        )
    if report.starts is not None:
        yield f"the first {plural(report.starts, 'sampled token')} of the rows are rounding, later ones are not"
    if report.storage:
        yield f"the file holds its numbers with {report.storage}; the floor allows for that"
    if report.unread:
        yield f"{plural(report.unread, 'token')} without a log-probability, or masked: not judged"
    if report.positive and report.causes:
        yield f"{report.positive} numbers are above 0, which no log-probability is"


def _figures(figures: Sequence[Figure]) -> list[list[str]]:
    return [
        [f.title, _three(f.value), _three(f.floor), _three(f.farthest), "" if f.alarm is None else f"{f.alarm:g}"]
        for f in figures
    ]


def _lines(stretches: Sequence[Stretch]) -> list[list[str]]:
    return [
        [
            str(s.start) if s.start == s.end else f"{s.start} to {s.end}",
            str(s.tokens),
            _three(s.mean_abs),
            _three(s.floor),
            f"{number(s.ratio)}{'' if s.ratio <= ROUNDING else ' *'}",
        ]
        for s in stretches
    ]


def _three(value: float) -> str:
    """Three digits, or as many as tell a number near 1 from it."""
    return f"{value:.7f}".rstrip("0") if 0.9 < abs(value) < 1.1 else f"{value:.3g}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        made.add_column(head, justify="left" if head == heads[0] else "right")
    for row in rows:
        made.add_row(*row)
    return made
