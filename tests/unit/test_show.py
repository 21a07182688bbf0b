"""`parity show` without a model: figures of arrays whose figures are known, whatever their layout."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from parity.dump import ArchiveWriter, Array, Dump, RunInfo, open_dump, write_safetensors
from parity.errors import UsageError
from parity.observer import Observer
from parity.show import layout as layouts
from parity.show.looked import by_layer, chosen, look
from parity.show.page import write
from parity.show.statistics import OUTLIER, distance, statistics
from parity.show.terminal import show
from parity.show.views import view

IDS = ((1, 2, 3, 4, 5),)
HIDDEN = ("batch", "token", "feature")


def dump_of(path: Path, arrays: dict[str, tuple[Array, tuple[str, ...] | None]], **info: Any) -> Dump:
    with ArchiveWriter(path, RunInfo(**({"token_ids": IDS} | info))) as writer:
        for site, (array, dims) in arrays.items():
            writer.add(site, array, dims)
    return open_dump(path)


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_the_figures_are_those_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(layouts, "_BLOCK", block)
    x = noise(1, 5, 12)
    x[0, 3, 7] = -50.0
    found = statistics(dump_of(tmp_path / "a.h5", {"model.layers.0": (x, HIDDEN)}), "model.layers.0")
    assert found.norm == pytest.approx(np.linalg.norm(x[0].astype(float), axis=-1).mean())
    assert found.rms == pytest.approx(math.sqrt(float((x.astype(float) ** 2).mean())))
    assert found.largest is not None
    assert (found.largest.value, found.largest.token, found.largest.channel) == (-50.0, 3, 7)
    assert (found.low, found.high) == (-50.0, float(x.max()))
    assert (found.rows, found.channels, found.dead, found.nonfinite) == (5, 12, 0, 0)


def test_outliers_are_named_and_a_channel_below_the_limit_is_not(tmp_path: Path) -> None:
    x = np.ones((1, 5, 12), dtype=np.float32)
    x[..., 4], x[..., 9] = OUTLIER * 1.01, OUTLIER * 0.99
    found = statistics(dump_of(tmp_path / "a.h5", {"a": (x, HIDDEN)}), "a")
    assert [(o.channel, o.name) for o in found.outliers] == [(4, "channel 4")]
    assert found.outliers[0].times == pytest.approx(OUTLIER * 1.01)
    assert found.outlier_count == 1


def test_dead_channels_and_what_is_not_finite_are_counted(tmp_path: Path) -> None:
    x = noise(1, 5, 12)
    x[..., 2] = x[..., 8] = 0.0
    x[0, 1, 8] = np.nan  # zero elsewhere, but not dead
    x[0, 4, 5] = np.inf
    found = statistics(dump_of(tmp_path / "a.h5", {"a": (x, HIDDEN)}), "a")
    assert (found.dead, found.nonfinite) == (1, 2)
    assert math.isfinite(found.norm + found.rms + found.high)


def test_heads_are_channels_of_a_token_wherever_their_axis_lies(tmp_path: Path) -> None:
    x = noise(1, 3, 5, 4)
    x[0, 2, 1, 3] = 99.0
    dims = ("batch", "head", "token", "head_dim")
    arrays = {"q": (x, dims), "k": (np.swapaxes(x, 1, 2).copy(), ("batch", "token", "head", "head_dim"))}
    dump = dump_of(tmp_path / "a.h5", arrays)
    for site in arrays:
        found = statistics(dump, site)
        assert found.largest is not None
        assert (found.largest.token, found.largest.name) == (1, "head 2, head_dim 3")
        assert (found.rows, found.channels) == (5, 12)


def test_what_a_mask_hides_is_no_number(tmp_path: Path) -> None:
    scores = noise(1, 2, 5, 5).astype(ml_dtypes.bfloat16)
    later = np.triu_indices(5, 1)
    scores[0, :, *later] = float(ml_dtypes.finfo(ml_dtypes.bfloat16).min)
    dims = ("batch", "head", "token", "key")
    found = statistics(dump_of(tmp_path / "a.h5", {"a.scores": (scores, dims)}), "a.scores")
    assert found.low > -10
    assert (found.nonfinite, found.dead, found.outlier_count) == (0, 0, 0)
    hidden = dump_of(tmp_path / "b.h5", {"model.norm": (scores, ("batch", "x", "token", "feature"))})
    assert statistics(hidden, "model.norm").low < -1e38, "elsewhere such a number is one"


def test_padding_is_left_out(tmp_path: Path) -> None:
    x = noise(2, 3, 4)
    x[0, 0] = 1e6
    info = {"token_ids": ((0, 1, 2), (1, 2, 3)), "attention_mask": ((0, 1, 1), (1, 1, 1))}
    found = statistics(dump_of(tmp_path / "a.h5", {"a": (x, HIDDEN)}, **info), "a")
    assert (found.rows, found.high < 10) == (5, True)


def test_arrays_without_dims_have_rows(tmp_path: Path) -> None:
    x = noise(5, 12)
    write_safetensors(tmp_path / "a.safetensors", {"a": x, "b": x.reshape(1, 5, 12), "c": x[:, 0].copy()}, {})
    with open_dump(tmp_path / "a.safetensors") as dump:
        assert statistics(dump, "a").norm == pytest.approx(statistics(dump, "b").norm)
        assert statistics(dump, "c").rows in (1, 5)


def test_the_distance_is_that_of_the_numbers_not_of_the_layout(tmp_path: Path) -> None:
    x = noise(1, 3, 5, 4)
    y = x + 0.01 * noise(1, 3, 5, 4, seed=1)
    dims = ("batch", "head", "token", "head_dim")
    first = dump_of(tmp_path / "a.h5", {"q": (x, dims), "only": (x, dims), "cut": (x, dims)})
    turned = (np.swapaxes(y, 1, 2).copy(), ("batch", "token", "head", "head_dim"))
    second = dump_of(tmp_path / "b.h5", {"q": turned, "cut": (y[..., :2].copy(), dims)})
    found = distance(first, second, "q")
    assert found.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-4)
    assert found.largest == pytest.approx(np.abs(x - y).max(), rel=1e-4)
    assert distance(first, first, "q").relative == 0
    assert "not in the second" in distance(first, second, "only").why_not
    assert "shape" in distance(first, second, "cut").why_not


def test_a_view_holds_every_number_and_the_largest_of_each_cell(tmp_path: Path) -> None:
    x = noise(1, 400, 600)
    x[0, 321, 555] = 77.0
    dump = dump_of(tmp_path / "a.h5", {"a": (x, HIDDEN)}, token_ids=(tuple(range(400)),))
    found = view(dump, statistics(dump, "a"))
    assert found.histogram is not None
    assert sum(found.histogram.counts) == x.size
    assert found.heatmap is not None
    cells = np.array(found.heatmap.cells)
    assert cells.shape[0] <= 96
    assert cells.shape[1] <= 256
    assert cells[321 // math.ceil(400 / 96), 555 // math.ceil(600 / 256)] == 77.0
    assert np.abs(cells).max() == 77.0


def test_heads_say_where_they_look(tmp_path: Path) -> None:
    probs = np.zeros((1, 3, 5, 5), dtype=np.float32)
    rows = np.arange(5)
    probs[0, 0, :, 0] = 1.0
    probs[0, 1, rows, rows] = 1.0
    probs[0, 2, rows, np.maximum(rows - 1, 0)] = 1.0
    dump = dump_of(tmp_path / "a.h5", {"a.probs": (probs, ("batch", "head", "token", "key"))})
    sink, itself, previous = view(dump, statistics(dump, "a.probs")).heads
    assert (sink.first, sink.entropy) == (1.0, 0.0)
    assert (itself.itself, itself.previous) == (1.0, 0.0)
    assert previous.previous == 1.0


SITES = ("model.embed_tokens", "model.layers.0.mlp.act_fn", "model.layers.0", "model.layers.1.mlp.act_fn", "model.norm")


@pytest.fixture
def whole(tmp_path: Path) -> Dump:
    arrays = {site: (noise(1, 5, 12, seed=i), HIDDEN) for i, site in enumerate(SITES)}
    return dump_of(tmp_path / "whole.h5", arrays, model="tiny", dtype="float32")


@pytest.mark.parametrize(
    ("wanted", "sites"),
    [
        (None, SITES),
        ("model.layers.0", ("model.layers.0",)),
        ("layers.0", SITES[1:3]),
        ("mlp.act_fn", (SITES[1], SITES[3])),
        ("*.act_fn", (SITES[1], SITES[3])),
        ("norm", ("model.norm",)),
    ],
)
def test_sites_are_chosen_by_name(whole: Dump, wanted: str | None, sites: tuple[str, ...]) -> None:
    assert tuple(chosen(whole, wanted)) == sites


def test_a_name_of_nothing_gets_a_suggestion(whole: Dump) -> None:
    with pytest.raises(UsageError, match=r"no site 'model.layers.0.mlp.actfn' .* Is it model.layers.0.mlp.act_fn\?"):
        chosen(whole, "model.layers.0.mlp.actfn")


def printed(dump: Dump, wanted: str | None, width: int = 80, against: Dump | None = None, verbose: bool = False) -> str:
    out = io.StringIO()
    show(look(dump, wanted, against, (), Observer()), Console(file=out, width=width), verbose=verbose)
    return out.getvalue()


def test_the_table_is_by_layer_and_all_sites_are_listed_when_asked(whole: Dump) -> None:
    text = printed(whole, None)
    assert "layers.0" in text
    assert "model.layers.0.mlp.act_fn" not in text
    assert "model.layers.0.mlp.act_fn" in printed(whole, None, verbose=True)
    assert max(map(len, text.splitlines())) <= 80
    layers = by_layer(look(whole, None, None, (), Observer()).sites)
    assert [(one.label, one.output and one.output.site, one.sites) for one in layers][1:3] == [
        ("layers.0", "model.layers.0", 2),
        ("layers.1", None, 1),
    ]


def test_names_stay_whole_where_columns_do_not_fit(whole: Dump) -> None:
    text = printed(whole, "mlp.act_fn", width=60, against=whole)
    assert "model.layers.1.mlp.act_fn" in text
    assert "distance" in text
    assert "dtype" not in text
    assert "dtype" in printed(whole, "mlp.act_fn", width=140, against=whole)


def test_one_site_is_drawn_in_the_terminal(whole: Dump) -> None:
    text = printed(whole, "model.norm")
    assert "█" in text
    assert "12 channels across" in text


@pytest.mark.slow
def test_the_page_is_one_file_with_the_pictures_in_it(whole: Dump, tmp_path: Path) -> None:
    looked = look(whole, "model.norm", whole, (), Observer())
    page = write(looked, tmp_path / "page")
    text = page.read_text()
    assert text.count("<svg") == 1
    for asking in ("src=", "@import", "url(http", 'href="http'):
        assert asking not in text
    assert (tmp_path / "page" / "site-0.svg").read_text().startswith("<svg")
    again = write(looked, tmp_path / "again").read_text()
    assert again == text, "the same dump gives the same page"


@pytest.mark.slow
def test_hostile_names_do_not_reach_the_page(tmp_path: Path) -> None:
    dump = dump_of(tmp_path / "a.h5", {"<script>x\x1b[31m": (noise(1, 5, 12), HIDDEN)}, producer="<b>me")
    text = write(look(dump, "<*", None, (), Observer()), tmp_path / "page").read_text()
    assert "<script" not in text
    assert "\x1b" not in text + printed(dump, None)
    assert "<b>me" not in text


def test_nothing_finite_and_nothing_at_all_are_shown(tmp_path: Path) -> None:
    arrays = {
        "nan": (np.full((1, 5, 2), np.nan, "f4"), HIDDEN),
        "empty": (np.zeros((1, 5, 0), np.float32), HIDDEN),
    }
    dump = dump_of(tmp_path / "a.h5", arrays)
    assert statistics(dump, "nan").nonfinite == 10
    text = printed(dump, None, verbose=True) + printed(dump, "nan") + printed(dump, "empty")
    assert "–" in text
