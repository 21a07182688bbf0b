"""One table of columns: what every surface shows and bounds is in it, and each row is a number of a site."""

from __future__ import annotations

import dataclasses
import math

import pytest

from parity.columns import BY_KEY, COLUMNS, LAYER_COLUMNS, LIMITED, Column
from parity.report import html, markdown
from parity.results import Measurement
from parity.settings import SITE_KEYS
from parity.testing import acceptance
from tests.report_example import everything


def test_each_column_is_a_number_of_a_site() -> None:
    numbers = {field.name for field in dataclasses.fields(Measurement) if field.type == "float | None"}
    assert {column.key for column in COLUMNS} == numbers
    assert len(BY_KEY) == len(COLUMNS)


def test_thresholds_are_made_from_the_table() -> None:
    assert SITE_KEYS == tuple(column.key for column in LIMITED) == ("ratio", "mse", "cosine", "max_abs")


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.key)
def test_better_and_worse(column: Column) -> None:
    low, high = (0.25, 0.75)
    assert column.holds(low, high) != column.more_is_better
    assert column.holds(high, low) == column.more_is_better
    assert not column.holds(math.nan, low)
    worst = max([low, high], key=column.badness)
    assert worst == (low if column.more_is_better else high)
    assert max([low, math.nan, high], key=column.badness) is math.nan


def test_a_new_column_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number in the table of layers is in the page and in Markdown, without a line of theirs changed."""
    new = Column("max_abs", "largest", "the largest error", ".3e", in_layers=True)
    for module in ("parity.report.layers", "parity.report.markdown", "parity.report.html"):
        monkeypatch.setattr(f"{module}.LAYER_COLUMNS", (*LAYER_COLUMNS, new))
    run = everything()
    assert "worst largest" in markdown.render(run)
    assert "5.410e+00" in markdown.render(run)
    assert "the largest error, the worst of the layer's sites" in html.render(run)


def test_failures_name_a_number_by_its_title() -> None:
    m = everything().sites[1]
    for column in LIMITED:
        beyond = getattr(m, column.key) * (2 if column.more_is_better else 0.5)
        assert acceptance._beyond(m, column.key, beyond).startswith(f"{column.title} ")
