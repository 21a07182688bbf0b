"""What ports write: safetensors, npz, folders of .npy; name maps."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from parity.dump import Dump, load_names, open_dump, write_safetensors, write_tokens
from parity.dump.names import left_out, parse_names, rename
from parity.errors import DumpError

TOKENS = ((1, 2, 3), (4, 5, 6))
LAYER = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
DIMS = {"model.layers.*": "batch token hidden", "lm_head": "batch token vocab"}
SAID = {"producer": "port 1.0", "model": "tiny", "dtype": "float32", "attention": "own"}


def tensors() -> dict[str, Any]:
    return {
        "model.layers.10": LAYER,
        "model.layers.9": LAYER + 1,
        "lm_head": LAYER[..., :2],
        "norm": LAYER[0],
    }


def write(path: Path, arrays: dict[str, Any], metadata: dict[str, Any]) -> Path:
    """Write the same dump in the format that the suffix names."""
    texts = {f"parity.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    if path.suffix == ".safetensors":
        write_safetensors(path, arrays, texts)
    elif path.suffix == ".npz":
        np.savez(path, **arrays, **{key: np.array(text) for key, text in texts.items()})
    else:
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
        (path / "parity.json").write_text(json.dumps(metadata))
    return path


FORMATS = pytest.mark.parametrize("name", ["port.safetensors", "port.npz", "port"])


@FORMATS
@pytest.mark.parametrize("as_tensor", [True, False])
def test_every_format_says_the_same(tmp_path: Path, name: str, as_tensor: bool) -> None:
    arrays, metadata = tensors(), {**SAID, "dims": DIMS}
    if as_tensor:
        arrays["token_ids"] = np.array(TOKENS)
    else:
        metadata["token_ids"] = TOKENS
    with open_dump(write(tmp_path / name, arrays, metadata)) as dump:
        assert dump.info.token_ids == TOKENS
        assert {key: getattr(dump.info, key) for key in SAID} == SAID
        assert dump.info.prompt is None
        assert set(dump.entries) == set(tensors())
        if name != "port":  # a folder has no order
            assert list(dump.entries) == list(tensors())
        assert dump.entries["model.layers.10"].dims == ("batch", "token", "hidden")
        assert dump.entries["lm_head"].dims == ("batch", "token", "vocab")
        assert dump.entries["norm"].dims is None
        for site, array in tensors().items():
            np.testing.assert_array_equal(dump.read(site), array)
            assert not dump.read(site).flags.writeable


@FORMATS
def test_a_dump_may_say_nothing(tmp_path: Path, name: str) -> None:
    dump = open_dump(write(tmp_path / name, {"norm": LAYER, "empty": np.zeros((0, 3)), "one": np.array(5)}, {}))
    assert (dump.info.token_ids, dump.info.producer, dump.info.notes) == (None, None, ())
    assert dump.read("empty").shape == (0, 3)
    assert dump.read("one") == 5
    dump.close()


@FORMATS
def test_one_bare_row_of_token_ids(tmp_path: Path, name: str) -> None:
    with open_dump(write(tmp_path / name, {"norm": LAYER}, {"token_ids": [7, 8]})) as dump:
        assert dump.info.token_ids == ((7, 8),)


@pytest.mark.parametrize("name", ["port.npz", "port"])
@pytest.mark.parametrize("stored", [np.uint16, "V2"])
def test_bits_in_numpy_files_are_what_the_dump_declares(tmp_path: Path, name: str, stored: Any) -> None:
    value = np.array([1.5, -0.0, np.nan], ml_dtypes.bfloat16)
    path = write(tmp_path / name, {"norm": value.view(stored)}, {"dtype": "bfloat16"})
    with open_dump(path) as dump:
        assert dump.entries["norm"].dtype == "bfloat16"
        assert dump.read("norm").tobytes() == value.tobytes()
        assert dump.info.notes == ("1 tensors stored as bare bits were read as bfloat16",)


def test_safetensors_are_views_even_where_the_header_is_odd(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    for padding in range(4):
        text = header + b" " * padding
        data = np.array([1, 2], np.float32).tobytes()
        (tmp_path / "port").write_bytes(len(text).to_bytes(8, "little") + text + data)
        with open_dump(tmp_path / "port") as dump:
            assert dump.read("a").tolist() == [1, 2]
            assert dump.read("a").flags.aligned


def test_our_safetensors_are_those_of_the_library(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    values = {"one": np.array(3), "empty": np.zeros((0, 2), np.float16), "layer": LAYER}
    write_safetensors(tmp_path / "ours", values, {"parity.producer": "parity"})
    numpy.save_file(values, tmp_path / "theirs")
    for arrays in (
        numpy.load_file(tmp_path / "ours"),
        {s: open_dump(tmp_path / "theirs").read(s) for s in values},
    ):
        for name, value in values.items():
            np.testing.assert_array_equal(arrays[name], value, strict=True)


def test_tokens_are_lines_of_ids(tmp_path: Path) -> None:
    write_tokens(tmp_path / "ref.tokens.txt", TOKENS)
    assert (tmp_path / "ref.tokens.txt").read_text() == "1 2 3\n4 5 6\n"


# ---- name maps


def port(tmp_path: Path, **arrays: Any) -> Dump:
    return open_dump(write(tmp_path / "port.safetensors", arrays, {"dims": dict.fromkeys(arrays, "batch token _")}))


def test_a_map_renames_by_number_and_splits_without_copying(tmp_path: Path) -> None:
    qkv = np.arange(2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8)
    dump = port(tmp_path, **{"blk.7.norm": LAYER, "blk.12.qkv": qkv, "blk.0.qkv": qkv, "other": LAYER})
    names = parse_names(
        {
            "blk.*.norm": "model.layers.*.input_layernorm",
            "blk.*.qkv": {"split": ["l.*.q", "l.*.k", "l.*.v"], "sizes": [4, 2, 2]},
            "blk.0.qkv": {"split": ["first", "second"], "dim": 2},
        },
        "map",
    )
    named = rename(dump, names)
    sites = ["model.layers.7.input_layernorm", "l.12.q", "l.12.k", "l.12.v", "first", "second", "other"]
    assert list(named.entries) == sites
    assert named.entries["l.12.k"].shape == (2, 3, 2)
    assert named.entries["l.12.k"].dims == ("batch", "token", "_")
    np.testing.assert_array_equal(named.read("l.12.k"), qkv[..., 4:6])
    np.testing.assert_array_equal(named.read("second"), qkv[..., 4:])
    assert not named.read("l.12.k").flags.owndata
    assert named.info.notes == ("a name map named 6 of 7 sites",)
    named.close()
    with pytest.raises(ValueError, match="closed"):
        dump.read("other")


def test_a_map_in_the_dump_and_one_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path / "port.npz", {"a.1.x": LAYER}, {"names": {"a.*.x": "b.*.x"}})
    (tmp_path / "names.json").write_text('{"b.*.x": "model.layers.*"}')
    with open_dump(path, tmp_path / "names.json") as dump:
        assert list(dump.entries) == ["model.layers.1"]
        np.testing.assert_array_equal(dump.read("model.layers.1"), LAYER)


def test_a_star_is_a_number_and_nothing_else(tmp_path: Path) -> None:
    dump = port(tmp_path, **{"blk.x.norm": LAYER, "blk.1.2.norm": LAYER, "blkx1.norm": LAYER})
    assert list(rename(dump, parse_names({"blk.*.norm": "n.*"}, "map")).entries) == list(dump.entries)


def test_what_a_map_maps_to_null_is_left_out(tmp_path: Path) -> None:
    names = parse_names({"blk.*.mask": None, "model.layers.*.mlp.act_fn": None, "blk.*.out": "model.layers.*"}, "map")
    path = write(tmp_path / "port.npz", {"blk.1.mask": LAYER, "blk.1.out": LAYER, "blk.1.masks": LAYER}, {})
    with open_dump(path) as dump:
        assert list(rename(dump, names).entries) == ["model.layers.1", "blk.1.masks"]
    assert left_out(names) == {"blk.*.mask", "model.layers.*.mlp.act_fn"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"a": "c", "b": "c"}, r"two tensors are named 'c' — 'a' and 'b' — correct the name map"),
        ({"a": "b"}, r"two tensors are named 'b' — 'a' and 'b'"),
        (
            {"a": {"split": ["c", "d", "e"]}},
            r"'a' cannot be split into 3 equal parts — dim -1 of its shape \(2, 3, 4\)",
        ),
        (
            {"a": {"split": ["c", "d"], "sizes": [1, 2]}},
            r"'a' cannot be split into sizes \[1, 2\] — dim -1 .* is 4 long",
        ),
        ({"a": {"split": ["c"], "sizes": [3]}}, r"'a' cannot be split into sizes \[3\]"),
        (
            {"a": {"split": ["c", "d"], "dim": 3}},
            r"'a' cannot be split along dim 3 — its shape is \(2, 3, 4\)",
        ),
    ],
)
def test_maps_that_do_not_fit(tmp_path: Path, names: dict[str, Any], message: str) -> None:
    with pytest.raises(DumpError, match=message), port(tmp_path, a=LAYER, b=LAYER) as dump:
        rename(dump, parse_names(names, "map"))


@pytest.mark.parametrize(
    "target",
    [
        *(3, [], {}, {"split": []}, {"split": [1]}),
        {"split": "ab"},
        {"split": ["a"], "sizes": []},
        {"split": ["a"], "size": [1]},
        {"split": ["a"], "sizes": 3},
        {"split": ["a"], "dim": "x"},
        {"split": ["a", "b"], "sizes": [1]},
        {"split": ["a", "b"], "sizes": [-1, 5]},
    ],
)
def test_malformed_targets(target: Any) -> None:
    with pytest.raises(DumpError, match=r"^map: 'a' maps to nothing usable — found"):
        parse_names({"a": target}, "map")


def test_malformed_maps(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match=r"differ in the number of '\*'"):
        parse_names({"blk.*.a": "model.a"}, "map")
    with pytest.raises(DumpError, match=r"^map: is not a name map — found \['a'\]"):
        parse_names(["a"], "map")
    (tmp_path / "names.json").write_text("a = b")
    with pytest.raises(DumpError, match=r"names\.json: is not a name map — not JSON"):
        load_names(tmp_path / "names.json")
