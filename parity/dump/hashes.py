"""Hashes of bits in place of arrays: a run too large to be kept can still be held against another, bit by bit.

A safetensors file with one tensor of 64-bit hashes for each site, a hash for each row of its array: the numbers along
its last axis. So two files say not only that two runs part, but where. `parity.hashes` in its metadata is JSON: the
RunInfo, and for each site, in recorded order, the dtype, the shape and the names of the axes of what was hashed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from parity.dump.files import require_file
from parity.dump.records import Array, Dump, Entry, RunInfo, dtype_name, run_info
from parity.dump.safetensors import HASHES, read_safetensors, write_safetensors
from parity.errors import DumpError
from parity.untrusted import parse_json

_BYTES = 8
_OTHER_SUFFIXES = (".h5", ".hdf5", ".npz")


@dataclass(frozen=True)
class Hashes:
    """The hashes of one run. `rows` has, for each site, an array of int64 whose shape is that of the site's array
    without its last axis; `entries` says what was hashed, in the order of computation.
    """

    path: Path
    info: RunInfo
    entries: Mapping[str, Entry]
    rows: Mapping[str, Array]


class HashSink:
    """Takes the arrays of a run one by one, keeps the hashes of their rows, and writes them at the end."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._rows: dict[str, Array] = {}

    def add(self, site: str, array: Array, dims: tuple[str, ...] | None = None) -> None:
        """Hash the array at a site, of any shape; dims name its axes. Raises DumpError for a second array there."""
        if site in self._entries:
            raise DumpError(f"site {site!r} is recorded twice — give each value a site of its own")
        self._entries[site] = Entry(site, dims, array.shape, dtype_name(array.dtype, f"site {site!r}"))
        self._rows[site] = row_hashes(array)

    def add_all(self, dump: Dump) -> None:
        """Hash every array of an open dump."""
        for site, entry in dump.entries.items():
            self.add(site, dump.read(site), entry.dims)

    def write(self, path: Path, info: RunInfo) -> None:
        """Write what was hashed in a run. Raises DumpError."""
        if not self._entries:
            raise DumpError(f"{path}: nothing to hash — no site was recorded — `parity sites` lists their names")
        said = {
            "run": asdict(info),
            "sites": {site: (e.dtype, e.shape, e.dims) for site, e in self._entries.items()},
        }
        write_safetensors(path, self._rows, {HASHES: json.dumps(said)})


def row_hashes(array: Array) -> Array:
    """A hash of the bits of each row of an array (…, n), as int64 (…)."""
    rows = array if array.ndim else array[None]
    size = rows.shape[-1] * rows.itemsize
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
    count = int(np.prod(rows.shape[:-1], dtype=np.int64))
    hashed = b"".join(sha256(data[i * size : (i + 1) * size]).digest()[:_BYTES] for i in range(count))
    return np.frombuffer(hashed, "<i8").reshape(rows.shape[:-1])


def is_hashes(path: Path) -> bool:
    """Whether a file holds hashes in place of arrays. Raises DumpError for one that begins so and is damaged."""
    if path.is_dir() or path.suffix in _OTHER_SUFFIXES:
        return False
    require_file(path)
    with path.open("rb") as file:
        if file.read(9)[8:9] != b"{":
            return False
    return HASHES in read_safetensors(path)[1]


def open_hashes(path: Path) -> Hashes:
    """Open a file of hashes. Raises DumpError if it is damaged or holds none."""
    tensors, metadata = read_safetensors(path)
    try:
        said = parse_json(metadata[HASHES])
        info, entries = run_info(said["run"]), {site: _entry(site, item) for site, item in said["sites"].items()}
        rows = {site: tensors.load(site) for site in entries}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DumpError(f"{path}: its hashes are damaged — {error!r:.80} — record again") from error
    for site, entry in entries.items():
        if rows[site].dtype != np.int64 or rows[site].shape != entry.shape[:-1]:
            raise DumpError(
                f"{path}: the hashes of {site!r} do not fit — {rows[site].dtype} {rows[site].shape} for an array of "
                f"shape {entry.shape} — record again"
            )
    return Hashes(path, info, entries, rows)


def _entry(site: str, item: Any) -> Entry:
    dtype, shape, dims = item
    return Entry(site, None if dims is None else tuple(dims), tuple(shape), dtype)
