"""A Comparison in a notebook: its table, its page's essential part, its report as files."""

from __future__ import annotations

import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest

from parity.columns import COLUMNS
from parity.errors import UsageError
from parity.report import json as report_json
from parity.report.html import fragment, render
from tests.report_example import EVIL, everything, hostile, matching


class Tags(HTMLParser):
    """Which elements a text opens and does not close, what they are, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.open.append(tag)
        self.links += [value for name, value in attrs if name == "href"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_notebook_shows_verdict_and_findings() -> None:
    run = everything()
    shown = run._repr_html_()
    assert shown == fragment(run)
    assert run.headline in shown
    for finding in run.findings:
        assert finding.fault is None or finding.fault.fix in shown
    assert len(shown) < len(render(run)) / 2


@pytest.mark.parametrize("run", [everything(), matching(), hostile()], ids=["everything", "matching", "hostile"])
def test_it_stands_within_another_page(run: object) -> None:
    shown = run._repr_html_()  # type: ignore[attr-defined]
    tags = Tags(shown)
    assert tags.open == []
    assert not {"script", "html", "body", "main", "img"} & set(tags.seen)
    assert not tags.links, "nothing that it could link to is there"
    assert EVIL not in shown
    styles = shown.partition("<style>")[2].partition("</style>")[0].strip().splitlines()
    assert all(line.startswith(".parity ") for line in styles), "it leaves the style of the notebook alone"


def test_a_table_has_a_row_for_each_site(monkeypatch: pytest.MonkeyPatch) -> None:
    class DataFrame(dict[str, list[object]]):
        pass

    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=DataFrame))
    run = everything()
    table = run.to_pandas()
    assert isinstance(table, DataFrame)
    assert table["site"] == [m.site for m in run.sites]
    assert {column.key for column in COLUMNS} <= table.keys()
    assert table["ratio"] == [m.ratio for m in run.sites]


def test_a_table_of_pandas() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is optional")
    table = everything().to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert len(table) == len(everything().sites)
    assert table.ratio.max() == max(m.ratio for m in everything().sites if m.ratio is not None)


def test_without_pandas_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"^to_pandas\(\) needs pandas, .*: pip install pandas\.$"):
        everything().to_pandas()


def test_it_is_saved_as_a_report(tmp_path: Path) -> None:
    run = everything()
    page = run.save(str(tmp_path / "report"), plots=False)
    assert page == tmp_path / "report" / "index.html"
    assert page.read_text(encoding="utf-8") == render(run)
    assert report_json.load(page.with_name("report.json")).findings == run.findings
    assert page.with_name("report.md").is_file()


@pytest.mark.slow
def test_pictures_are_figures_that_show_themselves() -> None:
    from matplotlib.figure import Figure

    run = everything()
    for figure in (run.plot_depth(), run.plot_map(), run.plot_finding(1), run.plot_next_token(), run.plot_logits()):
        assert isinstance(figure, Figure)
        assert figure.axes
    drawn = run.plot_depth()._repr_png_()  # type: ignore[attr-defined]
    assert drawn.startswith(b"\x89PNG")
    assert drawn == run.plot_depth()._repr_png_()  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"no picture 'finding-7' .* It has: finding-1, "):
        run.plot_finding(7)
