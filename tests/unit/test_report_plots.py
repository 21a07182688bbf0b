"""The pictures: drawn for whatever a report may hold, the same bytes for the same data."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from parity.errors import UsageError
from parity.predictions import LogitSample, Token
from parity.report import plots
from parity.results import Comparison, Residual, Structure
from tests.report_example import everything, hostile, matching, measurement, residual, structure

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pictures of one report, drawn once: that takes seconds."""
    return plots.write(everything(), tmp_path_factory.mktemp("plots"))


@pytest.mark.slow
def test_the_same_data_gives_the_same_bytes(tmp_path: Path, written: dict[str, Path]) -> None:
    first = written
    # Settings of the user must not show.
    import matplotlib

    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": None, "lines.linewidth": 7}):
        second = plots.write(everything(), tmp_path / "b")
    assert list(first) == list(second)
    for name in first:
        assert first[name].read_bytes() == second[name].read_bytes(), name


@pytest.mark.slow
def test_each_picture_comes_as_svg_and_png(written: dict[str, Path]) -> None:
    names = ("finding-1", "finding-2", "finding-3", "depth", "map", "next-token", "logits")
    assert list(written) == [f"{name}.{suffix}" for name in names for suffix in ("svg", "png")]
    folder = written["map.png"].parent
    assert sorted(p.name for p in folder.iterdir()) == sorted(written)
    for name, path in written.items():
        content = path.read_bytes()
        assert content.startswith(PNG) if name.endswith(".png") else b"<svg" in content
        assert not re.search(rb"20\d\d-\d\d-\d\dT|Matplotlib v", content), "no date, no version"


def test_a_finding_shows_each_head_at_each_token() -> None:
    shown = residual("s")
    figure = plots._residual("title", structure(500.0), shown, tokens=8)
    bars, picture, *_ = figure.axes
    (image,) = picture.get_images()
    drawn = image.get_array()
    assert drawn is not None
    assert drawn.T.tolist() == [list(row) for row in shown.ratios]
    assert (picture.get_xlabel(), picture.get_ylabel()) == ("token", "head")
    assert picture.get_xlim() == bars.get_xlim() == (-0.5, 7.5)
    assert picture.get_ylim() == (3.5, -0.5)
    colours = image.to_rgba(drawn)
    assert tuple(colours[1, 5]) != tuple(colours[1, 1]) == tuple(colours[2, 5]), "rounding is pale, whatever it is"


def test_many_tokens_and_channels_share_a_cell() -> None:
    shown = Residual("s", "channel", 250, ((1.0, 9.0, 1.0), (1.0, 1.0, float("inf"))))
    bars, picture, *_ = plots._residual("title", structure(1.0), shown, tokens=7).axes
    assert (picture.get_xlabel(), picture.get_ylabel()) == ("token, 4 in a column", "channel, 84 in a row")
    assert (picture.get_xlim(), picture.get_ylim()) == ((-0.5, 6.5), (249.5, -0.5))
    (image,) = picture.get_images()
    assert image.get_extent() == [-0.5, 7.5, 251.5, -0.5]
    drawn = image.get_array()
    assert drawn is not None
    assert drawn[2, 1] == drawn.max(), "what is infinite is as dark as the worst"
    assert max(patch.get_data().values[-1] for patch in bars.patches) > 9, "and reaches the upper edge"


def test_a_finding_without_a_residual_shows_tokens_and_heads_apart() -> None:
    run = everything()
    old = dataclasses.replace(run, findings=tuple(dataclasses.replace(f, residual=None) for f in run.findings))
    by_token, by_head = plots._pictures(old)["finding-1"]().axes
    assert (by_token.get_xlabel(), by_head.get_xlabel()) == ("token", "head")
    assert plots._pictures(run)["finding-1"]().axes[1].get_images()


@pytest.mark.parametrize(
    ("vocabulary", "words"), [(5, "all 5 tokens of the vocabulary"), (1000, "5 of 1000 tokens: the largest of each")]
)
def test_each_logit_is_a_point(vocabulary: int, words: str) -> None:
    sample = LogitSample((9.0, 3.0, 1.0, -2.0, -8.0), (2.0, 8.0, 1.0, float("inf"), -7.0), vocabulary)
    (axes,) = plots._logits(sample).axes
    points = axes.collections[0].get_offsets()
    assert sorted(map(tuple, points)) == [(-8.0, -7.0), (1.0, 1.0), (3.0, 8.0), (9.0, 2.0)]
    assert words in axes.get_title()
    assert axes.get_xlim() == axes.get_ylim()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("reference", "candidate")


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
