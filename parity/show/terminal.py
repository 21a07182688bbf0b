"""A dump in the terminal: tables of figures, and small pictures of single sites in characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from parity.report.tables import Head, fitted
from parity.report.terminal import line
from parity.report.text import number, plural, quoted, visible
from parity.show.looked import Looked, by_layer
from parity.show.statistics import OUTLIER, SiteStatistics
from parity.show.views import Head as AttentionHead
from parity.show.views import Heatmap, Histogram, View

_BARS = " ▁▂▃▄▅▆▇█"
_SHADES = " ░▒▓█"
_HEIGHT = 24
LEGEND = (
    "norm: L2 norm of a token's channels, the mean over tokens; outliers: channels whose root mean square is at least "
    f"{OUTLIER:g} times the median channel's; dead: channels that are 0 at every token"
)
_DISTANCE = "distance: ‖first − second‖ / ‖first‖; how far they are apart, not whether that is right: parity diff says"
_LENS = (
    "logit lens: the hidden states of the last token given to the model's own final norm and head; KL: of the final "
    "distribution from this one"
)


def show(looked: Looked, console: Console, *, verbose: bool) -> None:
    """Print what there is: a table by layer, or by site where sites were asked for or all are to be seen."""
    line(console, Text(visible(looked.title), style="bold"))
    if looked.against:
        line(console, Text(f"against {visible(looked.against)}"))
    console.print()
    if looked.asked or verbose:
        console.print(_sites(looked, console.width))
    else:
        console.print(_layers(looked, console.width))
        line(console, Text("-v lists every site, SITE (mlp.act_fn, layers.3, '*.q_rope') shows some", style="dim"))
    line(console, Text(LEGEND, style="dim"))
    if looked.distances:
        line(console, Text(_DISTANCE, style="dim"))
    if len(looked.views) == 1:
        _picture(looked.views[0], console)
    elif looked.views:
        said = f"pictures of these {len(looked.views)} sites: --out FOLDER; of one in the terminal: name it alone"
        line(console, Text(said, style="dim"))
    if looked.lens:
        _lens(looked, console)


def _layers(looked: Looked, width: int) -> object:
    heads = (
        Head("layer", is_name=True, stays=True),
        Head("norm", stays=True),
        Head("largest", stays=True),
        Head("at", is_name=True, stays=True, folds=True),
        Head("outliers"),
        Head("dead"),
        Head("nonfinite", stays=True),
        *((Head("distance", stays=True),) if looked.distances else ()),
    )
    rows = []
    for layer in by_layer(looked.sites):
        largest = layer.worst.largest
        row = [
            Text(visible(layer.label)),
            Text(number(layer.output.norm if layer.output else None, ".4g")),
            Text("–" if largest is None else number(largest.value, ".4g")),
            Text(visible(_short(layer.worst.site, layer.label))),
            Text(str(layer.outliers)),
            Text(str(layer.dead)),
            _alarm(layer.nonfinite),
        ]
        if looked.distances:
            row.append(Text(_distance(looked, layer.output.site) if layer.output else "–"))
        rows.append(row)
    return fitted(heads, rows, width)


def _short(site: str, label: str) -> str:
    _, found, rest = site.partition(f"{label}.")
    return rest if found else "output" if "." in label else ""


def _sites(looked: Looked, width: int) -> object:
    heads = (
        Head("site", is_name=True, stays=True, folds=True),
        Head("norm", stays=True),
        *((Head("distance", stays=True), Head("largest apart")) if looked.distances else ()),
        Head("largest"),
        Head("nonfinite", stays=any(site.nonfinite for site in looked.sites)),
        Head("dead"),
        Head("outliers"),
        Head("rms"),
        Head("dtype"),
    )
    rows = []
    for site in looked.sites:
        row = [Text(visible(site.site)), Text(number(site.norm, ".4g"))]
        if looked.distances:
            apart = looked.distances[site.site].largest
            row += [Text(_distance(looked, site.site)), Text("–" if math.isnan(apart) else number(apart, ".3g"))]
        row += [
            Text("–" if site.largest is None else number(site.largest.value, ".4g")),
            _alarm(site.nonfinite),
            Text(str(site.dead)),
            Text(str(site.outlier_count)),
            Text(number(site.rms, ".4g")),
            Text(visible(site.dtype)),
        ]
        rows.append(row)
    return fitted(heads, rows, width)


def _distance(looked: Looked, site: str) -> str:
    found = looked.distances[site]
    return visible(found.why_not) if found.why_not else number(found.relative, ".3g")


def _alarm(count: int) -> Text:
    return Text(str(count), style="bold red" if count else "")


def _picture(view: View, console: Console) -> None:
    """One site: where its largest numbers are, how they are spread, and where they lie."""
    for sentence in sentences(view.statistics):
        line(console, Text(sentence))
    width = max(console.width - 12, 20)
    if view.histogram is not None:
        console.print()
        _histogram(view.histogram, console)
    if view.heads:
        _heads(view.heads, console)
    elif view.heatmap is not None:
        _heatmap(view.heatmap, console, width)


def sentences(site: SiteStatistics) -> list[str]:
    """What the figures of a site say beside the table."""
    said = [f"{visible(site.dtype)} {' x '.join(map(str, site.shape))}: {plural(site.rows, 'token')} counted"]
    if site.largest is not None:
        at = f"token {site.largest.token}, {visible(site.largest.name)}"
        said.append(f"from {number(site.low, '.5g')} to {number(site.high, '.5g')}; largest at {at}")
    if site.outliers:
        named = ", ".join(f"{visible(o.name)} ({number(o.times, '.3g')}x the median)" for o in site.outliers)
        more = f" and {site.outlier_count - len(site.outliers)} more" if site.outlier_count > len(site.outliers) else ""
        said.append(f"outliers: {named}{more}")
    if site.dead:
        said.append(f"dead: {site.dead} of {plural(site.channels, 'channel')}")
    return said


def _histogram(histogram: Histogram, console: Console) -> None:
    """Bars of the logarithm of the counts: the tails are what one looks for."""
    most = math.log1p(max(histogram.counts))
    bars = "".join(_BARS[math.ceil(math.log1p(n) / most * (len(_BARS) - 1))] for n in histogram.counts)
    console.print(Text(f"{bars}  how many, on a logarithmic scale"), soft_wrap=True)
    low, high = number(histogram.low, ".4g"), number(histogram.high, ".4g")
    console.print(Text(f"{low}{high:>{max(len(bars) - len(low), 1)}}"))


def _heatmap(heatmap: Heatmap, console: Console, width: int) -> None:
    rows, columns = (math.ceil(n / most) for n, most in ((len(heatmap.cells), _HEIGHT), (len(heatmap.cells[0]), width)))
    small = [
        [
            max((abs(v) for row in heatmap.cells[y : y + rows] for v in row[x : x + columns] if v == v), default=0.0)
            for x in range(0, len(heatmap.cells[0]), columns)
        ]
        for y in range(0, len(heatmap.cells), rows)
    ]
    console.print()
    line(console, Text(f"tokens down, {plural(heatmap.channels, 'channel')} across; darker: larger magnitude"))
    _shaded(small, console, heatmap.tokens / len(small))


def _shaded(cells: Sequence[Sequence[float]], console: Console, per_row: float) -> None:
    """Characters by magnitude, four octaves below the largest being blank."""
    most = max((v for row in cells for v in row), default=0.0)
    for place, row in enumerate(cells):
        text = "".join(_SHADES[_shade(v, most)] for v in row)
        console.print(Text(f"{int(place * per_row):>6} │{text}│"), soft_wrap=True)


def _shade(value: float, most: float) -> int:
    if not (value > 0 and most > 0):
        return 0
    return min(max(math.ceil(4 + math.log2(value / most)), 0), 4)


def _heads(heads: Sequence[AttentionHead], console: Console) -> None:
    console.print()
    titles = ("head", "first token", "itself", "the one before", "entropy, bits")
    rows = [
        [
            Text(str(h.number)),
            *(Text(f"{100 * v:.1f} %") for v in (h.first, h.itself, h.previous)),
            Text(f"{h.entropy:.2f}"),
        ]
        for h in heads
    ]
    console.print(fitted([Head(title, stays=True) for title in titles], rows, console.width))
    line(console, Text("share of the probability, the mean over the tokens of the first sequence", style="dim"))


def _lens(looked: Looked, console: Console) -> None:
    console.print()
    heads = (
        Head("site", is_name=True, stays=True, folds=True),
        Head("says", is_name=True, stays=True),
        Head("share", stays=True),
        Head("rank of the final token"),
        Head("KL, nats"),
    )
    rows = [
        [
            Text(visible(one.site)),
            Text(quoted(one.text)),
            Text(f"{100 * one.share:.1f} %"),
            Text(str(one.rank)),
            Text(f"{one.nats:.3g}"),
        ]
        for one in looked.lens
    ]
    console.print(fitted(heads, rows, console.width))
    line(console, Text(_LENS, style="dim"))
