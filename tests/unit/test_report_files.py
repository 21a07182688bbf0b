"""The report as files, and report.json among them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parity.errors import UsageError
from parity.report import html, markdown, plots
from parity.report import json as report_json
from parity.report.files import write_all
from parity.report.terminal import show
from tests.conftest import ROOT
from tests.report_example import everything, hostile, large, matching

EXAMPLE = ROOT / "reports" / "example"


@pytest.mark.parametrize("make", [everything, hostile, matching], ids=lambda f: f.__name__)
def test_what_is_written_is_what_was_rendered(make: object, tmp_path: Path) -> None:
    assert callable(make)
    run = make()
    written = write_all(run, tmp_path / "new" / "folder", plots=False).paths
    assert list(written) == ["report.json", "index.html", "report.md"]
    assert report_json.dumps(report_json.load(written["report.json"])) == report_json.dumps(run)
    assert written["index.html"].read_text(encoding="utf-8") == html.render(run)
    assert written["report.md"].read_text(encoding="utf-8") == markdown.render(run)


class Stopped(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("error", [Stopped(), OSError(28, "No space left on device", "disk")])
def test_what_is_stopped_halfway_leaves_the_report_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = {name: path.read_bytes() for name, path in write_all(matching(), tmp_path, plots=False).paths.items()}
    write_text = Path.write_text

    def half(path: Path, text: str, *args: Any, **options: Any) -> int:
        write_text(path, text[: len(text) // 2], *args, **options)
        raise error

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises((Stopped, UsageError)) as caught:
        write_all(everything(), tmp_path, plots=False)
    assert isinstance(error, Stopped) or "cannot be written (No space left on device)" in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="the report cannot be written"):
        write_all(matching(), tmp_path / "file" / "report", plots=False)


@pytest.mark.slow
def test_with_pictures(tmp_path: Path) -> None:
    written = write_all(everything(), tmp_path).paths
    assert {"plots/map.svg", "plots/finding-1.png"} <= set(written)
    assert all(path.is_file() for path in written.values())
    assert "](plots/map.png)" in written["report.md"].read_text(encoding="utf-8")


@pytest.mark.parametrize("as_json", [False, True])
def test_what_a_command_reports_goes_to_the_summary_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    from parity.cli.console import write_report

    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    write_report(everything(), None, json=as_json, verbose=False, plots=False)
    assert markdown.render(everything()) in summary.read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert printed == report_json.dumps(everything()) if as_json else printed.startswith("DIVERGED")


def test_a_report_of_before_there_were_histograms_residuals_and_samples_is_rendered(tmp_path: Path) -> None:
    raw = json.loads(report_json.dumps(everything()))
    for holder, field in [*((m, "ulps") for m in raw["sites"]), *((f, "residual") for f in raw["findings"])]:
        del holder[field]
    del raw["next_token"]["sample"]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(raw), encoding="utf-8")
    run = report_json.load(old)
    assert all(m.ulps is None for m in run.sites)
    assert list(write_all(run, tmp_path / "new", plots=False).paths) == ["report.json", "index.html", "report.md"]
    names = list(plots._pictures(run))
    assert "finding-1" in names
    assert "logits" not in names


def test_a_list_of_numbers_is_one_line_of_json() -> None:
    text = report_json.dumps(large(2, 2))
    assert json.loads(text)["sites"][0]["structure"]["channel"] == 7
    assert text.count("\n") < 1000


def test_a_text_that_looks_like_numbers_stays_as_it_is() -> None:
    run = hostile()
    assert json.loads(report_json.dumps(run))["headline"] == run.headline


def test_the_example_report_is_what_this_version_writes() -> None:
    run = report_json.load(EXAMPLE / "report.json")
    assert len(run.findings) == 2
    assert all(finding.fault for finding in run.findings)
    assert (EXAMPLE / "index.html").read_text(encoding="utf-8") == html.render(run), "see reports/README.md"
    pictures = {path.name: path for path in sorted((EXAMPLE / "plots").glob("*.png"))}
    assert (EXAMPLE / "report.md").read_text(encoding="utf-8") == markdown.render(run, pictures, EXAMPLE)
    assert (EXAMPLE / "report.json").read_text(encoding="utf-8") == report_json.dumps(run)


def test_the_readme_shows_what_the_terminal_says_of_the_example() -> None:
    stream = io.StringIO()
    show(report_json.load(EXAMPLE / "report.json"), Console(file=stream, width=80, highlight=False))
    (block,) = [
        b for b in (ROOT / "README.md").read_text(encoding="utf-8").split("```\n") if "planted.py:load\nDIV" in b
    ]
    shown = "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
    assert block.partition("\n")[2].rstrip() == shown
