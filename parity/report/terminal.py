"""The report as text: the answer first, then the table of layers, then details on demand."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity import words
from parity.columns import LAYER_COLUMNS, SITE_COLUMNS
from parity.dump_coverage import DumpCheck
from parity.report.layers import LayerRow, rows
from parity.report.summaries import COSTS, costs, invisible
from parity.report.text import (
    count_layers,
    ending,
    explanation,
    families,
    number,
    plural,
    quoted,
    ranges,
    span,
    times,
    visible,
    where,
)
from parity.results import SEVERITY, Comparison, Finding

CHECK_STYLES = {"present": "green", "missing": "yellow", "misshapen": "bold red", "ambiguous": "bold red"}
_MOST_UNKNOWN = 10
_MOST_FAULTS = 3
_MOST_LAYERS = 6
_MOST_COSTS = 10
# The columns of a table of layers that are never left out: up to the name of the worst site.
_LEAST = 5
_BETWEEN = 2
_NAMES = ("layer", "verdict", "at")
_NUMBERS = (
    "ratio: local error / the reference's own rounding, on the same inputs (= bit-equal); "
    "MSE and cosine: against the reference's own run, inherited error included"
)
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
    """Print a Comparison: verdict, findings, next token, power, the worst layers; all of each if `verbose`."""
    line(
        console,
        Text.assemble((comparison.verdict.upper(), STYLES[comparison.verdict]), "  ", visible(comparison.headline)),
    )
    line(console, Text(_asked(comparison), style="dim"))
    layers = count_layers(comparison)
    for position, finding in enumerate(comparison.findings, 1):
        console.print()
        _finding(position, finding, layers, console, verbose=verbose)
    if comparison.findings:
        console.print()
    for sentence in ending(comparison, token=quoted, prose=visible):
        line(console, Text(sentence))
    _costs(comparison, console, verbose=verbose)
    for check in comparison.checks:
        if not check.ok:
            line(console, Text(f"check failed: {visible(check.name)}: {visible(check.detail)}", style="yellow"))
    for trouble in comparison.troubles:
        line(console, Text(f"failed: {visible(words.trouble(trouble))}", style="yellow"))
    _power(comparison, console, verbose=verbose)
    console.print()
    _layers(rows(comparison.sites), console, verbose=verbose)
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


def _finding(position: int, finding: Finding, layers: int, console: Console, *, verbose: bool) -> None:
    head = Text.assemble(
        f"{position:2d}  ", (families(finding), "bold"), "  ", (finding.verdict, STYLES[finding.verdict])
    )
    line(console, head)
    first = f", {begins}" if (begins := words.begins(finding)) else ""
    line(console, Text(f"{where(finding, layers)}, local error {times(finding.ratio)} the floor{first}"), 4)
    fault = finding.fault
    if fault is not None:
        line(console, Text(visible(fault.title), style="bold"), 4)
        for sentence in explanation(fault):
            line(console, Text(sentence), 4)
        line(console, Text.assemble(("fix: ", "green"), visible(fault.fix)), 4)
    else:
        line(console, Text("no known fault matched"), 4)
    # Where the cause is named, how the error looks helps only who doubts it.
    for sentence in finding.evidence if verbose or fault is None else ():
        line(console, Text(visible(sentence), style="dim" if fault else ""), 4)
    if finding.span:
        line(console, Text(span(finding)), 4)


def _costs(comparison: Comparison, console: Console, *, verbose: bool) -> None:
    """The quantized tensors that move the logits most; all of them if `verbose`."""
    rows = costs(comparison)
    if not rows:
        return
    table = Table(*COSTS, box=None, pad_edge=False)
    for row in rows if verbose else rows[:_MOST_COSTS]:
        table.add_row(*row)
    console.print(table)
    if len(rows) > _MOST_COSTS and not verbose:
        line(console, Text(f"… and {len(rows) - _MOST_COSTS} tensors that cost less (--verbose)", style="dim"))


def _power(comparison: Comparison, console: Console, *, verbose: bool) -> None:
    """The faults that this run could not have revealed: how many, and a few; all, by reason, if `verbose`."""
    groups = invisible(comparison)
    if not groups:
        return
    if verbose:
        for reason, faults in groups:
            names = ", ".join(f"{id} ({detail})" if detail else id for id, detail in faults)
            line(console, Text(f"could not have been seen with this run, {reason}: {names}", style="dim"))
        return
    ids = [id for _, faults in groups for id, _ in faults]
    some = f"{', '.join(ids[:_MOST_FAULTS])}{', …' if len(ids) > _MOST_FAULTS else ''}"
    said = f"could not have been seen with this run: {plural(len(ids), 'known fault')} ({some}); -v says why"
    line(console, Text(said, style="dim"))


def _layers(layer_rows: Sequence[LayerRow], console: Console, *, verbose: bool) -> None:
    """The worst layers in order of execution, all if `verbose`, and what their numbers are."""
    if not verbose and len(layer_rows) > _MOST_LAYERS and all(row.verdict == "exact" for row in layer_rows):
        said = f"layers: all {len(layer_rows)} rows exact, bit-equal to the reference on the same inputs; -v shows them"
        line(console, Text(said, style="dim"))
        return
    worst = sorted(layer_rows, key=lambda row: row.rank)[: None if verbose else _MOST_LAYERS]
    shown = [row for row in layer_rows if any(row is each for each in worst)]
    console.print(_layer_table(shown, console.width))
    if rest := [row for row in layer_rows if not any(row is each for each in worst)]:
        verdicts = [row.verdict for row in rest]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in SEVERITY if v in verdicts)
        line(console, Text(f"and {plural(len(rest), 'more row')}: {counts}; -v shows them", style="dim"))
    line(console, Text(_NUMBERS, style="dim"))


def _layer_table(layer_rows: Sequence[LayerRow], width: int) -> Table:
    """The table, without the last columns of numbers if the names would not fit beside them."""
    table = [_cells(row) for row in layer_rows]
    heads = ["layer", "verdict", "sites", "ratio", "at", *(f"worst {column.title}" for column in LAYER_COLUMNS[1:])]
    columns = zip(heads, *([cell.plain for cell in cells] for cells in table), strict=True)
    needed = [max(map(len, column)) + _BETWEEN for column in columns]
    count = next((n for n in range(len(heads), _LEAST, -1) if sum(needed[:n]) - _BETWEEN <= width), _LEAST)
    made = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads[:count]:
        # Where even the fewest columns are too wide, the name goes on in the next line.
        made.add_column(
            head, justify="left" if head in _NAMES else "right", no_wrap=head != "at", overflow="fold", min_width=4
        )
    for cells in table:
        made.add_row(*cells[:count])
    return made


def _cells(row: LayerRow) -> list[Text]:
    """The cells of a layer; "=" in place of a ratio where every measured site is bit-equal."""
    ratio, *others = row.worst
    share = f"{row.measured}/{row.known}"
    return [
        Text(visible(row.label)),
        Text(row.verdict, style=STYLES[row.verdict]),
        Text(share, style="" if row.measured == row.known else "yellow"),
        Text("=" if row.verdict == "exact" else number(ratio.value)),
        Text("" if row.verdict == "exact" or row.known == 1 else visible(ratio.site)),
        *(Text(number(each.value, each.column.form)) for each in others),
    ]


def _site_table(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("verdict", no_wrap=True)
    for column in SITE_COLUMNS:
        table.add_column(column.title, justify="right", no_wrap=True)
    table.add_column("site", overflow="fold")
    for m in comparison.sites:
        table.add_row(
            Text(m.verdict, style=STYLES[m.verdict]),
            *(number(getattr(m, column.key), column.form) for column in SITE_COLUMNS),
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
        near = f"; is it {check.near[name]}? Map it with --names." if name in check.near else ""
        console.print(Text(f"not a site of the reference: {visible(name)}{near}"))
    if len(check.unknown) > _MOST_UNKNOWN:
        console.print(f"… and {len(check.unknown) - _MOST_UNKNOWN} more names that the reference does not have")
