"""The pictures of a report, as SVG and PNG: the same Comparison gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from parity.errors import UsageError
from parity.predictions import LogitSample, NextToken, Token
from parity.report.canvas import (
    BAD,
    COLOURS,
    DARK,
    DPI,
    GOOD,
    INK,
    SOFT,
    clipped,
    drawing,
    finite,
    laid_out,
    log_scale,
    new_figure,
    powers,
    tick,
)
from parity.report.grid import STEPS, Cell, grid
from parity.report.layers import by_depth
from parity.report.summaries import worst_site
from parity.report.text import quoted
from parity.results import Comparison, Measurement, Residual, Structure
from parity.sites import group_label, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Whole = Callable[[Path], AbstractContextManager[Path]]
# Findings after these are in the report but get no pictures of their own.
MOST_FINDINGS = 8


def write(comparison: Comparison, folder: Path, whole: Whole = nullcontext) -> dict[str, Path]:
    """Write every picture twice, into `folder`; returns the paths by file name: `depth.svg`, `depth.png`, …

    `whole` gives the path to write to in place of the file's own (see files.whole).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("finding-*.[sp][vn]g"):
        stale.unlink()
    written: dict[str, Path] = {}
    with drawing():
        for name, draw in _pictures(comparison).items():
            figure = laid_out(draw())
            for suffix, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
                path = folder / f"{name}.{suffix}"
                with whole(path) as target:
                    figure.savefig(target, format=suffix, dpi=DPI, metadata=metadata)
                written[path.name] = path
    return written


def picture(comparison: Comparison, name: str) -> Figure:
    """One of the pictures as a figure. Raises UsageError where the Comparison has none of that name."""
    drawn = _pictures(comparison)
    if name not in drawn:
        raise UsageError(f"there is no picture {name!r} of this comparison. It has: {', '.join(drawn) or 'none'}.")
    with drawing():
        return drawn[name]()


def _pictures(comparison: Comparison) -> dict[str, Callable[[], Figure]]:
    """What there is to draw, by name, in the order of the report."""
    pictures: dict[str, Callable[[], Figure]] = {}
    for position, finding in enumerate(comparison.findings[:MOST_FINDINGS], 1):
        worst = worst_site(finding, comparison)
        if worst is not None and worst.structure is not None:
            pictures[f"finding-{position}"] = _finding(worst, finding.residual, comparison.environment.tokens)
    if comparison.sites:
        pictures["depth"] = lambda: _depth(comparison)
        pictures["map"] = lambda: _map(comparison)
    token = comparison.next_token
    if token is not None and token.reference and token.candidate:
        pictures["next-token"] = lambda: _next_token(token)
    if token is not None and token.sample is not None and token.sample.reference:
        pictures["logits"] = partial(_logits, token.sample)
    return pictures


# -- error by depth -------------------------------------------------------------------------------------------


def _depth(comparison: Comparison) -> Figure:
    points = by_depth(comparison.sites)
    places = [float(i) for i in range(len(points))]
    figure, (axes,) = new_figure(9.0, 3.4)
    low, high = finite([p.floor_low for p in points]), finite([p.floor_high for p in points])
    axes.bar(
        places,
        [b - a * 0.97 for a, b in zip(low, high, strict=True)],
        bottom=[a * 0.97 for a in low],
        width=1.0,
        color=GOOD,
        alpha=0.22,
        linewidth=0,
        label="floor: what rounding makes",
    )
    axes.plot(places, finite([p.total for p in points]), color=INK, linewidth=1.5, label="total error")
    inherited = finite([p.inherited for p in points])
    axes.plot(places, inherited, color=SOFT, linewidth=1.2, linestyle="--", label="inherited")
    for bad, colour, size, label in ((False, GOOD, 14, "local error"), (True, BAD, 30, "local, not rounding")):
        chosen = [(x, p.local) for x, p in zip(places, points, strict=True) if p.bad == bad and p.local]
        if chosen:
            axes.scatter(
                [x for x, _ in chosen], finite([y for _, y in chosen]), s=size, color=colour, label=label, zorder=3
            )
    log_scale(axes, [v for p in points for v in (p.local, p.floor_low, p.floor_high, p.total, p.inherited)])
    every = max(1, math.ceil(len(points) / 36))
    shown = [i for i in range(len(points)) if i % every == 0]
    axes.set_xticks(shown, [tick(points[i].label) for i in shown], rotation=90, fontsize=7)
    axes.set_xlim(-0.7, max(len(points) - 0.3, 0.7))
    axes.set_ylabel("error, relative to the value")
    axes.set_title("Error by depth")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    return figure


