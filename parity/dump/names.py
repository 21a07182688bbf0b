"""Name maps: from the tensor names of a foreign dump to sites.

    {"blk.*.attn_q": "model.layers.*.self_attn.q_proj",
     "blk.*.attn_qkv": {"split": ["model.layers.*.self_attn.q_proj",
                                  "model.layers.*.self_attn.k_proj",
                                  "model.layers.*.self_attn.v_proj"],
                        "sizes": [2048, 1024, 1024], "dim": -1}}

`*` stands for a whole number, and for the same number on both sides. An exact name wins over a pattern, and an
earlier pattern over a later one. Names that the map does not mention stay as they are; those it maps to null are left
out, and a family of sites mapped to null is one that the candidate's runtime never has.
A fused tensor is split along `dim` (the last if absent) into `sizes` (equal parts if absent).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from parity.dump.files import reading, require_file
from parity.dump.records import Array, Dump, Entry
from parity.errors import DumpError
from parity.untrusted import parse_json

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """Where a tensor goes: to one site, or split among several; nowhere if there are none."""

    sites: tuple[str, ...]
    sizes: tuple[int, ...] | None = None
    dim: int = -1


_NUMBER = "([0-9]++)"  # all digits that there are, none given back: 20 stars in a row would try each way to share them

NameMap = Mapping[str, Target]
"""From the name or pattern of a tensor to its Target."""


@dataclass(frozen=True)
class _Piece:
    """A site as a part of a tensor of the file; the whole of it if `part` is empty."""

    tensor: str
    entry: Entry
    part: tuple[slice, ...]


def load_names(path: Path | str) -> NameMap:
    """Read a name map from a JSON file."""
    path = Path(path)
    require_file(path)
    with reading(path):
        text = path.read_bytes()
    try:
        value = parse_json(text)
    except ValueError as error:
        raise DumpError(f"{path}: is not a name map — not JSON: {error} — dumps/README.md has an example") from error
    return parse_names(value, str(path))


def parse_names(value: Any, where: str) -> NameMap:
    """A name map from its JSON value; `where` begins the message of the DumpError if it is malformed."""
    if not isinstance(value, dict):
        raise DumpError(f'{where}: is not a name map — found {value!r:.60} — write {{"their name": "site"}}')
    return {name: _target(name, target, where) for name, target in value.items()}


def rename(dump: Dump, names: NameMap) -> Dump:
    """The same dump under other names: nothing is copied, closing it closes the other.

    Raises DumpError if two tensors would land on one site, or a split does not fit a tensor.
    """
    pieces: dict[str, _Piece] = {}
    for entry in dump.entries.values():
        for piece in _pieces(dump.path, entry, names):
            site = piece.entry.site
            if site in pieces:
                raise DumpError(
                    f"{dump.path}: two tensors are named {site!r} — {pieces[site].tensor!r} and "
                    f"{piece.tensor!r} — correct the name map"
                )
            pieces[site] = piece

    def load(site: str) -> Array:
        piece = pieces[site]
        return dump.read(piece.tensor)[piece.part]

    entries = {site: piece.entry for site, piece in pieces.items()}
    changed = sum(site != piece.tensor for site, piece in pieces.items())
    info = replace(dump.info, notes=(*dump.info.notes, f"a name map named {changed} of {len(pieces)} sites"))
    return Dump(dump.path, info, entries, load, dump.close)


def sites_of(names: NameMap, tensor: str) -> tuple[str, ...]:
    """The sites that a tensor of this name holds: those that the map says, or the one of the same name."""
    found = lookup(names, tensor)
    return (tensor,) if found is None else tuple(_fill(site, found[1]) for site in found[0].sites)


def lookup(table: Mapping[str, T], name: str) -> tuple[T, tuple[str, ...]] | None:
    """What a table of names and patterns says of a name, and the numbers that its `*` stand for."""
    if name in table:
        return table[name], ()
    for pattern, value in table.items():
        if "*" in pattern:
            match = re.fullmatch(_NUMBER.join(map(re.escape, pattern.split("*"))), name)
            if match:
                return value, match.groups()
    return None


def _pieces(path: Path, entry: Entry, names: NameMap) -> list[_Piece]:
    found = lookup(names, entry.site)
    if found is None:
        return [_Piece(entry.site, entry, ())]
    target, numbers = found
    if not target.sites:
        return []
    sites = [_fill(site, numbers) for site in target.sites]
    if len(sites) == 1 and target.sizes is None:
        return [_Piece(entry.site, replace(entry, site=sites[0]), ())]
    axis, sizes = _cut(path, entry, target)
    pieces, start = [], 0
    for site, size in zip(sites, sizes, strict=True):
        shape = (*entry.shape[:axis], size, *entry.shape[axis + 1 :])
        part = (*[slice(None)] * axis, slice(start, start + size))
        pieces.append(_Piece(entry.site, replace(entry, site=site, shape=shape), part))
        start += size
    return pieces


def _cut(path: Path, entry: Entry, target: Target) -> tuple[int, Sequence[int]]:
    """The axis to split along and the sizes of the parts."""
    rank, count = len(entry.shape), len(target.sites)
    if not -rank <= target.dim < rank:
        raise DumpError(
            f"{path}: {entry.site!r} cannot be split along dim {target.dim} — its shape is {entry.shape} — "
            "correct the name map"
        )
    axis = target.dim % rank
    length = entry.shape[axis]
    sizes = (length // count,) * count if target.sizes is None else target.sizes
    if sum(sizes) != length:
        how = f"sizes {list(sizes)}" if target.sizes is not None else f"{count} equal parts"
        raise DumpError(
            f"{path}: {entry.site!r} cannot be split into {how} — "
            f"dim {target.dim} of its shape {entry.shape} is {length} long — correct 'sizes' in the name map"
        )
    return axis, sizes


def _fill(site: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        site = site.replace("*", number, 1)
    return site


def left_out(names: NameMap) -> frozenset[str]:
    """The names and families that a map leaves out."""
    return frozenset(name for name, target in names.items() if not target.sites)


def _target(name: str, value: Any, where: str) -> Target:
    if value is None:
        return Target(())
    spec: Any = {"split": [value]} if isinstance(value, str) else value
    try:
        sizes = spec.get("sizes")
        target = Target(tuple(spec["split"]), None if sizes is None else tuple(sizes), spec.get("dim", -1))
        numbers = (target.dim, *(target.sizes or ()))
        valid = (
            set(spec) <= {"split", "sizes", "dim"}
            and isinstance(spec["split"], list)
            and len(target.sites) > 0
            and all(isinstance(site, str) for site in target.sites)
            and all(type(number) is int for number in numbers)
            and min(numbers[1:], default=0) >= 0
            and (target.sizes is None or len(target.sizes) == len(target.sites))
        )
    except (AttributeError, KeyError, TypeError):
        valid = False
    if not valid:
        raise DumpError(
            f"{where}: {name!r} maps to nothing usable — found {value!r:.80} — "
            'give a site, null, or {"split": [sites], "sizes": [one for each site], "dim": -1}'
        )
    if any(site.count("*") != name.count("*") for site in target.sites):
        raise DumpError(
            f"{where}: {name!r} and {', '.join(map(repr, target.sites))} differ in the number of '*' — "
            "each '*' is a number that both sides share — write as many on each side"
        )
    return target
