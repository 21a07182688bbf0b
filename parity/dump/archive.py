"""What parity writes: an HDF5 file with one contiguous dataset for each site.

/               attribute parity_format: 1
/run            the RunInfo as JSON text
/sites/NAME     one dataset for each site
/index          dims, shape and true dtype of every site, in recorded order, as JSON text; written last

JSON datasets rather than attributes, because HDF5 holds attributes below 64 KiB and a long prompt is more.
A file without the index is a run that was killed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar

import h5py
import numpy as np
from h5py import h5d, h5l, h5o, h5s, h5t

from parity.dump.calls import joined
from parity.dump.files import Outlet, map_file, reading, require_file, require_stored, whole_or_nothing, writing
from parity.dump.records import DTYPES, Array, Dump, Entry, RunInfo, dtype_name, run_info
from parity.errors import DumpError
from parity.untrusted import parse_json

T = TypeVar("T")

FORMAT = 1
SITES_PER_FLUSH = 32
_LINKS = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link into another file"}
ALIGNMENT = 64  # bytes: mapped arrays start on a cache line, and never between two numbers


class ArchiveWriter:
    """Writes an archive, site by site, straight to disk; a context manager.

    The file appears under `path` when the block ends without an exception; otherwise nothing remains.
    """

    def __init__(self, path: Path | str, info: RunInfo) -> None:
        self.path = Path(path)
        self.info = info
        self._entries: dict[str, Entry] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = stack.enter_context(whole_or_nothing(self.path))
            with writing(self.path):
                self._outlet = stack.enter_context(Outlet(temporary, "w+"))
            with self._writing():
                self._file = h5py.File(self._outlet, "w", alignment_interval=ALIGNMENT)
                stack.push(self._finish)
                self._file.attrs["parity_format"] = FORMAT
                self._file["run"] = json.dumps(dataclasses.asdict(self.info))
                self._sites = self._file.create_group("sites")
                self._flush()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.__exit__(*exc_info)

    def add(self, site: str, array: Array, dims: tuple[str, ...] | None) -> None:
        """Record the array at a site, bit by bit, with a name for each axis.

        Raises DumpError if the site is recorded already, or the dims do not fit the array, which may have any shape.
        """
        if site in self._entries:
            raise DumpError(
                f"{self.path}: site {site!r} is recorded twice — first as {self._entries[site].shape} — "
                "give each value a site of its own"
            )
        if not site or "/" in site or "\0" in site or not site.strip("."):
            raise DumpError(
                f"{self.path}: {site!r} names no site — empty, only dots or with '/' — take a module's name"
            )
        entry = Entry(site, dims, array.shape, dtype_name(array.dtype, f"{self.path}: site {site!r}"))
        with self._writing():
            _write(self._sites, entry, array)
            self._entries[site] = entry
            self._outlet.check()
            if len(self._entries) % SITES_PER_FLUSH == 0:
                self._flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """As `writing`; where the file has refused something, that is why HDF5 then finds its own work wanting."""
        with writing(self.path):
            try:
                yield
            except (OSError, RuntimeError):
                self._outlet.check()
                raise

    def _flush(self) -> None:
        """Make what is written so far a file that can be opened, should the run be killed."""
        self._file.flush()
        self._outlet.check()

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        index = {
            site: {"dims": entry.dims, "shape": entry.shape, "dtype": entry.dtype}
            for site, entry in self._entries.items()
        }
        with self._writing():
            if kind is None:
                self._file["index"] = json.dumps(index)
            self._file.close()
            if kind is None:
                self._outlet.check()


def open_archive(path: Path | str) -> Dump:
    """Open an archive. Raises DumpError if it is missing, damaged, incomplete or not of parity's making."""
    path = Path(path)
    file = _open_file(path)
    try:
        _check_format(path, file)
        info = _parse(path, file, "run", run_info)
        entries = _parse(path, file, "index", _entries)
        sites = _sites(path, file)
        lost = entries.keys() - set(sites)
        if lost:
            raise DumpError(f"{path}: has lost {len(lost)} sites — {min(lost)!r} is in the index only — record again")
        size = path.stat().st_size
        with reading(path):
            starts = {entry.site: _start(path, sites, entry, size) for entry in entries.values()}
        mapped = map_file(path)
    except BaseException:
        file.close()
        raise
    dump = Dump(path, info, entries, lambda site: _read(path, sites, entries[site], mapped, starts[site]), file.close)
    return joined(dump, leave_out=True)  # parity's own recording has what it has


