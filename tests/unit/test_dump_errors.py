"""Every way in which a dump can be wrong has its own line: what is wrong, what was found, what to do."""

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest

from parity.dump import (
    ArchiveWriter,
    Dump,
    Entry,
    RunInfo,
    open_archive,
    open_dump,
    open_npz,
    open_safetensors,
    write_safetensors,
    write_tokens,
)
from parity.errors import DumpError


def refused(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(DumpError) as caught:
        call()
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text
    assert text.count(" — ") >= 2, text


def archive(path: Path) -> Path:
    with ArchiveWriter(path, RunInfo(token_ids=((1, 2),))) as writer:
        writer.add("model.norm", np.zeros(1000, ml_dtypes.bfloat16), ("_",))
    return path


# ---- any file


@pytest.mark.parametrize("opener", [open_dump, open_archive, open_safetensors, open_npz])
def test_missing_directory_and_empty(tmp_path: Path, opener: Callable[[Path], Dump]) -> None:
    (tmp_path / "empty.h5").touch()
    refused("nowhere: does not exist — no such file — check the name", lambda: opener(tmp_path / "nowhere"))
    refused("empty.h5: is an empty file — 0 bytes", lambda: opener(tmp_path / "empty.h5"))
    found = "without .npy files" if opener is open_dump else "expected a file"
    refused(f"is a directory .*{found}", lambda: opener(tmp_path))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"hello world", "is not a dump — found a file that begins b'hello world' — parity opens HDF5"),
        (b"GGUF1234", "found a GGUF: that is a model"),
        (b"\x93NUMPY\x01\x00", "found a single .npy: put one for each site into a folder"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, start: bytes, message: str) -> None:
    (tmp_path / "port.bin").write_bytes(start)
    refused(message, lambda: open_dump(tmp_path / "port.bin"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.h5", "is not HDF5 — it does not begin as"),
        ("a.safetensors", "is not safetensors — found"),
        ("a.npz", "is not a whole npz — File is not a zip file"),
    ],
)
def test_the_suffix_decides_where_the_content_does_not(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"hello world")
    refused(message, lambda: open_dump(tmp_path / name))


def test_content_wins_over_the_suffix(tmp_path: Path) -> None:
    with open_dump(archive(tmp_path / "ref.safetensors")) as dump:
        assert list(dump.entries) == ["model.norm"]


# ---- the archive


