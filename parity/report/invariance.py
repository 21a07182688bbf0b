"""What varies with what: a line for each kind of operation and setting, in the terminal, as Markdown and as a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity.invariance_report import Invariance, Variance
from parity.json_values import to_json
from parity.report.files import write_texts
from parity.report.html import page
from parity.report.markdown import code, escape
from parity.report.terminal import STYLES, line
from parity.report.text import number, plural, ranges, visible
from parity.sites import family, layer_of, short

HEADS = ("operation", "layers", "setting", "floors", "the reference too")
_LEGEND = "floors: distance from the first run, on the same inputs, over the reference's own rounding there"


def invariance_headline(found: Invariance) -> str:
    """What the verdict rests on."""
    if not found.measured:
        return "no operation of the candidate could be lined up in all settings"
    if not found.variances:
        return f"the same bits at all {found.measured} sites in every setting"
    if beyond := found.beyond_rounding:
        first = beyond[0]
        return f"{first.site} varies by {number(first.floors)} floors {_with(first.setting)}: more than rounding"
    first = found.variances[0]
    sites = len({v.site for v in found.variances})
    where = f"{sites} of {plural(found.measured, 'site')}"
    return f"other bits at {where}, all within rounding; the first is {first.site} {_with(first.setting)}"


def _with(setting: str) -> str:
    return setting if setting.startswith("against ") else f"with {setting}"


def show_invariance(found: Invariance, console: Console) -> None:
    """Print the verdict, and the table of what varies."""
    head = Text.assemble((found.verdict.upper(), STYLES[found.verdict]), "  ", visible(invariance_headline(found)))
    line(console, head)
    line(console, Text(f"{visible(found.candidate)}: {', '.join(map(visible, found.settings))}", style="dim"))
    for sentence in _remarks(found):
        line(console, Text(visible(sentence)))
    if found.variances:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in HEADS:
            table.add_column(title, justify="right" if title == "floors" else "left", overflow="fold")
        for row in _rows(found):
            table.add_row(*map(visible, row))
        console.print()
        console.print(table)
        line(console, Text(_LEGEND, style="dim"))


def write_invariance(found: Invariance, folder: Path) -> Path:
    """Write index.html, report.md and report.json; returns the path of the page. Raises UsageError."""
    texts = {
        "report.json": json.dumps(as_json(found), indent=1) + "\n",
        "report.md": _markdown(found),
        "index.html": _page(found),
    }
    write_texts(folder, texts)
    return folder / "index.html"


def as_json(found: Invariance) -> dict[str, object]:
    """The result as JSON values, with its verdict."""
    return {"verdict": found.verdict, **to_json(found)}


def _markdown(found: Invariance) -> str:
    lines = [f"## {found.verdict.upper()}: {escape(invariance_headline(found))}", ""]
    lines += [f"- {escape(found.candidate)}: {escape(', '.join(found.settings))}"]
    lines += [f"- {escape(remark)}" for remark in _remarks(found)]
    if found.variances:
        lines += ["", f"| {' | '.join(HEADS)} |", f"|{':--|' * len(HEADS)}"]
        lines += [f"| {' | '.join(map(escape, row))} |" for row in _rows(found)]
        lines += ["", _LEGEND]
    return "\n".join([*lines, "", f"Again: {code(found.command)}", ""])


def _page(found: Invariance) -> str:
    return page(
        "invariance.html.j2",
        "engines.css",
        c=found,
        headline=invariance_headline(found),
        remarks=list(_remarks(found)),
        heads=HEADS,
        rows=list(_rows(found)),
        legend=_LEGEND,
    )


def _remarks(found: Invariance) -> Iterator[str]:
    quiet = [s for s in found.settings if not any(v.setting == s for v in found.variances)]
    if quiet and found.variances:
        yield f"the same bits everywhere with: {', '.join(quiet)}"
    if found.of_reference:
        varying = dict.fromkeys(v.setting for v in found.of_reference)
        sites = len({v.site for v in found.of_reference})
        yield f"the reference itself ({found.reference}) gives other bits at {sites} sites with: {', '.join(varying)}"
    else:
        yield f"the reference itself ({found.reference}) gives the same bits in all these settings"
    if found.unread:
        yield f"{plural(len(found.unread), 'site')} could not be lined up in a setting: {', '.join(found.unread[:4])}"


def _rows(found: Invariance) -> Iterator[Sequence[str]]:
    groups: dict[tuple[str, str], list[Variance]] = {}
    for variance in found.variances:
        groups.setdefault((family(variance.site), variance.setting), []).append(variance)
    reference = {(family(v.site), v.setting) for v in found.of_reference}
    for (name, setting), group in groups.items():
        layers = ranges(n for v in group if (n := layer_of(v.site)) is not None)
        worst = max((v.floors for v in group if v.floors is not None), default=None)
        too = "not asked" if setting.startswith("against ") else "yes" if (name, setting) in reference else "no"
        yield short(group[0].site), layers, setting, number(worst), too