@cache
def _storage(dtype: str) -> tuple[h5t.TypeID, np.dtype[Any]]:
    """The HDF5 type of a true dtype, and the numpy dtype whose bits it holds.

    This one type stands on both sides of every transfer, so that HDF5 has nothing to convert: its conversion
    of bfloat16 is a hundred times slower than a copy and loses the payloads of NaNs.
    """
    if dtype == "bfloat16":  # a float type of HDF5's own making: every reader shows the right numbers
        bfloat16 = h5t.IEEE_F32LE.copy()
        bfloat16.set_fields(15, 7, 8, 0, 7)  # positions of sign, exponent and its width, mantissa and its width
        bfloat16.set_precision(16)
        bfloat16.set_size(2)
        bfloat16.set_ebias(127)
        return bfloat16, np.dtype(np.uint16)
    if DTYPES[dtype].itemsize == 1 and dtype != "int8":  # float8 and bool have no type in HDF5
        return h5t.STD_U8LE, np.dtype(np.uint8)
    little = DTYPES[dtype].newbyteorder("<")
    return h5t.py_create(little), little


def _write(sites: h5py.Group, entry: Entry, array: Array) -> None:
    kind, bits = _storage(entry.dtype)
    values = np.asarray(array, dtype=DTYPES[entry.dtype], order="C").view(bits)
    space = h5s.create_simple(entry.shape) if entry.shape else h5s.create(h5s.SCALAR)
    dataset = h5d.create(sites.id, entry.site.encode(), kind, space)
    dataset.write(h5s.ALL, h5s.ALL, values, mtype=kind)


def _read(path: Path, sites: h5py.Group, entry: Entry, mapped: Array, start: int | None) -> Array:
    kind, bits = _storage(entry.dtype)
    with reading(path):
        if start is not None:
            end = start + math.prod(entry.shape) * bits.itemsize
            _require_size(path, entry, end, path.stat().st_size)  # a file that was cut since would end the process
            return mapped[start:end].view(bits).reshape(entry.shape).view(DTYPES[entry.dtype])
        values = np.empty(entry.shape, bits)
        _dataset(path, sites, entry).read(h5s.ALL, h5s.ALL, values, mtype=kind)
        return values.view(DTYPES[entry.dtype])


def _start(path: Path, sites: h5py.Group, entry: Entry, size: int) -> int | None:
    """Where in a file of this size a site's values begin; None if nothing is stored, or another tool's chunks are.

    They are known to be what the index says, and to lie in this file.
    """
    dataset = _dataset(path, sites, entry)
    needed = math.prod(entry.shape) * _storage(entry.dtype)[1].itemsize
    require_stored(f"{path}: site {entry.site!r}", needed, dataset.get_storage_size())
    start: int | None = dataset.get_offset()
    if start is not None:
        _require_size(path, entry, start + needed, size)
    return start


def _require_size(path: Path, entry: Entry, end: int, size: int) -> None:
    if end > size:
        raise DumpError(f"{path}: is truncated — site {entry.site!r} ends behind the file — copy it again")


def _dataset(path: Path, sites: h5py.Group, entry: Entry) -> Any:
    """The dataset of a site, once it is known to be what the index says."""
    kind, _ = _storage(entry.dtype)
    dataset = _opened(path, sites, entry.site)
    if not isinstance(dataset, h5d.DatasetID):
        raise DumpError(f"{path}: site {entry.site!r} is not a dataset — found a group — record again")
    if dataset.shape != entry.shape or not dataset.get_type().equal(kind):
        raise DumpError(
            f"{path}: site {entry.site!r} is not the {entry.dtype} {entry.shape} of the index — "
            f"found {dataset.dtype!s:.40} {dataset.shape} — the file was edited: record again"
        )
    return dataset


