"""Dumps of several calls: joined to what one call with all tokens would have given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from parity.dump import ArchiveWriter, RunInfo, copy_as_safetensors, open_dump, write_safetensors
from parity.dump.calls import call_name
from parity.errors import DumpError

CALLS = (4, 1, 1)
IDS = ((5, 6, 7, 8, 9, 10),)


def in_calls(whole: np.ndarray[Any, Any], axis: int, calls: tuple[int, ...] = CALLS) -> list[np.ndarray[Any, Any]]:
    return np.split(whole, np.cumsum(calls)[:-1], axis=axis)


def numbers(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def written(path: Path, arrays: dict[str, list[Any]], calls: Any = CALLS, ids: Any = IDS, **metadata: Any) -> Path:
    tensors = {call_name(site, i): part for site, parts in arrays.items() for i, part in enumerate(parts)}
    said = {"calls": calls, "token_ids": ids, **metadata}
    write_safetensors(path, tensors, {f"parity.{key}": json.dumps(value) for key, value in said.items()})
    return path


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 6, 8), 1), ((6, 8), 0), ((1, 6, 2, 8), 1), ((1, 4, 6, 8), 2), ((6, 1, 3), 0)]
)
def test_calls_are_joined_along_the_axis_of_tokens(
    tmp_path: Path, shape: tuple[int, ...], axis: int, dtype: Any
) -> None:
    whole = numbers(*shape, dtype=dtype)
    with open_dump(written(tmp_path / "a.safetensors", {"x": in_calls(whole, axis)})) as dump:
        assert list(dump.entries) == ["x"]
        assert dump.info.calls == CALLS
        np.testing.assert_array_equal(dump.read("x"), whole, strict=True)


def test_one_token_at_a_time_has_many_axes_of_one(tmp_path: Path) -> None:
    calls, ids = (1, 1, 1), ((1, 2, 3),)
    whole = {"embed": numbers(1, 3, 8), "heads": numbers(1, 2, 3, 8), "choice": numbers(3, 1)}
    arrays = {site: in_calls(value, value.shape.index(3), calls) for site, value in whole.items()}
    with open_dump(written(tmp_path / "a.safetensors", arrays, calls, ids)) as dump:
        for site, value in whole.items():
            np.testing.assert_array_equal(dump.read(site), value, strict=True)


def test_a_batch_may_lie_flattened_with_its_tokens(tmp_path: Path) -> None:
    whole = numbers(2, 6, 8)
    parts = [part.reshape(-1, 8) for part in in_calls(whole, 1)]
    with open_dump(written(tmp_path / "a.safetensors", {"x": parts}, ids=IDS * 2)) as dump:
        np.testing.assert_array_equal(dump.read("x"), whole.reshape(-1, 8))


@pytest.mark.parametrize("room", [False, True], ids=["as many keys as seen", "room for all keys"])
def test_keys_of_later_calls_are_hidden(tmp_path: Path, room: bool) -> None:
    scores = np.where(np.tri(6, dtype=bool), numbers(1, 2, 6, 6), np.finfo(np.float32).min)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    arrays = {
        site: [part[..., : 6 if room else seen] for part, seen in zip(in_calls(value, 2), (4, 5, 6), strict=True)]
        for site, value in (("layers.0.scores", scores), ("kq_soft_max", shares))
    }
    with open_dump(written(tmp_path / "a.safetensors", arrays)) as dump:
        np.testing.assert_array_equal(dump.read("layers.0.scores"), scores)
        np.testing.assert_array_equal(dump.read("kq_soft_max"), shares)


def test_a_name_map_speaks_of_the_joined_arrays(tmp_path: Path) -> None:
    whole = numbers(1, 6, 8)
    names = {"blk.*.q": "model.layers.*.q_proj"}
    path = written(tmp_path / "a.safetensors", {"blk.3.q": in_calls(whole, 1)}, names=names)
    with open_dump(path) as dump:
        np.testing.assert_array_equal(dump.read("model.layers.3.q_proj"), whole)


def test_arrays_that_are_whole_stay_as_they_are(tmp_path: Path) -> None:
    whole = numbers(1, 6, 8)
    write_safetensors(tmp_path / "a", {"x": whole}, {"parity.calls": "[4, 1, 1]", "parity.token_ids": json.dumps(IDS)})
    with open_dump(tmp_path / "a") as dump:
        assert dump.info.calls == CALLS
        np.testing.assert_array_equal(dump.read("x"), whole)


def test_an_archive_of_calls_is_joined_and_copied(tmp_path: Path) -> None:
    whole = numbers(1, 6, 8)
    with ArchiveWriter(tmp_path / "a.h5", RunInfo(token_ids=IDS, calls=CALLS)) as writer:
        for i, part in enumerate(in_calls(whole, 1)):
            writer.add(call_name("x", i), part, None)
    with open_dump(tmp_path / "a.h5") as dump:
        copy_as_safetensors(dump, tmp_path / "b.safetensors")
    with open_dump(tmp_path / "b.safetensors") as dump:
        assert dump.info.calls == CALLS
        np.testing.assert_array_equal(dump.read("x"), whole)


WHOLE = numbers(1, 6, 8)
SQUARE = numbers(1, 6, 3, 8)


@pytest.mark.parametrize(
    ("arrays", "calls", "message"),
    [
        ({"x": in_calls(WHOLE, 1)}, (4, 1), "calls do not add up — 5 tokens in 2 calls, 6 token ids"),
        ({"x": in_calls(WHOLE, 1)}, "9, 1", "calls are not numbers of tokens — found '9, 1'"),
        ({"x": in_calls(WHOLE, 1)}, (4, 2, 0), "calls are not numbers of tokens"),
        ({"x": in_calls(WHOLE, 1)[:2]}, CALLS, "'x' lacks call 2 of 3"),
        ({"x": in_calls(WHOLE, 1)}, (4, 2), "'x' has 3 calls of 2"),
        ({"x": [part[:, -1:] for part in in_calls(WHOLE, 1)]}, CALLS, "no axis has the 4, 1, 1 tokens"),
        ({"x": in_calls(SQUARE, 1, (3, 3))}, (3, 3), "2 axes may count its 3 tokens — declare them: parity.dims"),
        ({"x": [p[..., :n] for p, n in zip(in_calls(WHOLE, 1), (2, 3, 3), strict=True)]}, CALLS, "write it as one"),
        ({"x": [WHOLE[:, :4], WHOLE[0, 4:5], WHOLE[:, 5:]]}, CALLS, "differ in dtype or number of axes"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(tmp_path: Path, arrays: Any, calls: Any, message: str) -> None:
    with pytest.raises(DumpError) as error:
        open_dump(written(tmp_path / "a.safetensors", arrays, calls))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_declared_axes_settle_what_sizes_do_not(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.safetensors", {"x": in_calls(SQUARE, 1, (3, 3))}, (3, 3), dims={"x": "batch token head head_dim"}
    )
    with open_dump(path) as dump:
        np.testing.assert_array_equal(dump.read("x"), SQUARE)


def test_arrays_of_calls_need_their_sizes(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a", {"x@0": WHOLE[:, :4], "x@1": WHOLE[:, 4:]}, {})
    with pytest.raises(DumpError, match=r"single calls — found 'x@0' — say how many tokens each call had"):
        open_dump(tmp_path / "a")


# -- what attention read of a cache --------------------------------------------------------------------------


def cache_of(tmp_path: Path, *sizes: int, **metadata: Any) -> Any:
    """The cache of a run in three calls with so many rows in each; each row holds its number, from 1."""
    parts = [np.broadcast_to(np.arange(1, 10, dtype=np.float32)[:, None], (1, 2, 9, 3))[:, :, :n] for n in sizes]
    return written(tmp_path / "a.safetensors", {"x.cache_k": [np.ascontiguousarray(p) for p in parts]}, **metadata)


def test_the_rows_that_calls_read_lie_side_by_side(tmp_path: Path) -> None:
    with open_dump(cache_of(tmp_path, 4, 5, 6)) as dump:
        assert dump.entries["x.cache_k"].dims == ("batch", "head", "call", "token", "head_dim")
        rows = dump.read("x.cache_k")[0, 0, :, :, 0]
    assert rows.tolist() == [[1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 6]]
    assert not np.signbit(rows).any()


def test_a_cache_that_keeps_the_last_rows_lacks_the_first(tmp_path: Path) -> None:
    with open_dump(cache_of(tmp_path, 4, 3, 3)) as dump:
        rows = dump.read("x.cache_k")[0, 0, :, :, 0]
    assert rows[2].tolist() == [0, 0, 0, 1, 2, 3]
    assert np.signbit(rows[2]).tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize("dims", [{}, {f"x.cache_k@{call}": "batch head token head_dim" for call in range(3)}])
def test_what_a_buffer_holds_beyond_the_rows_is_not_read(tmp_path: Path, dims: dict[str, str]) -> None:
    with open_dump(cache_of(tmp_path, 9, 9, 9, dims=dims)) as dump:
        assert dump.read("x.cache_k")[0, 0, :, :, 0].tolist()[0] == [1, 2, 3, 4, 0, 0]


def test_a_cache_without_an_axis_of_rows_is_one_line(tmp_path: Path) -> None:
    for parts in ([numbers(1, 2, n, 3 + n) for n in (4, 5, 6)], [numbers(1, 3, 3, 8)] * 3, [numbers(1, 9, 7, 8)] * 3):
        with pytest.raises(DumpError, match=r"no axis has the 4, 5, 6 rows that the calls read"):
            open_dump(written(tmp_path / "a.safetensors", {"x.cache_v": parts}))
