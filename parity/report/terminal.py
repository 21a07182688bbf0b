"""The report as text: the answer first, then the table of layers, then details on demand."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity import words
from parity.report.layers import LayerRow, rows
from parity.report.summaries import invisible
from parity.report.text import (
    count_layers,
    ending,
    explanation,
    families,
    number,
    quoted,
    ranges,
    span,
    times,
    visible,
    where,
)
from parity.results import Comparison, DumpCheck, Finding

CHECK_STYLES = {"present": "green", "missing": "yellow", "misshapen": "bold red", "ambiguous": "bold red"}
_MOST_UNKNOWN = 10
_MOST_FAULTS = 4
STYLES = {
    "match": "bold green",
    "diverged": "bold red",
    "inconclusive": "bold yellow",
    "exact": "green",
    "rounding": "green",
    "imprecise": "yellow",
    "wrong": "bold red",
    "nonfinite": "bold red",
    "unmeasured": "dim",
}


def show(comparison: Comparison, console: Console, *, verbose: bool = False) -> None:
    """Print a Comparison: verdict, findings, next token, power, layers; every site if `verbose`."""
    line(
        console,
        Text.assemble((comparison.verdict.upper(), STYLES[comparison.verdict]), "  ", visible(comparison.headline)),
    )
    line(console, Text(_asked(comparison), style="dim"))
    layers = count_layers(comparison)
    for position, finding in enumerate(comparison.findings, 1):
        console.print()
        _finding(position, finding, layers, console)
    if comparison.findings:
        console.print()
    for sentence in ending(comparison, token=quoted, prose=visible):
        line(console, Text(sentence))
    for check in comparison.checks:
        if not check.ok:
            line(console, Text(f"check failed: {visible(check.name)}: {visible(check.detail)}", style="yellow"))
    _power(comparison, console, verbose=verbose)
    console.print()
    console.print(_layer_table(rows(comparison.sites)))
    if verbose:
        console.print()
        console.print(_site_table(comparison))


def line(console: Console, text: Text, indent: int = 0) -> None:
    """Print one sentence, wrapped at the edge, its further lines indented like its first."""
    for part in text.wrap(console, max(console.width - indent, 20)):
        part.rstrip()
        console.print(Text(" " * indent).append(part), soft_wrap=True)


def _asked(comparison: Comparison) -> str:
    env, coverage = comparison.environment, comparison.coverage
    tokens = f"tokens {env.tokens}{f' x {env.batch}' if env.batch > 1 else ''}"
    sites = f"sites {coverage.measured}/{coverage.known} measured"
    sides = f"{visible(env.candidate)} against {visible(env.model)}"
    return f"{sides}: {sites}, {tokens}, {visible(env.working_dtype)} on {visible(env.device)}"


def _finding(position: int, finding: Finding, layers: int, console: Console) -> None:
    head = Text.assemble(
        f"{position:2d}  ", (families(finding), "bold"), "  ", (finding.verdict, STYLES[finding.verdict])
    )
    line(console, head)
    first = f", first at token {finding.first_token}" if finding.first_token is not None else ""
    line(console, Text(f"{where(finding, layers)}, local error {times(finding.ratio)} the floor{first}"), 4)
    fault = finding.fault
    if fault is not None:
        line(console, Text(visible(fault.title), style="bold"), 4)
        for sentence in explanation(fault):
            line(console, Text(sentence), 4)
        line(console, Text.assemble(("fix: ", "green"), visible(fault.fix)), 4)
    for sentence in finding.evidence:
        line(console, Text(visible(sentence), style="dim" if fault else ""), 4)
    if finding.span:
        line(console, Text(span(finding)), 4)


def _power(comparison: Comparison, console: Console, *, verbose: bool) -> None:
    """The faults that this run could not have revealed, by reason; a few of each unless `verbose`."""
    groups = invisible(comparison)
    if not groups:
        return
    parts = []
    for reason, faults in groups:
        names = [f"{id} ({detail})" if detail and verbose else id for id, detail in faults]
        shown = names if verbose else names[:_MOST_FAULTS]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        parts.append(f"{', '.join(shown)}{more} [{reason}]")
    line(console, Text("could not have been seen with this run: " + "; ".join(parts), style="dim"))


def _layer_table(layer_rows: Sequence[LayerRow]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("sites", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    # The one column that may shrink.
    table.add_column("at", overflow="ellipsis", max_width=22)
    table.add_column("worst MSE", justify="right", no_wrap=True)
    table.add_column("worst cosine", justify="right", no_wrap=True)
    for row in layer_rows:
        table.add_row(
            visible(row.label),
            Text(row.verdict, style=STYLES[row.verdict]),
            f"{row.measured}/{row.known}",
            number(row.ratio),
            Text(visible(row.ratio_site)),
            number(row.mse, ".2e"),
            number(row.cosine, ".7f"),
        )
    return table


def _site_table(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("verdict", no_wrap=True)
    for name in ("ratio", "local", "inherited", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("site", overflow="fold")
    for m in comparison.sites:
        table.add_row(
            Text(m.verdict, style=STYLES[m.verdict]),
            number(m.ratio),
            *(number(value, ".1e") for value in (m.local_rel, m.inherited_rel, m.floor_rel)),
            Text(visible(m.site) + (f": {visible(words.reason(m))}" if m.verdict == "unmeasured" else "")),
        )
    return table


def show_check(check: DumpCheck, console: Console) -> None:
    """Print what `parity check` found: a line for each family in each state."""
    counts = {state: sum(f.sites for f in check.families if f.state == state) for state in CHECK_STYLES}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    for f in check.families:
        if f.state == "present":
            continue
        layers = f" (layers {ranges(f.layers)})" if f.layers else ""
        head = Text(f.state, style=CHECK_STYLES[f.state])
        console.print(head + Text(f"  {visible(f.family)}{layers}: {visible(f.detail)}", style="default"))
    for name in check.unknown[:_MOST_UNKNOWN]:
        console.print(Text(f"not a site of the reference: {visible(name)}"))
    if len(check.unknown) > _MOST_UNKNOWN:
        console.print(f"… and {len(check.unknown) - _MOST_UNKNOWN} more names that the reference does not have")
