"""Two engines side by side: in the terminal, as Markdown and as a page, all from the same rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity import words
from parity.engine_report import Contrast, Distance
from parity.json_values import to_json
from parity.report.engine_page import render_contrast
from parity.report.files import write_all, write_texts
from parity.report.layers import LayerRow, rows
from parity.report.markdown import code
from parity.report.markdown import escape as in_markdown
from parity.report.terminal import STYLES, line
from parity.report.text import count_layers, families, number, visible, where
from parity.results import Comparison
from parity.sites import group_label

HEADS = ("layer", "first", "ratio", "second", "ratio", "distance", "rounding makes", "times")
_LEGEND = (
    "ratio: local error of each engine on its own inputs, over the reference's own rounding; distance: between both, "
    "relative; rounding makes: what two runs of the reference would differ by if they rounded apart"
)


@dataclass(frozen=True)
class _Row:
    """A layer in both engines: worst verdicts and ratios, and the farthest site in units of its floor."""

    cells: tuple[str, ...]
    verdicts: tuple[str, str]


def headline(c: Contrast) -> str:
    """What there is to say first."""
    each = "; ".join(
        f"{name}: {side.verdict}, {side.headline}" for name, side in (("first", c.first), ("second", c.second))
    )
    return f"the weights differ: {c.weights}; each on its own weights: {each}" if c.weights else each


def sentences(c: Contrast) -> Iterator[str]:
    """What follows the headline, a sentence each."""
    for name, side in (("first", c.first), ("second", c.second)):
        yield f"{name}: {called(c, side)}, {side.environment.working_dtype}; {side.answer}"
        layers = count_layers(side)
        for finding in side.findings:
            fault = f": {finding.fault.title}" if finding.fault else ": no known fault matched"
            size = f"local error {number(finding.ratio)}x the floor"
            yield f"{name}, wrong: {families(finding)}, {where(finding, layers)}, {size}{fault}"
        yield from (f"{name}, check failed: {check.name}: {check.detail}" for check in side.checks if not check.ok)
        yield from (f"{name}, failed: {words.trouble(trouble)}" for trouble in side.troubles)
    if not c.distances:
        yield "no site was recorded by both, so their distance is not known"
        return
    if c.apart:
        yield f"the first other {c.compared} are at {c.apart[0].site}"
    else:
        yield f"both have the same {c.compared} at every site"
    if c.agreeing is not None:
        yield f"the same top token at {c.agreeing} of {c.positions} positions"
    for span in c.logprobs:
        tokens = f"token {span.start}" if span.start == span.end else f"tokens {span.start} to {span.end}"
        yield f"{tokens}: mean |Δ log p| {span.mean_abs:.3g}, rounding makes {span.floor:.3g}"


def called(c: Contrast, side: Comparison) -> str:
    """An engine as its dump calls it, and the dump."""
    file, name = side.environment.candidate, c.engines[side is c.second]
    return f"{name} ({file})" if name and name != file else file


def show_contrast(c: Contrast, console: Console) -> None:
    """Print both engines side by side."""
    line(console, Text.assemble((c.verdict.upper(), STYLES[c.verdict]), "  ", visible(headline(c))))
    for sentence in sentences(c):
        line(console, Text(visible(sentence)))
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("layer", "first", "second") else "right")
    for row in _rows(c):
        cells = [Text(cell) for cell in row.cells]
        cells[1].stylize(STYLES.get(row.verdicts[0], ""))
        cells[3].stylize(STYLES.get(row.verdicts[1], ""))
        table.add_row(*cells)
    console.print(table)
    line(console, Text(_LEGEND, style="dim"))


def write_contrast(c: Contrast, folder: Path) -> Path:
    """Write index.html, report.md and report.json, and the report of each engine in a folder of its own.

    Returns the path of the page.
    """
    for name, side in (("first", c.first), ("second", c.second)):
        write_all(side, folder / name, plots=False)
    texts = {
        "report.json": json.dumps(as_json(c), indent=1) + "\n",
        "report.md": _markdown(c),
        "index.html": render_contrast(c, HEADS, _rows(c), _LEGEND),
    }
    write_texts(folder, texts)
    return folder / "index.html"


def as_json(c: Contrast) -> dict[str, object]:
    """The contrast as JSON values, with its verdict."""
    return {"verdict": c.verdict, **to_json(c)}


def _rows(c: Contrast) -> list[_Row]:
    farthest: dict[str, Distance] = {}
    for d in c.distances:
        label = group_label(d.site)
        farthest[label] = max(farthest.get(label, d), d, key=lambda one: one.ratio)
    sides = [{row.label: row for row in rows(side.sites)} for side in (c.first, c.second)]
    labels = [*sides[0], *(label for label in sides[1] if label not in sides[0])]
    return [_row(label, sides, farthest.get(label)) for label in labels]


def _row(label: str, sides: Sequence[Mapping[str, LayerRow]], d: Distance | None) -> _Row:
    cells, verdicts = [visible(label)], list[str]()
    for side in sides:
        found = side.get(label)
        verdicts.append(found.verdict if found else "unmeasured")
        cells += [verdicts[-1], number(found.worst[0].value) if found else "–"]
    cells += [f"{d.distance:.3g}", f"{d.floor:.3g}", number(d.ratio)] if d else ["–", "–", "–"]
    return _Row(tuple(cells), (verdicts[0], verdicts[1]))


def _markdown(c: Contrast) -> str:
    lines = [f"## {c.verdict.upper()}: {in_markdown(headline(c))}", ""]
    lines += [f"- {in_markdown(sentence)}" for sentence in sentences(c)]
    lines += ["", f"| {' | '.join(HEADS)} |", f"|{':--|' * len(HEADS)}"]
    lines += [f"| {' | '.join(map(in_markdown, row.cells))} |" for row in _rows(c)]
    lines += ["", _LEGEND, "", f"Again: {code(c.first.environment.command)}"]
    return "\n".join(lines) + "\n"
