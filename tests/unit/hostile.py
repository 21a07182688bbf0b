"""Files made to do harm, each by a few lines: what a row of the table in test_hostile builds."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from parity.dump import ArchiveWriter, RunInfo, write_safetensors
from tests.conftest import ROOT

ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e\u200b\x9b31m"
"""Sets the title, clears the screen, turns the text around, hides a space, and uses an eight-bit escape."""
HUGE = 1 << 32  # numbers: 16 GB of float32

Build = Callable[[Path], None]


def content(data: bytes) -> Build:
    def build(path: Path) -> None:
        path.write_bytes(data)

    return build


# ---- safetensors


def raw(header: Any, data: bytes = bytes(8), length: int | None = None) -> Build:
    """A safetensors file of any header; `length` is what it says of the header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    def build(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)

    return build


def tensor(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(**change: Any) -> Build:
    """A safetensors file with one tensor, changed."""
    return raw({"lm_head": tensor(**change)})


def metadata(**said: str) -> Build:
    def build(path: Path) -> None:
        write_safetensors(path, {"a": np.zeros(2)}, {f"parity.{key}": text for key, text in said.items()})

    return build


def sparse(header: bytes, size: int) -> Build:
    """A file of `size` bytes of which the disk holds a few."""

    def build(path: Path) -> None:
        path.write_bytes(header)
        os.truncate(path, size)

    return build


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


# ---- HDF5


def archive(edit: Callable[[h5py.File], Any], outside: bool = False) -> Build:
    """An archive of one site that is edited afterwards; `outside` puts another file beside it."""

    def build(path: Path) -> None:
        with ArchiveWriter(path, RunInfo(token_ids=((1, 2),))) as writer:
            writer.add("lm_head", np.zeros(1000, np.float32), ("_",))
        if outside:
            with h5py.File(path.with_name("secret.h5"), "w") as file:
                file["lm_head"] = np.zeros(1000, np.float32)
                file["index"] = "{}"
            path.with_name("secret.bin").write_bytes(bytes(4000))
        with h5py.File(path, "a") as file:
            edit(file)

    return build


def put(name: str, value: Any) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return edit


def index(**change: Any) -> Build:
    """An archive whose index says something else of its site."""
    entry = {"dims": ["_"], "shape": [1000], "dtype": "float32"} | change
    return archive(put("index", json.dumps({"lm_head": entry})))


def created(make: Callable[[h5py.Group], Any], shape: list[int] | None = None) -> Build:
    """An archive whose site is created anew by `make`; the index agrees with its shape."""

    def edit(file: h5py.File) -> None:
        del file["sites/lm_head"]
        make(file["sites"])
        if shape is not None:
            put("index", json.dumps({"lm_head": {"dims": None, "shape": shape, "dtype": "float32"}}))(file)

    return archive(edit, outside=True)


def bomb(sites: h5py.Group) -> None:
    sites.create_dataset("lm_head", (HUGE,), "<f4", chunks=(1 << 20,), compression="gzip")[:1000] = 0


def virtual(sites: h5py.Group) -> None:
    layout = h5py.VirtualLayout((1000,), "<f4")
    layout[:] = h5py.VirtualSource("secret.h5", "lm_head", (1000,))
    sites.create_virtual_dataset("lm_head", layout)


def external(sites: h5py.Group) -> None:
    sites.create_dataset("lm_head", (1000,), "<f4", external=[("secret.bin", 0, 4000)])


def giant_text(file: h5py.File) -> None:
    """A text of fixed length, of which nothing is stored."""
    del file["run"]
    kind = h5t.C_S1.copy()
    kind.set_size(1 << 30)
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_alloc_time(h5d.ALLOC_TIME_LATE)
    h5d.create(file.id, b"run", kind, h5s.create(h5s.SCALAR), plist)


# ---- numpy


def npy(value: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, value)
    return stream.getvalue()


def header(descr: Any, shape: Any, order: Any = False, data: bytes = b"") -> bytes:
    """An npy array of any header."""
    text = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz(*members: tuple[str, bytes], compressed: bool = False) -> Build:
    def build(path: Path) -> None:
        kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", kind) as file:  # a name twice
            for name, data in members:
                file.writestr(name, data)

    return build


def zeros(count: int) -> Build:
    """Zeros of `count` MiB, deflated a thousandfold."""

    def build(path: Path) -> None:
        block = bytes(1 << 20)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("a.npy", "w", force_zip64=True) as out:
            out.write(header("<f4", (count << 18,)))
            for _ in range(count):
                out.write(block)

    return build


def edited_zip(path: Path) -> None:
    """An npz whose directory claims that nothing is compressed in an encrypted member."""
    npz(("a.npy", npy(np.zeros(3))))(path)
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)


def folder(**files: bytes) -> Build:
    """A folder of files; `__` in a name is a dot."""

    def build(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("__", ".")).write_bytes(content)

    return build


# ---- what is no file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path.name)
    os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def after(first: Build, then: Build) -> Build:
    """Both, one after the other."""

    def build(path: Path) -> None:
        first(path)
        then(path)

    return build


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def within(build: Build, name: str) -> Build:
    """A folder with something in it."""

    def nest(path: Path) -> None:
        path.mkdir(exist_ok=True)
        build(path / name)

    return nest


def loop(path: Path) -> None:
    path.symlink_to(path)


# ---- checkpoints


def model(**change: Any) -> Build:
    """The embedded checkpoint with another config.json."""

    def build(path: Path) -> None:
        source = ROOT / "parity" / "models" / "tiny-qwen3"
        path.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            shutil.copy(source / name, path / name)
        config = path / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))

    return build


def model_with(name: str, build: Build) -> Build:
    """The embedded checkpoint with one file replaced."""

    def make(path: Path) -> None:
        model()(path)
        (path / name).unlink(missing_ok=True)
        build(path / name)

    return make
