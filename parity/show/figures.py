"""The pictures of a dump, as matplotlib figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from parity.report.canvas import COLOURS, INK, SOFT, clipped, finite, log_scale, new_figure, powers, tick
from parity.show.looked import LayerFigures, Looked, by_layer
from parity.show.views import Head, Heatmap, Histogram, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of a map reach so many octaves below its largest number.
_OCTAVES = 10
_HEADS_A_ROW = 4


def figures(looked: Looked) -> dict[str, Callable[[], Figure]]:
    """What there is to draw, by the name of its file."""
    drawn: dict[str, Callable[[], Figure]] = {}
    layers = by_layer(looked.sites)
    if sum(layer.output is not None for layer in layers) > 1:
        drawn["depth"] = partial(depth, layers)
    for place, view in enumerate(looked.views):
        if view.histogram is not None and view.heatmap is not None:
            drawn[f"site-{place}"] = partial(site, view)
        if view.heads:
            drawn[f"site-{place}-heads"] = partial(heads, view.statistics.site, view.heads)
    return drawn


def depth(layers: Sequence[LayerFigures]) -> Figure:
    """Norm and largest number of each layer's output."""
    figure, (axes,) = new_figure(9.0, 3.0)
    places = list(range(len(layers)))
    outputs = [layer.output for layer in layers]
    norms = [site.norm if site else None for site in outputs]
    largest = [abs(site.largest.value) if site and site.largest else None for site in outputs]
    axes.plot(places, finite(norms), color=INK, marker="o", markersize=3, linewidth=1.4, label="norm of a token")
    axes.plot(
        places, finite(largest), color=COLOURS[4], marker="o", markersize=3, linewidth=1.2, label="largest number"
    )
    log_scale(axes, [*norms, *largest])
    every = max(1, math.ceil(len(layers) / 36))
    axes.set_xticks(places[::every], [tick(layer.label) for layer in layers[::every]], rotation=90, fontsize=7)
    axes.set_title("Output of each layer")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def site(view: View) -> Figure:
    """Histogram and map of one site."""
    assert view.histogram is not None, "asked for only where there is one"
    assert view.heatmap is not None, "asked for only where there is one"
    figure, (left, right) = new_figure(9.0, 3.2, 1, 2)
    _histogram(left, view.histogram)
    left.set_title(clipped(view.statistics.site, 40))
    image = _heatmap(right, view.heatmap)
    figure.colorbar(image, ax=right, pad=0.02, aspect=25, format=powers("")).minorticks_off()
    return figure


def _histogram(axes: Axes, histogram: Histogram) -> None:
    width = (histogram.high - histogram.low) / len(histogram.counts) or 1.0
    edges = [histogram.low + i * width for i in range(len(histogram.counts) + 1)]
    axes.stairs(histogram.counts, edges, fill=True, color=COLOURS[4])
    log_scale(axes, [1.0])
    axes.set_ylim(0.5, 2 * max(histogram.counts))
    axes.set_xlabel("value")
    axes.set_ylabel("how many")


def _heatmap(axes: Axes, heatmap: Heatmap) -> Any:
    image = _image(axes, heatmap.cells, (heatmap.channels, heatmap.tokens))
    axes.set_xlabel("channel")
    axes.set_ylabel("token")
    axes.set_title("magnitude")
    return image


def _image(axes: Axes, cells: Sequence[Sequence[float]], size: tuple[int, int]) -> Any:
    """Magnitudes on a logarithmic scale; what is blank or zero is lightest."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    shown = [[abs(v) if math.isfinite(v) else 0.0 for v in row] for row in cells]
    most = max((v for row in shown for v in row), default=0.0) or 1.0
    low = most / 2**_OCTAVES
    return axes.imshow(
        [[max(v, low) for v in row] for row in shown],
        aspect="auto",
        interpolation="none",
        extent=(-0.5, size[0] - 0.5, size[1] - 0.5, -0.5),
        cmap=LinearSegmentedColormap.from_list("magnitude", COLOURS),
        norm=LogNorm(low, most, clip=True),
    )


def heads(name: str, found: Sequence[Head]) -> Figure:
    """What each head attends to: queries down, keys across."""
    rows = math.ceil(len(found) / _HEADS_A_ROW)
    figure, axes = new_figure(9.0, 0.4 + 2.2 * rows, rows, _HEADS_A_ROW)
    for panel, head in zip(axes, found, strict=False):
        _image(panel, head.cells, (len(head.cells[0]), len(head.cells)))
        panel.set_title(f"head {head.number}", fontsize=8)
        panel.set_xticks([])
        panel.set_yticks([])
    for panel in axes[len(found) :]:
        panel.set_axis_off()
    figure.suptitle(f"{clipped(name, 60)}: tokens down, what they attend to across", fontsize=9, color=SOFT)
    return figure
