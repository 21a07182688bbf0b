"""What numpy writes: one .npz, or a folder of .npy files with an optional parity.json.

numpy has no bfloat16 or float8: it stores them as bytes without a meaning (dtype V2, V1), and many ports
write their bits as uint16. Such tensors are read as the dtype that `parity.dtype` declares, never by a guess.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from parity.dump.files import reading, require_file
from parity.dump.metadata import PREFIX, Tensors, foreign_dump, parity_keys
from parity.dump.records import DTYPES, Array, Dump, dtype_name
from parity.errors import DumpError

Header = tuple[np.dtype[Any], tuple[int, ...]]

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
SUFFIX = ".npy"


def open_npz(path: Path | str) -> Dump:
    """Open an .npz: arrays named as sites, read when asked for; metadata as arrays of one string."""
    path = Path(path)
    require_file(path)
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DumpError(f"{path}: is not a whole npz — {error} — copy it again, or write it again") from error
    members = {name.removesuffix(SUFFIX): name for name in archive.namelist() if name.endswith(SUFFIX)}

    def load(name: str) -> Array:
        with reading(path), archive.open(members[name]) as file:
            try:
                return np.lib.format.read_array(file, allow_pickle=False)
            except (zipfile.BadZipFile, ValueError) as error:
                raise DumpError(f"{path}: {name!r} is damaged — {error} — write it again") from error

    try:
        metadata = {name: load(name).tolist() for name in members if name.startswith(PREFIX)}
        headers = {}
        for name in members.keys() - metadata.keys():
            with reading(path), archive.open(members[name]) as file:
                headers[name] = _header(f"{path}: {name!r}", file)
        ordered = {name: headers[name] for name in members if name in headers}
        return _dump(path, ordered, load, parity_keys(metadata), archive.close)
    except BaseException:
        archive.close()
        raise


def open_npy_folder(path: Path | str) -> Dump:
    """Open a folder of .npy files named as sites; parity.json holds the metadata, without the prefix."""
    path = Path(path)
    files = {file.name.removesuffix(SUFFIX): file for file in sorted(path.glob("*" + SUFFIX))}
    if not files:
        raise DumpError(f"{path}: is a directory without .npy files — nothing to read — name a dump, or fill it")
    headers = {}
    for name, file in files.items():
        require_file(file)
        with reading(file), file.open("rb") as stream:
            headers[name] = _header(str(file), stream)

    def load(name: str) -> Array:
        file = files[name]
        mode: Literal["r"] | None = "r" if 0 not in headers[name][1] else None  # nothing cannot be mapped
        with reading(file):
            try:
                array: Array = np.load(file, mmap_mode=mode, allow_pickle=False)
            except ValueError as error:
                raise DumpError(f"{file}: is damaged — {error} — write it again") from error
        return array

    return _dump(path, headers, load, _folder_metadata(path / "parity.json"))


def _folder_metadata(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with reading(path):
        text = path.read_bytes()
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise DumpError(f"{path}: is not JSON — {error} — see dumps/README.md for its keys") from error
    if not isinstance(metadata, dict):
        raise DumpError(f"{path}: is no table — found {metadata!r:.60} — see dumps/README.md for its keys")
    return metadata


def _header(what: str, file: IO[bytes]) -> Header:
    """Dtype and shape of an array in the npy format, without reading it."""
    try:
        shape, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DumpError(f"{what} is not a whole npy array — {error} — write it again with numpy.save") from error
    if dtype.hasobject:
        raise DumpError(
            f"{what} holds pickled Python objects — parity runs no code from a dump — save arrays of numbers"
        )
    return dtype, shape


def _dump(
    path: Path,
    headers: Mapping[str, Header],
    load: Callable[[str], Array],
    metadata: Mapping[str, Any],
    close: Callable[[], None] = lambda: None,
) -> Dump:
    declared = metadata.get("dtype")
    dtypes = {name: _meaning(f"{path}: {name!r}", dtype, declared) for name, (dtype, _) in headers.items()}
    kinds = {name: (dtypes[name].name, shape) for name, (_, shape) in headers.items()}
    bare = sum(dtypes[name].name != dtype.name for name, (dtype, _) in headers.items())
    notes = (f"{bare} tensors stored as bare bits were read as {declared}",) if bare else ()

    def load_meaning(name: str) -> Array:
        array = load(name)
        return array.view(dtypes[name]) if array.dtype.name != dtypes[name].name else array

    return foreign_dump(path, Tensors(kinds, load_meaning, close, notes), metadata)


def _meaning(what: str, dtype: np.dtype[Any], declared: Any) -> np.dtype[Any]:
    """The true dtype of an array: numpy's own, or the declared one where numpy has bits only."""
    if dtype.kind != "V" and dtype != np.uint16:
        return DTYPES[dtype_name(dtype, what)]
    if declared not in DTYPES or DTYPES[declared].itemsize != dtype.itemsize:
        raise DumpError(
            f"{what} holds bits without a meaning — found {dtype.name}, and 'parity.dtype' is {declared!r} — "
            "set 'parity.dtype' to what they are, such as 'bfloat16'"
        )
    return DTYPES[declared]
