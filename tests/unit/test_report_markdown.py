"""The report for a pull request: the same facts, and nothing that a dump says becomes markup."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from parity.errors import UsageError
from parity.quantization import WeightError
from parity.report import markdown
from parity.report.layers import rows
from tests import goldens
from tests.report_example import EVIL, everything, hostile, large, matching

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
# A run with names that try everything: what Markdown and HTML have, in one string.
NASTY = st.text(alphabet=st.sampled_from(list("`*_[]()<>#+-!|~$&@\\:/=.'\"{}1aw \n\t\x1b")), max_size=24)


def tokens(text: str) -> list[Token]:
    """All tokens of a text, those inside of lines too."""
    return [t for block in PARSER.parse(text) for t in [block, *(block.children or [])]]


@pytest.mark.parametrize("make", [everything, matching], ids=lambda f: f.__name__)
def test_text(make: object) -> None:
    assert callable(make)
    goldens.check(f"markdown-{make.__name__}.md", markdown.render(make()))


@pytest.mark.parametrize("make", [everything, matching, hostile], ids=lambda f: f.__name__)
def test_the_table_has_a_row_for_each_layer_and_no_row_is_broken(make: object) -> None:
    assert callable(make)
    run = make()
    found = tokens(markdown.render(run))
    heads, cells = (sum(t.type == kind for t in found) for kind in ("th_open", "td_open"))
    assert cells == heads * len(rows(run.sites))
    assert sum(t.type == "tr_open" for t in found) == 1 + len(rows(run.sites))


def test_long_tables_are_folded() -> None:
    assert "<details>" not in markdown.render(everything())
    text = markdown.render(large(20, 2))
    assert text.count("<details>") == text.count("</details>") == 1


def test_pictures_are_linked_from_where_the_report_lies(tmp_path: Path) -> None:
    names = ("finding-1.png", "finding-1.svg", "map.png", "depth.png", "next-token.png", "logits.png")
    plots = {name: tmp_path / "my plots" / name for name in names}
    text = markdown.render(everything(), plots, tmp_path)
    sources = [t.attrs["src"] for t in tokens(text) if t.type == "image"]
    assert sources == [f"my%20plots/{name}" for name in names if name.endswith("png")]


def test_the_table_of_costs_is_not_broken_by_names() -> None:
    run = replace(hostile(), sites=(), weights=(WeightError(EVIL, EVIL, 1.0, 2.0, EVIL, 0.5),))
    found = tokens(markdown.render(run))
    assert sum(t.type == "td_open" for t in found) == 4
    html = {t.content for t in found if t.type == "html_inline"}
    assert html <= {"<!-- -->", "<code>", "</code>"}


def test_what_a_dump_says_stays_text() -> None:
    found = tokens(markdown.render(hostile()))
    kinds = {t.type for t in found}
    assert not kinds & {"link_open", "image", "html_block", "s_open", "hr", "code_block", "fence", "blockquote_open"}
    html = [t.content for t in found if t.type == "html_inline"]
    assert set(html) <= {"<!-- -->", "<code>", "</code>"}
    assert sum(t.type == "heading_open" for t in found) == sum(
        t.type == "heading_open" for t in tokens(markdown.render(everything()))
    )
    text = "".join(t.content for t in found if t.type in ("text", "code_inline"))
    assert "<script>alert(1)</script>" in text
    assert not any(c in text for c in "\x1b\u202e\u2028")


@given(NASTY)
def test_escaped_text_is_text(value: str) -> None:
    for line in (markdown.escape(value), f"- {markdown.escape(value)}", f"a {markdown.escape(value)} b"):
        found = {t.type for t in tokens(line)} - {"inline", "text", "paragraph_open", "paragraph_close", "text_special"}
        found -= {"bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close"}
        assert found <= {"html_inline"}, (line, found)
        assert "<" not in markdown.escape(value).replace("<!-- -->", "")


@given(NASTY)
def test_code_says_what_it_was_given(value: str) -> None:
    from parity.report.text import visible

    (block,) = [t for t in PARSER.parse(f"a {markdown.code(value)} b") if t.type == "inline"]
    shown = [t.content for t in block.children or [] if t.type == "code_inline"]
    assert shown == [visible(value) if visible(value).strip() else f"'{visible(value)}'"]


@given(NASTY)
def test_a_cell_holds_what_it_was_given(value: str) -> None:
    found = tokens(f"| a | b |\n|--|--|\n| {markdown.code(value, cell=True)} | {markdown.escape(value)} |")
    assert sum(t.type == "td_open" for t in found) == 2
    assert sum(t.type == "tr_open" for t in found) == 2


# -- the summary of a step in a workflow of GitHub -----------------------------------------------------------------


@pytest.fixture
def summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    return path


def headings(text: str) -> list[str]:
    """What the text shows as headings of the second level."""
    blocks = PARSER.parse(text)
    return [
        blocks[i + 1].content for i, block in enumerate(blocks) if block.type == "heading_open" and block.tag == "h2"
    ]


@pytest.mark.parametrize("before", [None, "", "another tool said\n", "and did not end its line"])
def test_reports_are_appended_to_the_step_summary(summary: Path, before: str | None) -> None:
    if before is not None:
        summary.write_text(before, encoding="utf-8")
    markdown.append_step_summary(everything())
    markdown.append_step_summary(matching())
    text = summary.read_text(encoding="utf-8")
    assert text.startswith(before or "")
    assert [heading.split(":")[0] for heading in headings(text)] == ["❌ DIVERGED", "✅ MATCH"]
    assert markdown.render(everything()) in text
    assert not [t for t in tokens(text) if t.type == "image"], "pictures are not there"


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_step_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    if value is not None:
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", value)
    markdown.append_step_summary(everything())
    assert not list(tmp_path.iterdir())


def test_a_step_summary_stays_within_what_github_takes(summary: Path) -> None:
    most, size = 1024 * 1024, len(markdown.render(everything()).encode())
    summary.write_bytes(b"x" * (most - size - 2))
    markdown.append_step_summary(everything())
    assert summary.stat().st_size == most, "what just fits is written"

    summary.write_bytes(b"x" * (most - size))
    markdown.append_step_summary(everything())
    text = summary.read_text(encoding="utf-8")
    assert len(headings(text)) == 1
    assert text.rstrip().endswith("too long for a step summary._")
    assert "### Layers" not in text

    summary.write_bytes(b"x" * (most - 100))
    markdown.append_step_summary(everything())
    assert summary.stat().st_size == most - 100, "where not even a head fits, nothing is written"


def test_a_step_summary_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "such" / "folder"))
    with pytest.raises(UsageError, match="step summary cannot be written") as caught:
        markdown.append_step_summary(everything())
    assert str(tmp_path) in str(caught.value)
