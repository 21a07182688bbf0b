"""safetensors, read and written by the few lines that the format needs.

Eight bytes: length of the header. The header: JSON, name -> dtype, shape, place in the data. Then the data.
Read here rather than through the library, because its numpy side cannot give views and knows no bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from parity.dump.files import map_file, require_file, whole_or_nothing, writing
from parity.dump.metadata import PREFIX, TEXTS, Tensors, foreign_dump, parity_keys
from parity.dump.records import DTYPES, Array, Dump, check_kind, dtype_name
from parity.errors import DumpError
from parity.untrusted import parse_json

CODES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
METADATA = "__metadata__"
HASHES = f"{PREFIX}hashes"
"""The key of a file that holds hashes of bits in place of arrays (parity.dump.hashes)."""
LENGTH = 8  # bytes that hold the length of the header, little-endian
LONGEST = 100_000_000  # bytes: the library refuses longer headers too


def open_safetensors(path: Path | str) -> Dump:
    """Open a safetensors file whose tensor names are sites, or become sites through a name map."""
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    if HASHES in metadata:
        raise DumpError(
            f"{path}: holds hashes of bits, no activations — it was recorded with --hash — "
            "compare it with another such file, or record without --hash"
        )
    return foreign_dump(path, tensors, parity_keys(metadata))


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a safetensors file and its metadata. Raises DumpError."""
    require_file(path)
    header, data = _header(path, map_file(path))
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict):
        raise _malformed(path, f"its metadata is {metadata!r:.60}")
    places = {name: _place(path, name, item, len(data)) for name, item in header.items()}
    _check_overlap(path, places)
    kinds = {name: (CODES[item["dtype"]], tuple(item["shape"])) for name, item in header.items()}

    def load(name: str) -> Array:
        dtype, shape = kinds[name]
        begin, end = places[name]
        view = data[begin:end].view(DTYPES[dtype]).reshape(shape)
        return view if view.flags.aligned else view.copy()  # a header of odd length shifts all numbers

    return Tensors(kinds, load), metadata


def write_safetensors(path: Path | str, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata (keys with their prefix, `parity.token_ids`) as safetensors.

    Arrays may have any shape.
    """
    path = Path(path)
    codes = {name: code for code, name in CODES.items()}
    header: dict[str, Any] = {METADATA: dict(metadata)}
    arrays, end = [], 0
    for name, array in tensors.items():
        dtype = dtype_name(array.dtype, f"{path}: {name!r}")
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": codes[dtype], "shape": array.shape, "data_offsets": [begin, end]}
        arrays.append(np.asarray(array, dtype=DTYPES[dtype], order="C"))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH)  # the data begin at a multiple of eight
    with whole_or_nothing(path) as temporary, writing(path), temporary.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH, "little") + text)
        for array in arrays:
            file.write(array.reshape(-1).view(np.uint8).data)


def copy_as_safetensors(dump: Dump, path: Path | str) -> None:
    """Write an open dump as safetensors: every array bit by bit, and what the format can say of the run."""
    info = {key: value for key in TEXTS if (value := getattr(dump.info, key)) is not None}
    dims = {site: " ".join(entry.dims) for site, entry in dump.entries.items() if entry.dims is not None}
    said = info | {"token_ids": json.dumps(dump.info.token_ids), "dims": json.dumps(dims)}
    for key in ("calls", "attention_mask", "position_ids"):
        if (found := getattr(dump.info, key)) is not None:
            said[key] = json.dumps(found)
    # The arrays are views of a mapped file: what has been written need not stay in memory.
    tensors = {site: dump.read(site) for site in dump.entries}
    write_safetensors(path, tensors, {f"{PREFIX}{key}": text for key, text in said.items()})


def _header(path: Path, mapped: Array) -> tuple[dict[str, Any], Array]:
    size = len(mapped)
    length = int.from_bytes(mapped[:LENGTH].tobytes(), "little")
    if size < LENGTH or length > LONGEST:
        raise _malformed(path, f"{size} bytes that begin with {mapped[:LENGTH].tobytes()!r}")
    if LENGTH + length > size:
        raise DumpError(
            f"{path}: is truncated — its header is {length} bytes long but {size - LENGTH} bytes follow — "
            "copy it again, or write it again"
        )
    try:
        header = parse_json(mapped[LENGTH : LENGTH + length].tobytes())
    except ValueError as error:
        raise _malformed(path, f"a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _malformed(path, f"the header {header!r:.60}")
    return header, mapped[LENGTH + length :]


def _place(path: Path, name: str, item: Any, size: int) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, once its entry in the header is known to make sense."""
    try:
        dtype, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
        numbers = [*shape, begin, end]
        valid = isinstance(dtype, str) and isinstance(shape, list)
        valid = valid and all(type(number) is int and number >= 0 for number in numbers)
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise _malformed(path, f"{name!r} as {item!r:.80}")
    if dtype not in CODES:
        raise DumpError(f"{path}: {name!r} has dtype {dtype:.40} — parity reads {', '.join(CODES)} — cast it first")
    check_kind(f"{path}: {name!r}", CODES[dtype], tuple(shape))
    needed = math.prod(shape) * DTYPES[CODES[dtype]].itemsize
    if end - begin != needed:
        raise DumpError(
            f"{path}: {name!r} has the wrong size — {dtype} {tuple(shape)} needs {needed} bytes "
            f"but data_offsets give it {end - begin} — correct its shape, dtype or offsets"
        )
    if end > size:
        raise DumpError(
            f"{path}: is truncated — {name!r} ends at byte {end} of the data, which are {size} bytes — "
            "copy it again, or write it again"
        )
    return begin, end


def _check_overlap(path: Path, places: Mapping[str, tuple[int, int]]) -> None:
    filled = sorted((place, name) for name, place in places.items() if place[0] < place[1])
    for ((_, end), name), ((begin, _), other) in pairwise(filled):
        if begin < end:
            raise DumpError(
                f"{path}: {name!r} and {other!r} overlap — one ends at byte {end}, "
                f"the other begins at {begin} — correct data_offsets: they count from the end of the header"
            )


def _malformed(path: Path, found: str) -> DumpError:
    return DumpError(f"{path}: is not safetensors — found {found} — see dumps/README.md for how to write it")
