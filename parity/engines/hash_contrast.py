"""Two files of hashes: do two runs have the same bits, and if not, where do they part?"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import numpy as np

from parity.dump import Entry, RunInfo
from parity.dump.calls import call_of
from parity.dump.hashes import Hashes, is_hashes, open_hashes
from parity.errors import IncomparableError
from parity.hash_report import HashContrast, Parting

_SAID = ("model", "fingerprint", "dtype", "device", "attention")


def hash_contrast(paths: tuple[Path, Path]) -> HashContrast:
    """Hold two files of hashes together. Raises DumpError, and IncomparableError for runs on other tokens."""
    first, second = _both_hashes(paths)
    same, parted = 0, list[Parting]()
    for site in first.entries:
        if site not in second.entries:
            continue
        found = _parting(site, first, second)
        if found is None:
            same += 1
        else:
            parted.append(found)
    return HashContrast(
        first=_said(first),
        second=_said(second),
        same=same,
        parted=tuple(parted),
        only_first=tuple(site for site in first.entries if site not in second.entries),
        only_second=tuple(site for site in second.entries if site not in first.entries),
        differences=_differences(first.info, second.info),
    )


def _both_hashes(paths: tuple[Path, Path]) -> tuple[Hashes, Hashes]:
    other = next((path for path in paths if not is_hashes(path)), None)
    if other is not None:
        hashed = paths[0] if other == paths[1] else paths[1]
        raise IncomparableError(
            f"{other}: holds activations, {hashed} hashes of bits. Hash it first: "
            f"parity record --hash --candidate {other} -o HASHES.safetensors"
        )
    first, second = map(open_hashes, paths)
    for what, one, two in (
        ("token ids", first.info.token_ids, second.info.token_ids),
        ("calls", first.info.calls, second.info.calls),
    ):
        if one != two:
            raise IncomparableError(f"{paths[0]} and {paths[1]} are runs on other {what}. Record both on the same.")
    return first, second


def _said(hashes: Hashes) -> str:
    return f"{hashes.path} ({hashes.info.producer or 'unknown'})"


def _differences(one: RunInfo, two: RunInfo) -> tuple[str, ...]:
    said = [(name, getattr(one, name), getattr(two, name)) for name in _SAID]
    said += [(name, one.versions.get(name), two.versions.get(name)) for name in {**one.versions, **two.versions}]
    return tuple(f"{name}: {a or 'not said'} and {b or 'not said'}" for name, a, b in said if a != b)


def _parting(site: str, first: Hashes, second: Hashes) -> Parting | None:
    name, call = call_of(site)
    one, two = first.entries[site], second.entries[site]
    of = int(first.rows[site].size)
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        kinds = f"{one.dtype} {list(one.shape)} and {two.dtype} {list(two.shape)}"
        return Parting(name, call, None, "", 0, of, kinds)
    apart = first.rows[site] != second.rows[site]
    if not apart.any():
        return None
    where = np.argwhere(apart)
    axis, start = _tokens(one, first.info, call)
    order = where[:, axis].argsort(kind="stable") if axis is not None else range(len(where))
    row = where[order[0]].tolist()
    dims = [_axis_name(one, i, axis) for i in range(len(row))]
    if axis is not None:
        row[axis] += start
    place = ", ".join(f"{dim} {number}" for dim, number in zip(dims, row, strict=True))
    return Parting(name, call, None if axis is None else row[axis], place, len(where), of)


def _tokens(entry: Entry, info: RunInfo, call: int | None) -> tuple[int | None, int]:
    """Which axis of the rows counts tokens, where that is certain, and the token that it begins with."""
    rows = info.token_ids or ((),)
    start, size = 0, len(rows[0])
    if call is not None and info.calls:
        start, size = [0, *accumulate(info.calls)][call], info.calls[call]
    axes = range(len(entry.shape) - 1)
    if entry.dims is not None:
        return next((i for i in axes if entry.dims[i] == "token"), None), start
    fitting = [i for i in axes if entry.shape[i] == size]
    flattened = len(rows) > 1 and entry.shape[0] == len(rows) * size
    is_certain = fitting and (len(fitting) == 1 or size == 1) and not flattened
    return (fitting[-1] if is_certain else None), start


def _axis_name(entry: Entry, i: int, token: int | None) -> str:
    if i == token:
        return "token"
    return entry.dims[i] if entry.dims is not None else f"axis {i}:"
