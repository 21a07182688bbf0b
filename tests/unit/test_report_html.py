"""The page: what it says equals the data, what a dump says stays text, and it needs nobody."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest

from parity import words
from parity.columns import COLUMNS, LAYER_COLUMNS
from parity.report import html
from parity.report.chart import NARROW, chart
from parity.report.grid import STEPS, cell, grid
from parity.report.layers import by_depth, rows
from parity.report.residual import call_starts, residual_map
from parity.report.text import visible
from parity.results import ULP_BINS, Comparison, Coverage, Residual
from tests import report_example
from tests.report_example import EVIL, everything, hostile, large, matching, measurement

VOID = {"meta", "link", "br", "img", "input", "hr"}
# Elements of SVG that the page closes at once.
EMPTY = {"path", "line", "circle", "rect"}


class Page(HTMLParser):
    """The elements of a page with their attributes and text, found by a parser of its own."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.open: list[str] = []
        self.comments: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.inside:
            self.inside[self.open[-1]][-1] += data
        else:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """Elements of this name whose attributes begin so."""
        return [
            found
            for name, found in self.elements
            if name == tag and all(value in (found.get(key) or "").split() for key, value in attributes.items())
        ]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict[str, Any]:
        (raw,) = (s for s, a in zip(self.inside["script"], self.all("script"), strict=True) if a.get("id") == "data")
        loaded: dict[str, Any] = json.loads(raw)
        return loaded


@cache
def page(make: Callable[[], Comparison]) -> Page:
    return Page(html.render(make()))


MAKERS = [everything, matching, hostile]


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_the_page_is_well_formed(make: Callable[[], Comparison]) -> None:
    assert not page(make).open
    ids = [found["id"] for _, found in page(make).elements if "id" in found]
    assert len(ids) == len(set(ids))
    anchors = [str(found["href"]) for found in page(make).all("a")]
    assert {a[1:] for a in anchors if not a.startswith("#site-")} <= set(ids)


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_counts_on_the_page_are_counts_in_the_data(make: Callable[[], Comparison]) -> None:
    run, shown = make(), page(make)
    cells = [found for found in shown.all("button") if "data-i" in found]
    assert sorted(int(found["data-i"] or "") for found in cells) == list(range(len(run.sites)))
    expected = Counter(m.verdict for m in run.sites)
    classes = Counter(c.removeprefix("v-") for found in cells for c in (found["class"] or "").split() if c[:2] == "v-")
    assert classes == expected
    lead = shown.text.split("Each cell asks")[1].split("layer")[0]
    said = re.findall(r"(\d+) (exact|rounding|imprecise|wrong|nonfinite|unmeasured)\b", lead)
    assert {verdict: int(count) for count, verdict in said} == expected
    assert len(shown.all("article", **{"class": "finding"})) == len(run.findings)
    assert len([1 for found in shown.all("tr") if "data-verdict" in found]) == len(rows(run.sites))
    warnings = sum(not check.ok for check in run.checks) + len(run.troubles)
    assert len([1 for found in shown.all("p", **{"class": "warning"})]) == warnings
    assert f"{run.coverage.measured} of {run.coverage.known}" in shown.text


def test_the_script_gets_the_numbers_of_each_site() -> None:
    run, data = everything(), page(everything).data
    assert [column["key"] for column in data["columns"]] == [column.key for column in COLUMNS]
    assert {column["decimals"] for column in data["columns"] if column["key"] == "cosine"} == {7}
    for m, site in zip(run.sites, data["sites"], strict=True):
        assert (site["name"], site["verdict"], site["bit_equal"]) == (m.site, m.verdict, m.bit_equal)
        assert data["texts"][site["reason"]] == words.reason(m)
        assert [data["texts"][step] for step in site["steps"]] == list(m.steps)
        assert (site["dtype"], tuple(site["shape"])) == (m.dtype or "", m.shape)
        assert site["ulps"] == (None if m.ulps is None else list(m.ulps))
        for column in COLUMNS:
            expected, value = getattr(m, column.key), site["values"].get(column.key)
            if expected is None or isinstance(value, str):
                assert value == (None if expected is None else {"inf": "∞", "nan": "NaN"}[str(expected)])
            else:
                assert value == pytest.approx(expected, rel=1e-3)
        assert (site["structure"] is None) == (m.structure is None)


def test_every_bin_of_a_histogram_has_a_name() -> None:
    names = page(everything).data["ulp_bins"]
    assert names == ["0", "1", "2", "3–4", "5–8", *names[5:-2], "513–1024", "> 1024"]
    assert len(names) == len(ULP_BINS) + 1


def test_the_table_names_the_site_of_each_worst_number() -> None:
    shown = page(everything)
    titles = [found.get("title") for found in shown.all("th", scope="col")]
    for column in LAYER_COLUMNS:
        assert f"{column.meaning}, the worst of the layer's sites" in titles
    assert titles.count("the site that has it") == len(LAYER_COLUMNS)


