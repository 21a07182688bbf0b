"""The metadata that a foreign dump may carry: the `parity.*` keys, and an integer tensor `token_ids`.

One vocabulary for all interchange formats: safetensors carries the keys in its header, npz as arrays of
one string, a folder of .npy in parity.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parity.dump.calls import joined
from parity.dump.names import lookup, parse_names, rename
from parity.dump.records import Array, Dump, Entry, RunInfo
from parity.dump.tokens import MOST, TokenIds, check_calls, token_rows
from parity.errors import DumpError
from parity.untrusted import parse_json

PREFIX = "parity."
TOKEN_IDS = "token_ids"
TEXTS = ("producer", "model", "fingerprint", "dtype", "device", "attention", "prompt", "created")
ROWS = ("token_ids", "attention_mask", "position_ids")
"""Rows of integers, one for each token: metadata, or a tensor of this name."""
OBJECTS = (*ROWS, "dims", "names", "calls")
"""These are JSON text where the format holds nothing but text."""


@dataclass(frozen=True)
class Tensors:
    """The tensors of a foreign file: what is there, and how to read one."""

    kinds: Mapping[str, tuple[str, tuple[int, ...]]]
    """Dtype and shape by name, in the order of the file."""
    load: Callable[[str], Array]
    close: Callable[[], None] = lambda: None
    notes: tuple[str, ...] = ()


def parity_keys(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The keys meant for parity, without their prefix; the others belong to somebody else."""
    return {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}


def foreign_dump(path: Path, tensors: Tensors, metadata: Mapping[str, Any]) -> Dump:
    """A Dump from the tensors of a foreign file and its metadata (keys without prefix)."""
    try:
        values = _values(path, metadata)
        rows = {name: _rows(path, tensors, name, values.get(name)) for name in _own_rows(tensors, values)}
        texts: dict[str, Any] = {key: values.get(key) for key in TEXTS}
        calls = _calls(path, values.get("calls"), rows.get(TOKEN_IDS))
        info = _info(path, **texts, **rows, notes=tensors.notes, calls=calls)
        entries = _entries(path, tensors, values.get("dims", {}), rows)
        dump = joined(Dump(path, info, entries, tensors.load, tensors.close))
        if "names" not in values:
            return dump
        return rename(dump, parse_names(values["names"], f"{path}: parity.names"))
    except BaseException:
        tensors.close()
        raise


def _values(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(metadata)
    for key, value in metadata.items():
        if key not in TEXTS + OBJECTS:
            known = ", ".join(TEXTS + OBJECTS)
            raise DumpError(
                f"{path}: unknown metadata {'parity.' + key!r:.60} — parity knows {known} — rename or remove it"
            )
        if key in TEXTS and not isinstance(value, str):
            raise DumpError(f"{path}: 'parity.{key}' is not text — found {value!r:.60} — write a string")
        if key in OBJECTS and isinstance(value, str):
            try:
                values[key] = parse_json(value)
            except ValueError as error:
                raise DumpError(f"{path}: 'parity.{key}' is not JSON — {error} — see dumps/README.md") from error
    return values


def _info(path: Path, **said: Any) -> RunInfo:
    try:
        return RunInfo(**said)
    except DumpError as error:
        raise DumpError(f"{path}: {error}") from None


def _own_rows(tensors: Tensors, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of ROWS are those of the run: without token ids, a tensor called so is another program's."""
    has_ids = TOKEN_IDS in tensors.kinds or TOKEN_IDS in values
    return ROWS if has_ids else tuple(name for name in ROWS if name in values)


def _rows(path: Path, tensors: Tensors, name: str, declared: Any) -> TokenIds | None:
    """Token ids, a mask or positions from the metadata or from the tensor `name`; if from both, they must agree."""
    found = []
    if name in tensors.kinds:
        dtype, shape = tensors.kinds[name]
        is_whole = "int" in dtype or (dtype == "bool" and name != TOKEN_IDS)
        if not is_whole or len(shape) not in (1, 2) or math.prod(shape) > MOST:
            raise DumpError(
                f"{path}: {name!r} is {dtype} {shape} — expected integers, "
                f"of shape (tokens) or (batch, tokens), at most {MOST} — write them as int64"
            )
        found.append(token_rows(np.atleast_2d(tensors.load(name)).astype(np.int64).tolist()))
    if declared is not None:
        try:
            found.append(token_rows(declared))
        except DumpError as error:
            raise DumpError(f"{path}: {error}") from None
    if len(found) == 2 and found[0] != found[1]:
        raise DumpError(
            f"{path}: the tensor {name!r} and the metadata 'parity.{name}' differ — "
            f"they begin {found[0]!s:.40} and {found[1]!s:.40} — remove the one that was not run"
        )
    return found[0] if found else None


def _calls(path: Path, declared: Any, token_ids: TokenIds | None) -> tuple[int, ...] | None:
    if declared is None:
        return None
    try:
        check_calls(declared, token_ids)
    except DumpError as error:
        raise DumpError(f"{path}: {error}") from None
    return tuple(declared)


def _entries(path: Path, tensors: Tensors, dims: Any, rows: Collection[str]) -> dict[str, Entry]:
    if not isinstance(dims, dict) or not all(isinstance(value, str) for value in dims.values()):
        raise DumpError(
            f"{path}: 'parity.dims' is not a table of dims — found {dims!r:.60} — "
            'write {"model.layers.*": "batch token hidden"}'
        )
    entries = {}
    for name, (dtype, shape) in tensors.kinds.items():
        if name in rows:
            continue
        declared = lookup(dims, name.partition("@")[0]) or lookup(dims, name)
        try:
            entries[name] = Entry(name, tuple(declared[0].split()) if declared else None, shape, dtype)
        except DumpError as error:
            raise DumpError(f"{path}: {error}") from None
    if not entries:
        raise DumpError(f"{path}: holds no tensors — found none but 'token_ids' at most — dump at least one site")
    return entries
