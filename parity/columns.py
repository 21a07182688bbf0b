"""The numbers of a site, one row each: what every table, threshold and limit is made from.

A new number is a field of Measurement, its computation, and a row here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A number of a site.

    key       the field of Measurement, and the key of a threshold
    title     its head in a table
    meaning   what it is, in words
    form      how a table writes it; empty for a ratio
    said      how a sentence writes it
    digits    how many significant digits the page's data keep
    more_is_better whether a larger number is the better one
    in_layers whether a table of layers shows the worst of each layer
    in_sites  whether a table of sites in the terminal shows it
    has_limit whether a threshold may bound it
    """

    key: str
    title: str
    meaning: str
    form: str = ".1e"
    said: str = ".3g"
    digits: int = 5
    more_is_better: bool = False
    in_layers: bool = False
    in_sites: bool = False
    has_limit: bool = False

    @property
    def least(self) -> float:
        """The smallest threshold that makes sense."""
        return -1.0 if self.more_is_better else 0.0

    def holds(self, value: float, limit: float) -> bool:
        """Whether a number is within its limit; NaN never is."""
        return value >= limit if self.more_is_better else value <= limit

    def badness(self, value: float) -> float:
        """The number with its sign turned so that larger is worse; NaN is worse than any number."""
        return float("inf") if value != value else -value if self.more_is_better else value


COLUMNS: tuple[Column, ...] = (
    Column("ratio", "ratio", "local error / floor", "", in_layers=True, in_sites=True, has_limit=True),
    Column("row_max", "worst row", "same, worst row", ""),
    Column("local_rel", "local", "local error, relative", in_sites=True),
    Column("inherited_rel", "inherited", "inherited error, relative", in_sites=True),
    Column("floor_rel", "floor", "floor, relative", in_sites=True),
    Column("rel_l2", "total", "total error, relative"),
    Column("total_ratio", "total ratio", "total / reference's own", ""),
    Column("mse", "MSE", "total error, MSE", ".2e", in_layers=True, has_limit=True),
    Column("cosine", "cosine", "cosine", ".7f", ".7g", digits=9, more_is_better=True, in_layers=True, has_limit=True),
    Column("max_abs", "max abs", "total error, largest", has_limit=True),
    Column("ulp_max", "ULP", "total error, largest ULP", ".0f"),
)
BY_KEY = {column.key: column for column in COLUMNS}
LAYER_COLUMNS = tuple(column for column in COLUMNS if column.in_layers)
SITE_COLUMNS = tuple(column for column in COLUMNS if column.in_sites)
LIMITED = tuple(column for column in COLUMNS if column.has_limit)