def test_truncated_archives(tmp_path: Path) -> None:
    whole = archive(tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(whole[: len(whole) // 2])
    refused(rf"is truncated — {len(whole) // 2} bytes are left", lambda: open_dump(tmp_path / "a.h5"))
    for length in range(1, len(whole), 97):
        (tmp_path / "a.h5").write_bytes(whole[:length])
        with pytest.raises(DumpError):
            open_dump(tmp_path / "a.h5")


def edited(path: Path, edit: Callable[[h5py.File], None]) -> Path:
    with h5py.File(archive(path), "a") as file:
        edit(file)
    return path


def put(file: h5py.File, name: str, value: Any) -> None:
    del file[name]
    file[name] = value


ARCHIVES: list[tuple[Callable[[h5py.File], Any], str]] = [
    (
        lambda f: f.attrs.pop("parity_format"),
        "is HDF5 but no archive of parity — found 'index', 'run', 'sites' at",
    ),
    (
        lambda f: f.attrs.create("parity_format", 2),
        "has format 2 — this parity reads format 1 — update parity",
    ),
    (lambda f: f.pop("index"), "is incomplete — the run ended after 1 sites or more — record again"),
    (lambda f: put(f, "index", "{"), "its 'index' is damaged"),
    (lambda f: put(f, "index", "[]"), "its 'index' is damaged"),
    (lambda f: put(f, "run", "{}"), "its 'run' is damaged — KeyError"),
    (lambda f: f.pop("run"), "its 'run' is damaged"),
    (lambda f: f["sites"].pop("model.norm"), "has lost 1 sites — 'model.norm' is in the index only"),
]


@pytest.mark.parametrize(("edit", "message"), ARCHIVES)
def test_edited_archives(tmp_path: Path, edit: Callable[[h5py.File], Any], message: str) -> None:
    path = edited(tmp_path / "a.h5", edit)
    refused(message, lambda: open_dump(path))


@pytest.mark.parametrize("value", [np.zeros(1000, np.float32), np.zeros(999, np.float16)])
def test_replaced_values(tmp_path: Path, value: Any) -> None:
    path = edited(tmp_path / "a.h5", lambda file: put(file, "sites/model.norm", value))
    refused(r"'model.norm' is not the bfloat16 \(1000,\) of the index — found float", lambda: open_dump(path))


def test_unknown_sites(tmp_path: Path) -> None:
    dump = open_dump(archive(tmp_path / "a.h5"))
    refused(
        "has no site 'model.nrom' — it has 1 others — did you mean 'model.norm'",
        lambda: dump.read("model.nrom"),
    )
    refused("has no site 'x' — it has 1 others — its sites are", lambda: dump.read("x"))


@pytest.mark.parametrize(
    ("site", "array", "dims", "message"),
    [
        ("once", np.zeros(2), None, "site 'once' is recorded twice"),
        ("a/b", np.zeros(2), None, "'a/b' names no site"),
        ("", np.zeros(2), None, "'' names no site"),
        (".", np.zeros(2), None, "'.' names no site"),
        ("u", np.zeros(2, np.uint16), None, "site 'u' has dtype uint16 — a dump holds bfloat16"),
        ("c", np.zeros(2, complex), None, "site 'c' has dtype complex128"),
        ("d", np.zeros((2, 3)), ("batch",), r"dims 'batch' but shape \(2, 3\) — 1 names for 2 axes"),
        ("d", np.zeros((2, 3)), ("token", "token"), "dims 'token token' — a name stands for two axes"),
    ],
)
def test_what_the_writer_refuses(tmp_path: Path, site: str, array: Any, dims: Any, message: str) -> None:
    def write() -> None:
        with ArchiveWriter(tmp_path / "a.h5", RunInfo()) as writer:
            writer.add("once", np.zeros(1), None)
            writer.add(site, array, dims)

    refused(message, write)
    assert list(tmp_path.iterdir()) == []


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        with ArchiveWriter(path, RunInfo()):
            pass

    refused(
        "cannot be written — there is no directory .*nowhere — create it",
        lambda: write(tmp_path / "nowhere" / "a.h5"),
    )
    refused("cannot be written — it is a directory — give the name", lambda: write(tmp_path))
    if Path("/proc/version").exists():  # where not even root creates files
        refused("/proc/a.h5: cannot be written — ", lambda: write(Path("/proc/a.h5")))
        refused("/proc/a: cannot be written — ", lambda: write_safetensors(Path("/proc/a"), {}, {}))
        refused("/proc/a: cannot be written — ", lambda: write_tokens(Path("/proc/a"), ((1,),)))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (((1, 2), (3,)), "token ids are ragged — rows of 1 and 2 ids"),
        (((1.5,),), "token ids are not integers"),
        (((True,),), "token ids are not integers"),
        ("12", "token ids are not a list — found '12'"),
        (5, "token ids are not a list — found 5"),
    ],
)
def test_token_ids(tokens: Any, message: str) -> None:
    refused(message, lambda: RunInfo(token_ids=tokens))


def test_dims_without_names_may_repeat() -> None:
    assert Entry("site", ("_", "_"), (1, 2), "float32").dims == ("_", "_")


# ---- safetensors


def safetensors(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: str = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


SAFETENSORS = [
    (b"1234", "is not safetensors — found 4 bytes"),
    (safetensors({"a": tensor()}, length=2**40), "is not safetensors"),
    (
        safetensors({"a": tensor()}, length=999),
        r"is truncated — its header is 999 bytes long but \d+ bytes follow",
    ),
    (safetensors(b"{'a': 1}"), "is not safetensors — found a header that is not JSON"),
    (safetensors(b'{"a\xff": 1}'), "is not safetensors — found a header that is not JSON"),
    (safetensors(b"[1, 2]"), r"is not safetensors — found the header \[1, 2\]"),
    (safetensors({"a": 3}), "is not safetensors — found 'a' as 3"),
    (safetensors({"a": {"dtype": "F32"}}), "is not safetensors — found 'a' as"),
    (safetensors({"a": tensor(shape=[-2])}), "is not safetensors — found 'a' as"),
    (safetensors({"a": tensor(shape=[2.0])}), "is not safetensors — found 'a' as"),
    (safetensors({"a": tensor(begin="0")}), "is not safetensors — found 'a' as"),
    (safetensors(b'{"a": %b, "a": %b}' % ((json.dumps(tensor()).encode(),) * 2)), "'a' is there twice"),
    (safetensors({"a": tensor("F4")}), "'a' has dtype F4 — parity reads BF16, F16"),
    (
        safetensors({"a": tensor(shape=[3])}),
        r"wrong size — F32 \(3,\) needs 12 bytes but data_offsets give it 8",
    ),
    (safetensors({"a": tensor(begin=8, end=0)}), "wrong size"),
    (
        safetensors({"a": tensor(begin=4, end=12)}),
        "is truncated — 'a' ends at byte 12 of the data, which are 8 bytes",
    ),
    (
        safetensors({"b": tensor(begin=4, end=12), "a": tensor()}, bytes(12)),
        "'a' and 'b' overlap — one ends at byte 8, the other begins at 4",
    ),
    (safetensors({"__metadata__": [], "a": tensor()}), r"is not safetensors — found its metadata is \[\]"),
    (safetensors({}), "holds no tensors"),
]


@pytest.mark.parametrize(("content", "message"), SAFETENSORS)
def test_malformed_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "port.safetensors").write_bytes(content)
    refused(message, lambda: open_dump(tmp_path / "port.safetensors"))


METADATA: list[tuple[dict[str, str], str]] = [
    ({"parity.tokens": "[[1]]"}, "unknown metadata 'parity.tokens' — parity knows producer"),
    ({"parity.token_ids": "1 2 3"}, "'parity.token_ids' is not JSON"),
    ({"parity.token_ids": '"abc"'}, "port.safetensors: token ids are not a list"),
    ({"parity.token_ids": "[[1], [2, 3]]"}, "port.safetensors: token ids are ragged"),
    ({"parity.token_ids": "[[9]]"}, "the tensor 'token_ids' and the metadata 'parity.token_ids' differ"),
    ({"parity.dims": "[]"}, r"'parity.dims' is not a table of dims — found \[\]"),
    ({"parity.dims": '{"a": ["b"]}'}, "'parity.dims' is not a table of dims"),
    (
        {"parity.dims": '{"a": "batch token"}'},
        r"port.safetensors: site 'a' has dims 'batch token' but shape \(2,\)",
    ),
    ({"parity.names": "[]"}, "port.safetensors: parity.names: is not a name map"),
]


@pytest.mark.parametrize(("metadata", "message"), METADATA)
def test_malformed_metadata(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = tmp_path / "port.safetensors"
    write_safetensors(path, {"a": np.zeros(2), "token_ids": np.array([[1, 2]])}, metadata)
    refused(message, lambda: open_dump(path))


def test_token_id_tensors(tmp_path: Path) -> None:
    for value in (np.zeros((1, 2), np.float32), np.zeros((1, 1, 2), np.int64)):
        write_safetensors(tmp_path / "port", {"a": np.zeros(2), "token_ids": value}, {})
        refused("'token_ids' is .* — expected integers", lambda: open_dump(tmp_path / "port"))
    write_safetensors(tmp_path / "port", {"token_ids": np.array([[1]])}, {})
    refused("holds no tensors", lambda: open_dump(tmp_path / "port"))


# ---- what numpy writes


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_malformed_npz(tmp_path: Path) -> None:
    path = npz(tmp_path / "port.npz", a=np.arange(100_000))
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    refused("is not a whole npz", lambda: open_dump(path))
    path.write_bytes(whole[:5000] + b"x" + whole[5001:])
    dump = open_dump(path)
    refused("'a' is damaged", lambda: dump.read("a"))
    dump.close()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.npy", b"not numpy")
    refused("'a' is not a whole npy array", lambda: open_dump(path))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"")
    refused("holds no tensors", lambda: open_dump(path))


def test_what_numpy_files_may_not_hold(tmp_path: Path) -> None:
    pickled = npz(tmp_path / "a.npz", a=np.array([{}], object))
    refused("'a' holds pickled Python objects — parity runs no code from a dump", lambda: open_dump(pickled))
    said = npz(tmp_path / "b.npz", a=np.zeros(1), **{"parity.producer": np.array([{}], object)})
    refused("'parity.producer' is damaged", lambda: open_dump(said))
    number = npz(tmp_path / "c.npz", a=np.zeros(1), **{"parity.producer": np.array(3)})
    refused("'parity.producer' is not text — found 3", lambda: open_dump(number))
    bits = npz(tmp_path / "d.npz", a=np.zeros(1, np.uint16), **{"parity.dtype": np.array("float32")})
    refused(
        "'a' holds bits without a meaning — found uint16, and 'parity.dtype' is 'float32'",
        lambda: open_dump(bits),
    )
    text = npz(tmp_path / "e.npz", a=np.array("text"))
    refused("'a' has dtype str", lambda: open_dump(text))


def test_malformed_folders(tmp_path: Path) -> None:
    refused("is a directory without .npy files", lambda: open_dump(tmp_path))
    stream = io.BytesIO()
    np.save(stream, np.arange(1000))
    (tmp_path / "a.npy").write_bytes(stream.getvalue()[:500])
    refused(r"a.npy is truncated — int64 \(1000,\) ends at byte 8128 of 500", lambda: open_dump(tmp_path))
    (tmp_path / "a.npy").write_bytes(stream.getvalue())
    (tmp_path / "parity.json").write_text("{")
    refused("parity.json: is not JSON", lambda: open_dump(tmp_path))
    (tmp_path / "parity.json").write_text("[]")
    refused(r"parity.json: is not a table — found \[\]", lambda: open_dump(tmp_path))
    (tmp_path / "a.npy").write_bytes(b"xyz")
    refused("a.npy is not a whole npy array", lambda: open_dump(tmp_path))
    np.save(tmp_path / "a.npy", np.array([{}], object))
    refused("a.npy holds pickled", lambda: open_dump(tmp_path))
