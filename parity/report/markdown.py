"""The report as Markdown for a pull request. What a model, a prompt or a dump wrote stays text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from parity import words
from parity.columns import LAYER_COLUMNS
from parity.errors import UsageError
from parity.report import summaries, text
from parity.report.layers import LayerRow, rows
from parity.results import Comparison, Finding
from parity.words import begins as begins_of

# Longer tables are folded away.
_LONG = 12
# What means something in Markdown or HTML inside a line; an underscore inside a word does not.
_MEANING = re.compile(r"[\\`*\[\]<>#|~$&@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.")
# What means something at the beginning of one.
_MARKER = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[-+=]))(.)")
_SIGNS = {"match": "✅", "diverged": "❌", "inconclusive": "⚠️"}
# GitHub refuses the whole summary of a step that is larger.
_LARGEST_SUMMARY = 1 << 20
_PICTURES = (
    ("map", "map of layers and sites"),
    ("depth", "error by depth"),
    ("next-token", "next token"),
    ("logits", "logits of both sides at the last token"),
)
_TOO_LONG = "_The rest of this report is too long for a step summary._"


def render(comparison: Comparison, plots: Mapping[str, Path] | None = None, folder: Path | None = None) -> str:
    """The text. `plots` are what `plots.write` returned; links to them are relative to `folder`."""
    pictures = {
        path.stem: os.path.relpath(path, folder) if folder else path.as_posix()
        for name, path in (plots or {}).items()
        if name.endswith(".png")
    }
    parts = (
        _head(comparison),
        _findings(comparison, pictures),
        _layers(comparison, pictures),
        _costs(comparison),
        _end(comparison),
    )
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def append_step_summary(comparison: Comparison) -> None:
    """Append the report, without pictures, to the summary of the running step of a GitHub workflow.

    Does nothing where GITHUB_STEP_SUMMARY is not set. Of a report that no longer fits, the head is written; if not
    even that fits, nothing. Raises UsageError if the file cannot be written.
    """
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return
    path = Path(name)
    try:
        room = _LARGEST_SUMMARY - (path.stat().st_size if path.exists() else 0)
        short = "\n".join([*_head(comparison), _TOO_LONG, ""])
        # What stands there need not end its last line.
        texts = [f"\n{text}\n".encode() for text in (render(comparison), short)]
        with path.open("ab") as summary:
            summary.write(next((text for text in texts if len(text) <= room), b""))
    except OSError as error:
        raise UsageError(
            f"{path}: the step summary cannot be written ({error.strerror}). Unset GITHUB_STEP_SUMMARY."
        ) from error


# -- escaping -------------------------------------------------------------------------------------------------


def escape(value: str) -> str:
    """Text of any origin as text on one line: no markup, no link, no mention."""
    shown = _MARKER.sub(r"\1\\\2", _MEANING.sub(r"\\\g<0>", text.visible(value).strip()))
    shown = shown.replace(r"\<", "&lt;").replace(r"\>", "&gt;").replace(r"\&", "&amp;")
    # Forges link @name and #1 in the rendered text, so an escape is not enough.
    return re.sub(r"\\([@#])(?=\w)", r"\\\1<!-- -->", shown)


def code(value: str, *, cell: bool = False) -> str:
    """Text of any origin as code; in a cell of a table a pipe would end the cell even there."""
    shown = text.visible(value)
    if cell and "|" in shown:
        return f"<code>{re.sub(r'[^A-Za-z0-9 ]', lambda found: f'&#{ord(found[0])};', shown)}</code>"
    if not shown.strip():
        return f"`'{shown}'`"
    fence = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    pad = " " if shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


# -- parts ----------------------------------------------------------------------------------------------------


def _head(comparison: Comparison) -> Iterator[str]:
    env = comparison.environment
    verdict = comparison.verdict
    yield f"## {_SIGNS[verdict]} {verdict.upper()}: {escape(comparison.headline)}"
    yield ""
    tokens = f"{env.tokens}{f' × {env.batch}' if env.batch > 1 else ''} tokens"
    yield (
        f"{code(env.candidate)} against {code(env.model)}: {summaries.coverage(comparison)}, {tokens}, "
        f"{escape(env.working_dtype)} on {escape(env.device)}."
    )
    yield ""
    yield from (f"- {line}" for line in _answers(comparison))
    yield ""


def _answers(comparison: Comparison) -> Iterator[str]:
    yield from text.ending(comparison, token=lambda said: code(text.quoted(said)), prose=escape)
    for check in comparison.checks:
        if not check.ok:
            yield f"**check failed:** {escape(check.name)}: {escape(check.detail)}"
    yield from (f"**failed:** {escape(words.trouble(trouble))}" for trouble in comparison.troubles)


def _findings(comparison: Comparison, pictures: Mapping[str, str]) -> Iterator[str]:
    if not comparison.findings:
        return
    yield "### Findings"
    yield ""
    layers = text.count_layers(comparison)
    for position, finding in enumerate(comparison.findings, 1):
        yield f"**{position}. {code(text.families(finding))}** {finding.verdict}, {_size(finding, layers)}"
        yield ""
        if reasons := list(_reasons(finding)):
            yield from [*reasons, ""]
        if picture := list(_picture(f"finding-{position}", "ratio by token and by head at its worst site", pictures)):
            yield from [*picture, ""]


def _size(finding: Finding, layers: int) -> str:
    first = f", {begins}" if (begins := begins_of(finding)) else ""
    return f"{text.where(finding, layers)}, local error {text.times(finding.ratio)} the floor{first}"


def _reasons(finding: Finding) -> Iterator[str]:
    fault = finding.fault
    if fault is not None:
        yield f"- **{escape(fault.title)}**"
        yield from (f"- {escape(line)}" for line in text.explanation(fault))
        yield f"- **fix:** {escape(fault.fix)}"
    else:
        yield "- no known fault matched"
    yield from (f"- {escape(line)}" for line in finding.evidence)
    if finding.span:
        yield f"- {escape(text.span(finding))}"


def _picture(name: str, about: str, pictures: Mapping[str, str]) -> Iterator[str]:
    if name in pictures:
        yield f"![{about}]({pictures[name].replace(os.sep, '/').replace(' ', '%20')})"


def _layers(comparison: Comparison, pictures: Mapping[str, str]) -> Iterator[str]:
    table = rows(comparison.sites)
    yield "### Layers"
    yield ""
    for name, about in _PICTURES:
        if picture := list(_picture(name, about, pictures)):
            yield from [*picture, ""]
    heads = ["layer", "verdict", "sites", "ratio", "at", *(f"worst {column.title}" for column in LAYER_COLUMNS[1:])]
    lines = [f"| {' | '.join(heads)} |", f"|:--|:--|--:|--:|:--{'|--:' * (len(heads) - 5)}|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in table]
    titles = " and ".join([", ".join(["verdict", *(c.title for c in LAYER_COLUMNS[:-1])]), LAYER_COLUMNS[-1].title])
    yield from _folded(f"{text.plural(len(table), 'row')}: {titles}", lines, len(table) > _LONG)


def _cells(row: LayerRow) -> Iterator[str]:
    ratio, *others = row.worst
    yield from (escape(row.label), row.verdict, f"{row.measured}/{row.known}", text.number(ratio.value))
    yield code(ratio.site, cell=True) if ratio.site else ""
    yield from (text.number(each.value, each.column.form) for each in others)


def _costs(comparison: Comparison) -> Iterator[str]:
    """The quantized tensors by what each costs."""
    table = summaries.costs(comparison)
    if table:
        lines = [f"| {' | '.join(summaries.COSTS)} |", "|:--|:--|--:|--:|"]
        lines += [
            f"| {' | '.join([code(name, cell=True), code(kind, cell=True), *numbers])} |"
            for name, kind, *numbers in table
        ]
        yield "### Cost of quantization"
        yield ""
        yield from _folded(text.plural(len(table), "quantized tensor"), lines, len(table) > _LONG)
        yield ""


def _folded(summary: str, lines: Iterable[str], fold: bool) -> Iterator[str]:
    if fold:
        yield f"<details><summary>{summary}</summary>"
        yield ""
    yield from lines
    if fold:
        yield ""
        yield "</details>"
    yield ""


def _end(comparison: Comparison) -> Iterator[str]:
    groups = summaries.invisible(comparison)
    if groups:
        yield "### Could not have been seen with this run"
        yield ""
        for reason, faults in groups:
            names = ", ".join(code(id) + (f" ({escape(detail)})" if detail else "") for id, detail in faults)
            yield f"- {escape(reason)}: {names}"
        yield ""
    for title, notes in (
        ("Unmeasured", summaries.unmeasured(comparison.sites)),
        ("Applied to align the two sides", summaries.steps(comparison.sites)),
    ):
        if notes:
            yield f"### {title}"
            yield ""
            yield from (
                f"- {escape(n.text)} ({text.plural(n.sites, 'site')}): {', '.join(map(code, n.where))}" for n in notes
            )
            yield ""
    yield f"Again: {code(comparison.environment.command)}"