def test_what_was_found_is_said() -> None:
    text = page(everything).text
    for said in (
        "RoPE uses another theta",
        "explains 99.9998 % of the error, remainder 1.00x the floor",
        "the candidate uses rope_theta = 1e4 ± 3; the config says 1e6",
        "read rope_theta from config.json",
        "cannot be told apart in this run from: rope-stretched",
        "or in the unmeasured site before it, model.layers.1.mlp.act_fn",
        "not recorded by the candidate",
        "transposed (token, head, head_dim) to (head, token, head_dim)",
        "norm-eps",
        "drowns in bfloat16",
        "parity diff --prompt-file prompt.txt --candidate port.py:load",
        "lm_head.weight differs",
    ):
        assert said in text, said
    assert "reference prefers ' Emma' to ' Grace' by 6, 200 standard deviations of the rounding noise" in text


def test_a_fault_without_a_place_in_the_model_is_not_called_unseen() -> None:
    text = page(everything).text
    assert "2 known faults would have shown in this run; 4 would not. For 1 other this model has no place." in text
    assert "softcap-missing" not in text


def test_what_a_dump_says_stays_text() -> None:
    shown = page(hostile)
    assert len(shown.all("script")) == 2
    assert not shown.comments
    assert not shown.all("b", onclick="")
    assert shown.text.count("<script>alert(1)</script>") > 10
    assert "\x1b" not in "".join(shown.texts)
    assert "\u202e" not in "".join(shown.texts)
    assert visible(EVIL) in shown.data["texts"]
    assert "49" not in shown.text.split("{{ 7*7 }}")[0][-20:], "no template is evaluated twice"
    allowed = {"class", "id", "href", "type", "scope", "role", "title", "lang", "charset", "name", "content", "colspan"}
    allowed |= {"tabindex", "placeholder", "autocomplete", "http-equiv", "d", "x", "y", "x1", "x2", "y1", "y2", "cx"}
    allowed |= {
        "cy",
        "r",
        "viewbox",
        "text-anchor",
        "popover",
        "popovertarget",
        "width",
        "height",
        "preserveaspectratio",
    }
    for tag, attributes in shown.elements:
        assert {a for a in attributes if not a.startswith(("data-", "aria-"))} <= allowed, tag


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_the_page_needs_nobody(make: Callable[[], Comparison]) -> None:
    shown = page(make)
    for tag, attributes in shown.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "image", "use"), tag
        assert not {"src", "srcset", "action", "formaction", "xlink:href", "style"} & set(attributes), tag
        assert str(attributes.get("href", "#")).startswith("#")
    for source in [*shown.inside["style"], shown.inside["script"][-1]]:
        assert not re.search(r"url\(|@import|fetch\(|XMLHttp|innerHTML|document\.write|eval\(", source)
    policy = next(a["content"] for a in shown.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert (policy or "").startswith("default-src 'none';")
    assert "unsafe" not in (policy or "")


def test_every_form_control_and_figure_has_a_name() -> None:
    shown = page(everything)
    for found in shown.all("svg"):
        assert found.get("aria-label") or found.get("aria-hidden") == "true"
    for found in [f for f in shown.all("button") if "data-i" in f]:
        site, _, said = (found["aria-label"] or "").partition(": ")
        assert site == everything().sites[int(found["data-i"] or "")].site
        assert said
    for found in shown.all("th"):
        assert found.get("scope") in ("row", "col")


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_the_same_data_gives_the_same_bytes(make: Callable[[], Comparison]) -> None:
    assert html.render(make()) == html.render(make())


def test_a_large_report_is_small_and_quick() -> None:
    run = large(layers=28, families=20)
    assert len(html.render(run).encode()) < 2_000_000
    run = large(layers=64, families=20)
    assert any(_seconds(run) < 2.0 for _ in range(3)), "64 layers"


def _seconds(run: Comparison) -> float:
    start = time.process_time()
    html.render(run)
    return time.process_time() - start


def test_profiles_are_pooled_by_their_largest() -> None:
    profile = tuple(float(i == 200) * 99 + 1 for i in range(256))
    shape = dataclasses.replace(report_example.structure(1.0), by_token=profile, pooled=4)
    run = dataclasses.replace(
        matching(),
        sites=(measurement("lm_head", "rounding", 1.0, structure=shape),),
        environment=report_example.environment(tokens=1000),
    )
    shape = Page(html.render(run)).data["sites"][0]["structure"]
    pooled = shape["by_token"]
    assert len(pooled) == 128
    assert shape["width"] == 8
    assert pooled[100] == 100
    assert sum(v != 1 for v in pooled) == 1


def test_a_run_in_which_nothing_could_be_measured() -> None:
    run = dataclasses.replace(
        everything(),
        verdict="inconclusive",
        findings=(),
        sites=(measurement("lm_head", "unmeasured", None),),
        next_token=None,
        coverage=Coverage(0, 1),
        power=None,
    )
    text = Page(html.render(run)).text
    assert "Nothing was measured." in text
    assert "The candidate has no finite logits." in text
    assert "Not determined in this run." in text
    assert Page(html.render(dataclasses.replace(run, sites=())))


def test_each_site_has_one_cell_even_if_names_collide() -> None:
    sites = [measurement(name, "rounding", 1.0) for name in ("m.layers.0.a", "m.layers.0.a", "m.norm", "x.norm")]
    sites += [measurement(name, "rounding", 1.0) for name in ("a.layers.0.b", "layers.0", "norm", "m.layers.0.moe.3.a")]
    table = grid(sites)
    assert sorted(c.index for row in table.rows for c in row.cells if c) == list(range(len(sites)))
    assert all(len(row.cells) == len(table.columns) for row in table.rows if row.is_layer)


@pytest.mark.parametrize(
    ("verdict", "ratio", "glyph", "step"),
    [
        ("exact", 1.0, "=", 0),
        ("rounding", 2.0, "·", 0),
        ("imprecise", 2.01, "2.0", 1),
        ("wrong", 1.28, "1.3", 0),
        ("wrong", 541.2, "541", 6),
        ("wrong", 9999.0, "9999", 6),
        ("wrong", 123456.0, "≥1e5", 6),
        ("wrong", float("inf"), "∞", 6),
        ("wrong", float("nan"), "NaN", 6),
        ("nonfinite", None, "NaN", 6),
        ("unmeasured", None, "?", -1),
        ("wrong", None, "–", -1),
    ],
)
def test_a_cell_can_be_read_without_colour(verdict: Any, ratio: float | None, glyph: str, step: int) -> None:
    shown = cell(0, dataclasses.replace(measurement("s", "exact", 1.0), verdict=verdict, ratio=ratio))
    assert (shown.glyph, shown.step) == (glyph, step)
    assert len(shown.glyph) <= 4
    assert shown.step < len(STEPS)


# -- a finding's picture ---------------------------------------------------------------------------------------------


def test_a_picture_has_a_rectangle_for_what_is_not_rounding() -> None:
    found = residual_map(Residual("a", "head", 3, ((1.0, 9.0, 0.5), (1.0, 9.0, math.nan))), 2, ())
    assert found is not None
    assert (found.width, found.height, found.last, found.per_cell) == (2, 3, 1, (1, 1))
    assert found.paths == ((6, "M0 1h2v1h-2zM1 2h1v1h-1z"),), "neighbours are one; what is no number is darkest"
    assert found.worst == "worst tokens: 1 (∞x), 0 (9.00x)"
    clean = residual_map(Residual("a", "head", 1, ((1.0,), (2.0,))), 2, ())
    assert clean is not None
    assert clean.paths == ()
    assert residual_map(Residual("a", "head", 1, ()), 0, ()) is None


def test_a_long_run_is_pooled_to_what_can_be_seen() -> None:
    rows = tuple(tuple(400.0 if (i, j) == (700, 50) else 1.0 for j in range(64)) for i in range(1024))
    found = residual_map(Residual("a", "channel", 256, rows), 4096, (4000, *([1] * 96)))
    assert found is not None
    assert (found.width, found.height, found.per_cell) == (128, 32, (32, 8))
    assert found.paths == ((6, "M87 25h1v1h-1z"),)
    assert "2800 to 2803 (400x)" in found.worst
    assert found.calls == (125.0,)


@pytest.mark.parametrize(
    ("calls", "starts"),
    [((), []), ((9,), []), ((9, 1, 1, 1), [9]), ((5, 5, 3), [5, 10]), ((4, 4, 1, 1, 6), [4, 8, 10])],
)
def test_a_line_stands_where_a_call_begins_and_where_decoding_does(calls: tuple[int, ...], starts: list[int]) -> None:
    assert call_starts(calls) == starts


def test_words_become_buttons_and_a_sentence_stays_text() -> None:
    shown = page(hostile)
    targets = {found["popovertarget"] for found in shown.all("button") if "popovertarget" in found}
    assert targets <= {found["id"] for found in shown.all("div", **{"class": "meaning"})}
    assert "word-floor" in targets
    assert "popovertarget" not in html.fragment(everything())


def test_the_narrow_chart_has_fewer_labels_in_less_width() -> None:
    points = by_depth(large(64, 2).sites)
    wide, narrow = chart(points), chart(points, NARROW)
    assert wide is not None
    assert narrow is not None
    assert len(narrow.labels) < len(wide.labels)
    assert max(mark.x for mark in narrow.marks) < NARROW
    assert len(narrow.marks) == len(wide.marks)
