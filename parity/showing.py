"""How a Comparison shows and saves itself; what that takes is loaded when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from parity.columns import COLUMNS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from parity.results import Comparison


class Showing:
    """What `Comparison` offers beside its numbers."""

    def __repr__(self) -> str:
        """In one line: a session that shows it would otherwise be given all its numbers."""
        c = cast("Comparison", self)
        return f"<Comparison {c.verdict}: {c.headline}; {len(c.findings)} findings, {len(c.sites)} sites>"

    def save(self, folder: Path | str, *, plots: bool = True) -> Path:
        """Write the report into a folder: index.html, report.md, report.json, plots/. Returns the path of the page; of
        report.json where the page could not be made.

        Pictures take longer than all the rest; without `plots` there are none. Raises UsageError where the folder
        cannot be written.
        """
        from parity.report.files import write_all

        paths = write_all(cast("Comparison", self), Path(folder), plots=plots).paths
        return paths.get("index.html", paths["report.json"])

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row for each site: its verdict, the reason and its numbers.

        Raises ImportError where pandas is not installed; parity itself does not need it.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("to_pandas() needs pandas, which is not installed: pip install pandas.") from None
        sites = cast("Comparison", self).sites
        names = ("site", "verdict", "reason", *(column.key for column in COLUMNS), "bit_equal", "dtype", "shape")
        return pandas.DataFrame({name: [getattr(m, name) for m in sites] for name in names})

    def plot_depth(self) -> Figure:
        """Error by depth: what each layer adds, what has gathered, and what rounding makes. A matplotlib figure."""
        return self._picture("depth")

    def plot_map(self) -> Figure:
        """The map of sites: layers down, operations across. A matplotlib figure."""
        return self._picture("map")

    def plot_finding(self, number: int = 1) -> Figure:
        """The worst site of a finding, by token and by head or channel; findings count from 1. A matplotlib figure.

        Raises UsageError where there is no such finding, or nothing of it to draw.
        """
        return self._picture(f"finding-{number}")

    def plot_next_token(self) -> Figure:
        """The top tokens of both sides with their logits. A matplotlib figure."""
        return self._picture("next-token")

    def plot_logits(self) -> Figure:
        """Logits of the last token, reference across and candidate up. A matplotlib figure."""
        return self._picture("logits")

    def _picture(self, name: str) -> Figure:
        from parity.report.plots import picture

        return picture(cast("Comparison", self), name)

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict and the findings of the page."""
        from parity.report.html import fragment

        return fragment(cast("Comparison", self))
