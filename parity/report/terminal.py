"""The report as text: the answer first, then the table of layers, then details on demand."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity.report.layers import LayerRow, rows
from parity.results import Comparison, DumpCheck, Finding, NextToken

CHECK_STYLES = {"present": "green", "missing": "yellow", "misshapen": "bold red", "ambiguous": "bold red"}
_MOST_UNKNOWN = 10
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
    """Print a Comparison: verdict, findings, next token, layers; every site if `verbose`."""
    env = comparison.environment
    console.print(Text.assemble((comparison.verdict.upper(), STYLES[comparison.verdict]), "  ", comparison.headline))
    coverage = comparison.coverage
    console.print(
        f"{env.candidate} against {env.model}: sites {coverage.measured}/{coverage.known} measured, "
        f"tokens {env.tokens}{f' x {env.batch}' if env.batch > 1 else ''}, {env.working_dtype} on {env.device}",
        markup=False,
        highlight=False,
    )
    for number, finding in enumerate(comparison.findings, 1):
        _finding(number, finding, console)
    _next_token(comparison, console)
    for check in comparison.checks:
        if not check.ok:
            console.print(Text(f"check failed: {check.name}: {check.detail}", style="yellow"))
    console.print()
    console.print(_layer_table(rows(comparison.sites), full=verbose or not comparison.findings))
    if verbose:
        console.print(_site_table(comparison))


def _finding(number: int, finding: Finding, console: Console) -> None:
    head = Text(f"{number:2d}  ")
    head.append(finding.family, style="bold")
    head.append(f"  {finding.verdict}", style=STYLES[finding.verdict])
    head.append(f"  {_layers(finding)}  {_number(finding.ratio)}x the floor")
    if finding.first_token is not None:
        head.append(f", first at token {finding.first_token}")
    console.print(head)
    for line in finding.evidence:
        console.print(Text("    " + line))
    if finding.span:
        console.print(Text(f"    or in one of {len(finding.span)} unmeasured sites before it, from {finding.span[0]}"))


def _layers(finding: Finding) -> str:
    if not finding.layers:
        return "outside the layers"
    if len(finding.layers) == 1:
        return f"layer {finding.layers[0]} only"
    return f"{len(finding.layers)} layers ({ranges(finding.layers)})"


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text: 0-3, 7, 9-12."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _next_token(comparison: Comparison, console: Console) -> None:
    token: NextToken | None = comparison.next_token
    if token is not None:
        ours, theirs = token.reference[0], token.candidate[0]
        console.print(
            f"next token: reference {ours.text!r} ({ours.logit:.2f}), candidate {theirs.text!r} ({theirs.logit:.2f})",
            markup=False,
            highlight=False,
        )
        if token.flips:
            explained = (
                "all explained by rounding"
                if not token.unexplained_flips
                else f"{token.unexplained_flips} not explained"
            )
            console.print(
                f"top token differs at {token.flips} of {token.positions} positions, {explained}",
                highlight=False,
            )
    console.print(comparison.answer, markup=False, highlight=False)


def _layer_table(layer_rows: Sequence[LayerRow], *, full: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("sites", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("at", no_wrap=True, overflow="ellipsis", max_width=22)
    table.add_column("worst MSE", justify="right", no_wrap=True)
    table.add_column("worst cosine", justify="right", no_wrap=True)
    for row in layer_rows:
        table.add_row(
            row.label,
            Text(row.verdict, style=STYLES[row.verdict]),
            f"{row.measured}/{row.known}",
            _number(row.ratio),
            Text(row.ratio_site),
            _number(row.mse, "{:.2e}"),
            _number(row.cosine, "{:.7f}"),
        )
    return table


def _site_table(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("site", "verdict", "ratio", "local", "inherited", "floor"):
        table.add_column(name, justify="left" if name in ("site", "verdict") else "right", no_wrap=name != "site")
    for m in comparison.sites:
        table.add_row(
            Text(m.site),
            Text(m.verdict if m.verdict != "unmeasured" else f"unmeasured: {m.reason}", style=STYLES[m.verdict]),
            _number(m.ratio),
            *(_number(value, "{:.1e}") for value in (m.local_rel, m.inherited_rel, m.floor_rel)),
        )
    return table


def show_check(check: DumpCheck, console: Console) -> None:
    """Print what `parity check` found: a line for each family in each state."""
    counts = {state: sum(f.sites for f in check.families if f.state == state) for state in CHECK_STYLES}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    for f in check.families:
        if f.state == "present":
            continue
        where = f" (layers {ranges(f.layers)})" if f.layers else ""
        console.print(Text.assemble((f.state, CHECK_STYLES[f.state]), f"  {f.family}{where}: {f.detail}"))
    for name in check.unknown[:_MOST_UNKNOWN]:
        console.print(Text(f"not a site of the reference: {name}"))
    if len(check.unknown) > _MOST_UNKNOWN:
        console.print(f"… and {len(check.unknown) - _MOST_UNKNOWN} more names that the reference does not have")


def _number(value: float | None, form: str = "") -> str:
    if value is None:
        return "–"
    if form:
        return form.format(value)
    return f"{value:.2f}" if value < 10 else f"{value:.0f}" if value < 1e5 else f"{value:.1e}"
