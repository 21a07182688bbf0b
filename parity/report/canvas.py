"""What the pictures have in common: colours, a figure, texts that the font can draw, a logarithmic scale."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from parity.errors import UsageError
from parity.report.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

SETTINGS: Any = {
    "svg.hashsalt": "parity",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5b646d",
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "path.simplify": False,
}
DPI = 110
INK, SOFT, GOOD, BAD = "#1c2126", "#74807c", "#1f6b46", "#b5355c"
# The colours of the page's map, light to dark; the last is for what was not measured.
COLOURS = ("#eaf0ee", "#fdebc3", "#fdd28f", "#f9ab69", "#e8714f", "#b5355c", "#57184f")
DARK = 5


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of so many inches, and its panels row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Picture(Figure):
        """Shows itself in a notebook, whether or not pyplot is loaded there."""

        def _repr_png_(self) -> bytes:
            drawn = io.BytesIO()
            with drawing():
                laid_out(self).savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
            return drawn.getvalue()

    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


@contextmanager
def drawing() -> Iterator[None]:
    """Settings of all pictures during the block: what a matplotlibrc of the user says would change the bytes.

    Raises UsageError where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(f"pictures need matplotlib ({error}). Install it: pip install matplotlib.") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def laid_out(figure: Figure) -> Figure:
    """The figure laid out once: the same place for everything in each file, in half the time."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element that may stand within a page; the same figure gives the same text."""
    text = io.StringIO()
    laid_out(figure).savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    drawn = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue()[text.getvalue().index("<svg") :], flags=re.S)
    wanted = set(re.findall(r"#([\w-]+)", drawn))
    # Names that nothing refers to would stand in the page twice.
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in wanted else "", drawn)


def drawable(text: str) -> str:
    """The text with escapes for what the font lacks."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    return "".join(c if ord(c) in known else f"\\u{ord(c):04x}" for c in visible(text))


def clipped(text: str, most: int) -> str:
    """The end of a text, in at most so many characters that the font can draw."""
    shown = drawable(text)
    return shown if len(shown) <= most else "…" + shown[-most + 1 :]


def finite(values: Sequence[float | None]) -> list[float]:
    """The values, with NaN for what a curve leaves out."""
    return [math.nan if v is None or not math.isfinite(v) else v for v in values]


def tick(label: str) -> str:
    """A row of the table of layers in short: the number of a layer, or the end of a name."""
    last = label.rpartition(".")[2]
    return last if last.isdigit() else clipped(label, 14)


def log_scale(axes: Axes, values: Sequence[float | None], unit: str = "") -> None:
    """A logarithmic axis where there is anything that it can show; labels without mathematics."""
    from matplotlib.ticker import LogLocator, NullLocator

    if not any(v is not None and math.isfinite(v) and v > 0 for v in values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(powers(unit))


def powers(unit: str) -> Formatter:
    """Labels of a logarithmic axis, in plain letters."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda v, _: f"{v:g}{unit}" if 1e-3 < v < 1e5 else f"{v:.0e}{unit}")