# -- the map --------------------------------------------------------------------------------------------------


def _map(comparison: Comparison) -> Figure:
    table = grid(comparison.sites)
    rows, columns = len(table.rows), max([len(table.columns), *(len(row.cells) for row in table.rows)])
    heads, labels = [clipped(name, 28) for name in table.columns], [clipped(r.label, 18) for r in table.rows]
    # Inches: what the labels need, and so much for each cell.
    left, top, bottom = 0.2 + 0.07 * max(map(len, labels)), 0.2 + 0.07 * max(map(len, heads), default=0), 0.35
    width, height = left + 0.36 * columns + 0.15, top + 0.2 * rows + bottom
    figure, (axes,) = new_figure(width, height)
    figure.set_layout_engine("none")
    axes.set_position((left / width, bottom / height, 0.36 * columns / width, 0.2 * rows / height))
    _cells(axes, [(x, y, c) for y, row in enumerate(table.rows) for x, c in enumerate(row.cells) if c is not None])
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_xticks([x + 0.5 for x in range(len(heads))], heads, rotation=90, fontsize=7)
    axes.set_yticks([y + 0.5 for y in range(rows)], labels, fontsize=7)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    words = "empty: bit-equal or rounding     ?: unmeasured     a number: times the floor"
    figure.text(left / width, 0.1 / height, words, fontsize=7.5, color=SOFT)
    return figure


def _cells(axes: Axes, cells: Sequence[tuple[int, int, Cell]]) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    patches, faces, edges = [], [], []
    for x, y, cell in cells:
        patches.append(Rectangle((x + 0.05, y + 0.07), 0.9, 0.86))
        faces.append(COLOURS[cell.step] if cell.step >= 0 else "white")
        edges.append(INK if cell.verdict in ("wrong", "nonfinite") else "#c8cdcb" if cell.step < 0 else "white")
        if cell.verdict not in ("exact", "rounding"):
            ink = "white" if cell.step >= DARK else SOFT if cell.step <= 0 else INK
            axes.text(x + 0.5, y + 0.53, cell.glyph, ha="center", va="center", fontsize=6.5, color=ink)
    axes.add_collection(PatchCollection(patches, facecolors=faces, edgecolors=edges, linewidths=0.8))


# -- a finding's worst site -----------------------------------------------------------------------------------


def _finding(m: Measurement, residual: Residual | None, tokens: int) -> Callable[[], Figure]:
    assert m.structure is not None, "asked for only where there is one"
    title = f"{clipped(group_label(m.site), 20)}  {clipped(short(m.site), 40)}"
    if residual is None:
        return partial(_profile, title, m.structure, tokens)
    return partial(_residual, title, m.structure, residual, tokens)


def _profile(title: str, structure: Structure, tokens: int) -> Figure:
    """The ratio by token, and by head where the site has heads."""
    panels = 1 + (len(structure.by_head) > 1)
    figure, axes = new_figure(9.0, 2.6, 1, panels)
    _bars(axes[0], structure.by_token, structure.pooled)
    axes[0].set_xlabel("token")
    axes[0].set_ylabel("local error / floor")
    axes[0].set_title(title)
    if panels > 1:
        _bars(axes[1], structure.by_head, 1)
        axes[1].set_xlabel("head")
    return figure


