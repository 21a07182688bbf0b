"""What numpy writes: one .npz, or a folder of .npy files with an optional parity.json.

numpy has no bfloat16 or float8: it stores them as bytes without a meaning (dtype V2, V1), and many ports
write their bits as uint16. Such tensors are read as the dtype that `parity.dtype` declares, never by a guess.
"""

from __future__ import annotations

import lzma
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from parity.dump.files import reading, require_file, require_stored
from parity.dump.metadata import PREFIX, Tensors, foreign_dump, parity_keys
from parity.dump.records import DTYPES, Array, Dump, dtype_name
from parity.errors import DumpError
from parity.untrusted import parse_json

Header = tuple[np.dtype[Any], tuple[int, ...]]

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
SUFFIX = ".npy"
LONGEST_TEXT = 1 << 27  # bytes of metadata: a long prompt and its token ids are a thousandth


def open_npz(path: Path | str) -> Dump:
    """Open an .npz: arrays named as sites, read when asked for; metadata as arrays of one string."""
    path = Path(path)
    require_file(path)
    try:
        with reading(path):
            archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError) as error:
        raise DumpError(f"{path}: is not a whole npz — {error} — copy it again, or write it again") from error

    def load(name: str) -> Array:
        with reading(path), archive.open(members[name]) as file:
            try:
                return np.lib.format.read_array(file, allow_pickle=False)
            except (zipfile.BadZipFile, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise DumpError(f"{path}: {name!r} is damaged — {error} — write it again") from error

    try:
        members = _members(path, archive)
        metadata = {name: _text(path, name, members[name], load) for name in members if name.startswith(PREFIX)}
        headers = {}
        for name in members.keys() - metadata.keys():
            with reading(path), archive.open(members[name]) as file:
                headers[name] = _header(f"{path}: {name!r}", file, members[name].file_size)
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
            headers[name] = _header(str(file), stream, file.stat().st_size)

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
    require_file(path)
    with reading(path):
        text = path.read_bytes()
    try:
        metadata = parse_json(text)
    except ValueError as error:
        raise DumpError(f"{path}: is not JSON — {error} — see dumps/README.md for its keys") from error
    if not isinstance(metadata, dict):
        raise DumpError(f"{path}: is not a table — found {metadata!r:.60} — see dumps/README.md for its keys")
    return metadata


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays of an npz by name."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(SUFFIX)
        if name == member.filename:
            continue
        if name in members:
            raise DumpError(f"{path}: {name!r} is there twice — each array has a name of its own — write it again")
        require_stored(f"{path}: {name!r}", member.file_size, member.compress_size)
        members[name] = member
    return members


def _text(path: Path, name: str, member: zipfile.ZipInfo, load: Callable[[str], Array]) -> Any:
    if member.file_size > LONGEST_TEXT:
        raise DumpError(f"{path}: {name!r} is {member.file_size} bytes long — at most {LONGEST_TEXT} — shorten it")
    return load(name).tolist()


def _header(what: str, file: IO[bytes], size: int) -> Header:
    """Dtype and shape of an array in the npy format of `size` bytes, without reading it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # numpy warns of headers that it could yet make out
            shape, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
        start = file.tell()
    except OSError:
        raise
    except Exception as error:  # numpy evaluates the header as Python: anything can be raised
        reason = " ".join(str(error).split())
        raise DumpError(f"{what} is not a whole npy array — {reason:.160} — write it again with numpy.save") from error
    if dtype.hasobject:
        raise DumpError(
            f"{what} holds pickled Python objects — parity runs no code from a dump — save arrays of numbers"
        )
    if dtype.byteorder == ">":
        raise DumpError(
            f"{what} is big-endian — found {dtype.str} — save array.astype({dtype.newbyteorder('<').str!r})"
        )
    needed = start + math.prod(shape) * dtype.itemsize
    if needed > size or min(shape, default=0) < 0:
        raise DumpError(f"{what} is truncated — {dtype} {shape} ends at byte {needed} of {size} — write it again")
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
