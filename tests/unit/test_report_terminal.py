"""The report in a terminal: the answer first, in 80 columns, plain where nobody sees colours."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from parity.report import json as report_json
from parity.report.layers import rows
from parity.report.terminal import show
from parity.results import Comparison
from tests import goldens, report_example
from tests.report_example import measurement


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


def test_a_match_is_short_and_shows_the_worst_layers() -> None:
    run = report_example.matching()
    sites = [
        dataclasses.replace(m, site=f"model.layers.{i}.x", ratio=1 + i / 100) for i in range(30) for m in run.sites[:1]
    ]
    text = printed(dataclasses.replace(run, sites=tuple(sites)))
    head, _, table = text.partition("\nlayer ")
    assert len(head.splitlines()) <= 6
    assert [row.split()[0] for row in table.splitlines()[1:7]] == [f"layers.{i}" for i in range(24, 30)]
    assert "and 24 more rows: 24 rounding; -v shows them" in table
    assert "layers.3 " not in table
    assert "layers.3 " in printed(dataclasses.replace(run, sites=tuple(sites)), verbose=True)


def test_a_layer_with_a_gap_has_the_verdict_of_what_was_measured() -> None:
    (row,) = rows([measurement("m.layers.0.a", "unmeasured", None), measurement("m.layers.0.b", "rounding", 1.0)])
    assert (row.verdict, row.measured, row.known) == ("rounding", 1, 2)
    (row,) = rows([measurement("m.layers.0.a", "unmeasured", None)])
    assert row.verdict == "unmeasured"


def test_a_bit_equal_layer_shows_no_ratio() -> None:
    run = dataclasses.replace(report_example.matching(), sites=(measurement("m.layers.0.a", "exact", 1.0),))
    line = next(line for line in printed(run).splitlines() if line.startswith("layers.0"))
    assert line.split()[:4] == ["layers.0", "exact", "1/1", "="]
    assert "1.00 " not in line


def test_a_run_that_is_bit_equal_throughout_has_no_table_of_equal_rows() -> None:
    sites = tuple(measurement(f"m.layers.{i}.a", "exact", 1.0) for i in range(9))
    run = dataclasses.replace(report_example.matching(), sites=sites)
    text = printed(run)
    assert "all 9 rows exact, bit-equal to the reference on the same inputs" in " ".join(text.split())
    assert "layers.3" not in text
    assert "layers.3" in printed(run, verbose=True)


def test_what_no_fault_explains_is_said_and_the_look_of_the_error_only_where_it_helps() -> None:
    run = report_example.everything()
    named, unnamed, *_ = printed(run).split("\n\n")[1:]
    assert "no known fault matched" not in named
    assert "the error grows with position" not in named
    assert "the error grows with position" in printed(run, verbose=True)
    assert "no known fault matched" in unnamed


@pytest.mark.parametrize("width", [50, 60, 70, 80, 100])
def test_names_are_whole_while_columns_of_less_use_are_there(width: int) -> None:
    long = "model.layers.0.self_attn.a_name_of_some_length"
    sites = (measurement(long, "wrong", 9.0), measurement("model.layers.0.x", "rounding", 1.0))
    text = printed(dataclasses.replace(report_example.everything(), sites=sites), width=width)
    assert "…" not in text.partition("\nlayer ")[2]
    assert "self_attn.a_name_of_some_length" in text or "worst" not in text.partition("\nlayer ")[2]
    assert ("worst cosine" in text) == (width == 100)