def _open_file(path: Path) -> h5py.File:
    require_file(path)
    try:
        return h5py.File(path, "r", locking=False)  # whole files do not change; shared disks often cannot lock
    except OSError as error:
        if "truncated file" in str(error):
            raise DumpError(
                f"{path}: is truncated — {path.stat().st_size} bytes are left of a longer file — "
                "copy it again, or record again"
            ) from error
        if "file signature not found" in str(error):
            raise DumpError(f"{path}: is not HDF5 — it does not begin as HDF5 does — record again") from error
        with reading(path):
            raise


def _check_format(path: Path, file: h5py.File) -> None:
    found = _format(file)
    if found is None:
        names = ", ".join(repr(name) for name in list(file)[:3]) or "nothing"
        raise DumpError(
            f"{path}: is HDF5 but no archive of parity — found {names} at its root — "
            "write foreign tensors as safetensors instead, see dumps/README.md"
        )
    if found != FORMAT:
        raise DumpError(f"{path}: has format {found} — this parity reads format {FORMAT} — update parity")
    if not file.id.links.exists(b"index"):
        count = len(_sites(path, file)) if file.id.links.exists(b"sites") else 0
        raise DumpError(f"{path}: is incomplete — the run ended after {count} sites or more — record again")


def _parse(path: Path, file: h5py.File, name: str, parse: Callable[[Any], T]) -> T:
    try:
        _opened(path, file, name)
        text = file[name]
        kind = h5py.check_string_dtype(text.dtype)
        if text.shape != () or kind is None or kind.length is not None:  # such a text cannot outgrow its file
            raise DumpError(f"{path}: its {name!r} is not text — found {text.dtype} {text.shape} — record again")
        return parse(parse_json(text[()]))
    except (KeyError, ValueError, TypeError, AttributeError, OSError, RuntimeError) as error:
        raise DumpError(f"{path}: its {name!r} is damaged — {error!r:.80} — record again") from error


def _sites(path: Path, file: h5py.File) -> h5py.Group:
    try:
        _opened(path, file, "sites")
        group = file["sites"]
    except (KeyError, OSError, RuntimeError) as error:
        raise DumpError(f"{path}: its 'sites' are damaged — {error!r:.80} — record again") from error
    if not isinstance(group, h5py.Group):
        raise DumpError(f"{path}: its 'sites' is not a group — found {type(group).__name__} — record again")
    return group


def _opened(path: Path, group: h5py.Group, name: str) -> Any:
    """What lies under a name. Raises DumpError unless it lies in this file: HDF5 would open any other that it names."""
    kind = group.id.links.get_info(name.encode()).type  # h5py itself looks where a link leads
    where = f"{path}: {name!r} of {group.name!r}"
    if kind != h5l.TYPE_HARD:
        found = _LINKS.get(kind, "one of a plugin")
        raise DumpError(f"{where} is a link — found {found} — parity follows none; copy what it points to")
    place = h5o.open(group.id, name.encode())
    if isinstance(place, h5d.DatasetID):
        layout = place.get_create_plist()
        virtual = layout.get_layout() == h5d.VIRTUAL
        if virtual or layout.get_external_count():
            found = "a virtual dataset" if virtual else "external storage"
            raise DumpError(f"{where} holds none of its values — found {found} — parity opens no other file; copy them")
    return place


def _format(file: h5py.File) -> Any:
    """The number of the format, None without one; as text if it is not a number."""
    if "parity_format" not in file.attrs:
        return None
    kind = file.attrs.get_id("parity_format")
    return int(file.attrs["parity_format"]) if kind.shape == () and kind.dtype.kind in "iu" else str(kind.dtype)


def _entries(index: dict[str, Any]) -> dict[str, Entry]:
    return {
        site: Entry(site, None if (dims := item["dims"]) is None else tuple(dims), tuple(item["shape"]), item["dtype"])
        for site, item in index.items()
    }