def _residual(title: str, structure: Structure, residual: Residual, tokens: int) -> Figure:
    """The ratio by token; below it the same by token and head, or by token and block of channels."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(9.0, 4.4, 2, 1)
    rows, columns = len(residual.ratios), len(residual.ratios[0])
    wide, high = math.ceil(tokens / rows), math.ceil(residual.size / columns)
    worst = [max(row) for row in residual.ratios]
    if all(map(math.isfinite, worst)):
        _bars(axes[0], structure.by_token, structure.pooled)
    else:  # the structure is that of the finite numbers alone
        _bars(axes[0], worst, wide)
    axes[0].set_ylabel("local error / floor")
    axes[0].set_title(title)
    most = max([4.0, *(v for row in residual.ratios for v in row if math.isfinite(v))])
    # What is not finite is as dark as the largest.
    drawn = [[row[i] if math.isfinite(row[i]) else most for row in residual.ratios] for i in range(columns)]
    image = axes[1].imshow(
        drawn,
        aspect="auto",
        interpolation="none",
        extent=(-0.5, rows * wide - 0.5, columns * high - 0.5, -0.5),
        cmap=LinearSegmentedColormap.from_list("ratio", COLOURS),
        norm=LogNorm(1.0, most, clip=True),
    )
    axes[1].set_ylim(residual.size - 0.5, -0.5)
    axes[1].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].set_xlabel("token" if wide == 1 else f"token, {wide} in a column")
    axes[1].set_ylabel(residual.columns if high == 1 else f"{residual.columns}, {high} in a row")
    for panel in axes:
        panel.set_xlim(-0.5, tokens - 0.5)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=35, format=powers("x"))
    bar.minorticks_off()
    return figure


def _bars(axes: Axes, values: Sequence[float], width: int) -> None:
    edges = [i * width - 0.5 for i in range(len(values) + 1)]
    drawn = finite(values)
    high = max([4.0, *(v for v in drawn if not math.isnan(v))])
    # What is not finite reaches the upper edge.
    drawn = [high * 4 if not math.isfinite(v) else v for v in values]
    axes.stairs([v if v > STEPS[0] else math.nan for v in drawn], edges, baseline=0.5, fill=True, color=COLOURS[4])
    axes.stairs([v if v <= STEPS[0] else math.nan for v in drawn], edges, baseline=0.5, fill=True, color="#aab4b0")
    axes.axhline(1.0, color=INK, linewidth=0.8, linestyle="--")
    log_scale(axes, [1.0], "x")
    axes.set_ylim(0.5, high * 1.5)


# -- next token -----------------------------------------------------------------------------------------------


def _next_token(token: NextToken) -> Figure:
    """The top tokens of both sides with their logits."""
    figure, axes = new_figure(9.0, 2.4, 1, 2)
    sides = (("reference", token.reference, SOFT), ("candidate", token.candidate, COLOURS[4]))
    for panel, (title, top, colour) in zip(axes, sides, strict=True):
        _top(panel, title, top, colour)
    return figure


def _top(axes: Axes, title: str, top: Sequence[Token], colour: str) -> None:
    places = list(range(len(top)))
    logits = finite([t.logit for t in top])
    axes.barh(places, logits, color=colour, height=0.7)
    axes.set_yticks(places, [clipped(quoted(t.text), 24) for t in top])
    axes.invert_yaxis()
    axes.set_xlabel("logit")
    axes.set_title(title)


def _logits(sample: LogitSample) -> Figure:
    """Each token as a point: what the reference makes of it, and what the candidate does."""
    figure, (axes,) = new_figure(4.6, 4.6)
    points = [pair for pair in zip(sample.reference, sample.candidate, strict=True) if all(map(math.isfinite, pair))]
    ends = [f(value for pair in points for value in pair) for f in (min, max)] if points else [0.0, 1.0]
    margin = 0.04 * (ends[1] - ends[0]) or 1.0
    ends = [ends[0] - margin, ends[1] + margin]
    axes.plot(ends, ends, color=INK, linewidth=0.8, linestyle="--", zorder=1)
    axes.scatter([x for x, _ in points], [y for _, y in points], s=9, color=COLOURS[DARK], alpha=0.45, linewidth=0)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_aspect("equal")
    axes.set_xlabel("reference")
    axes.set_ylabel("candidate")
    axes.set_title(f"Logits of the last token\n{_shown(len(sample.reference), sample.vocabulary)}")
    return figure


def _shown(points: int, vocabulary: int) -> str:
    if points == vocabulary:
        return f"all {vocabulary} tokens of the vocabulary"
    return f"{points} of {vocabulary} tokens: the largest of each side,\nand evenly spaced ranks of the reference"
