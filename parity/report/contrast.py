"""Two engines side by side: in the terminal, as Markdown and as a page, all from the same rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity import words
from parity.engine_report import Contrast, Distance
from parity.json_values import to_json
from parity.report.files import write_all
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
    apart = next((d for d in c.distances if not d.bit_equal), None)
    yield "both have the same bits at every site" if apart is None else f"the first other bits are at {apart.site}"
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
    folder.mkdir(parents=True, exist_ok=True)
    for name, side in (("first", c.first), ("second", c.second)):
        write_all(side, folder / name, plots=False)
    (folder / "report.json").write_text(json.dumps(as_json(c), indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(c), encoding="utf-8")
    page = folder / "index.html"
    page.write_text(_page(c), encoding="utf-8")
    return page


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


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.15rem .8rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f5f5f5}"
    ".wrong,.nonfinite,.diverged{color:#b00020;font-weight:600}.imprecise,.inconclusive{color:#8a6100}"
    ".rounding,.exact,.match{color:#1b6e2d}.unmeasured{color:#777}"
    ".sides{display:grid;grid-template-columns:1fr 1fr;gap:2rem}"
)


def _page(c: Contrast) -> str:
    """One file that needs no network; both columns link to the whole report of their engine."""

    def side(name: str, one: Comparison) -> str:
        return (
            f'<section><h2>{name}: <span class="{one.verdict}">{one.verdict}</span></h2>'
            f"<p>{_text(one.environment.candidate)}</p><p>{_text(one.headline)}</p>"
            f'<p><a href="{name}/index.html">its whole report</a></p></section>'
        )

    listed = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences(c))
    heads = "".join(f"<th>{head}</th>" for head in HEADS)
    body = "".join(
        "<tr>" + "".join(f'<td class="{_text(cell)}">{_text(cell)}</td>' for cell in row.cells) + "</tr>"
        for row in _rows(c)
    )
    differ = f"<p><strong>The weights differ: {_text(c.weights)}</strong></p>" if c.weights else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>parity: two engines</title>'
        f"<style>{_STYLE}</style></head><body>"
        f'<h1 class="{c.verdict}">{c.verdict.upper()}</h1>{differ}'
        f'<div class="sides">{side("first", c.first)}{side("second", c.second)}</div>'
        f"<ul>{listed}</ul><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>{_LEGEND}</p></body></html>\n"
    )


def _text(value: str) -> str:
    return escape(visible(value))
