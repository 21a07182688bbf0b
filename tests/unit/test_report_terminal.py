"""The report in a terminal: the answer first, in 80 columns, plain where nobody sees colours."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from parity.report import json as report_json
from parity.report.terminal import show
from parity.results import Comparison
from tests import goldens, report_example


def printed(comparison: Comparison, *, verbose: bool = False, width: int = 80, **options: bool) -> str:
    stream = io.StringIO()
    show(comparison, Console(file=stream, width=width, highlight=False, **options), verbose=verbose)
    return stream.getvalue()


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("make", [report_example.everything, report_example.matching], ids=lambda f: f.__name__)
def test_text(make: object, verbose: bool) -> None:
    assert callable(make)
    name = f"terminal-{make.__name__}{'-verbose' if verbose else ''}.txt"
    goldens.check(name, printed(make(), verbose=verbose))


@pytest.mark.parametrize("make", [report_example.everything, report_example.hostile, report_example.matching])
@pytest.mark.parametrize("verbose", [False, True])
def test_no_line_is_wider_than_the_terminal(make: object, verbose: bool) -> None:
    assert callable(make)
    assert max(map(len, printed(make(), verbose=verbose).splitlines())) <= 80


def test_the_verdict_comes_first_and_each_finding_before_the_layers() -> None:
    lines = printed(report_example.everything()).splitlines()
    assert lines[0].startswith("DIVERGED")
    table = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    for position in (1, 2, 3):
        assert any(line.startswith(f" {position}  ") for line in lines[:table])


def test_what_a_dump_says_cannot_command_the_terminal() -> None:
    text = printed(report_example.hostile(), verbose=True)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[31m" in text, "it is shown, not dropped"


def test_colours_only_for_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    run = report_example.everything()
    assert "\x1b[" not in printed(run)
    assert "\x1b[1;31mDIVERGED" in printed(run, force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31m" not in printed(run, force_terminal=True)


def test_each_site_has_a_line_if_verbose(tmp_path: Path) -> None:
    run = report_example.everything()
    text = printed(run, verbose=True, width=200)
    assert all(f"  {m.site}" in text for m in run.sites)


def test_a_report_read_back_prints_the_same(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(report_json.dumps(report_example.everything()), encoding="utf-8")
    assert printed(report_json.load(path), verbose=True) == printed(report_example.everything(), verbose=True)
