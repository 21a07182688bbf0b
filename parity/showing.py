"""How a Comparison shows and saves itself; what that takes is loaded when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from parity.columns import COLUMNS

if TYPE_CHECKING:
    from parity.results import Comparison


class Showing:
    """What `Comparison` offers beside its numbers."""

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

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict and the findings of the page."""
        from parity.report.html import fragment

        return fragment(cast("Comparison", self))
