"""The pictures: drawn for whatever a report may hold, the same bytes for the same data."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from parity.errors import UsageError
from parity.report import plots
from parity.results import Comparison, Structure, Token
from tests.report_example import everything, hostile, matching, measurement

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    first = plots.write(everything(), tmp_path / "a")
    # Settings of the user must not show.
    import matplotlib

    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": None, "lines.linewidth": 7}):
        second = plots.write(everything(), tmp_path / "b")
    assert list(first) == list(second)
    for name in first:
        assert first[name].read_bytes() == second[name].read_bytes(), name


def test_each_picture_comes_as_svg_and_png(tmp_path: Path) -> None:
    written = plots.write(everything(), tmp_path)
    names = ("finding-1", "finding-2", "finding-3", "depth", "map", "next-token")
    assert list(written) == [f"{name}.{suffix}" for name in names for suffix in ("svg", "png")]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(written)
    for name, path in written.items():
        content = path.read_bytes()
        assert content.startswith(PNG) if name.endswith(".png") else b"<svg" in content
        assert not re.search(rb"20\d\d-\d\d-\d\dT|Matplotlib v", content), "no date, no version"


@pytest.mark.slow
def test_strange_names_and_tokens_are_drawn(tmp_path: Path) -> None:
    run = hostile()
    assert run.next_token is not None
    strange = tuple(Token(i, text, float(i)) for i, text in enumerate(["$x^{", "画", "\U0001f3a8", "\x00", ""]))
    run = dataclasses.replace(run, next_token=dataclasses.replace(run.next_token, reference=strange))
    for path in plots.write(run, tmp_path).values():
        assert b"<script>alert" not in path.read_bytes()


def nothing_measured() -> Comparison:
    """A run of which only the names of the sites are known."""
    return dataclasses.replace(everything(), findings=(), sites=(measurement("lm_head", "unmeasured", None),))


def nothing_finite() -> Comparison:
    """A finding whose profile has no number that could be drawn."""
    infinite = float("inf")
    shape = Structure(0.0, 0.0, (infinite, float("nan")), (infinite,), 0, 0.0, None, 2)
    run = everything()
    sites = tuple(dataclasses.replace(m, structure=shape, local_rel=infinite, rel_l2=infinite) for m in run.sites)
    return dataclasses.replace(run, sites=sites)


@pytest.mark.slow
@pytest.mark.parametrize("make", [nothing_measured, nothing_finite, matching], ids=lambda f: f.__name__)
def test_there_need_not_be_much_to_draw(make: object, tmp_path: Path) -> None:
    assert callable(make)
    assert "map.svg" in plots.write(make(), tmp_path)


def test_pictures_of_findings_that_are_gone_go(tmp_path: Path) -> None:
    (tmp_path / "finding-7.png").touch()
    (tmp_path / "mine.png").touch()
    written = plots.write(dataclasses.replace(matching(), sites=(), next_token=None), tmp_path)
    assert not written
    assert [p.name for p in tmp_path.iterdir()] == ["mine.png"]


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pictures need matplotlib .* pip install matplotlib"):
        plots.write(everything(), tmp_path)
