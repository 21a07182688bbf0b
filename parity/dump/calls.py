"""A run in several calls: a prompt in chunks, or a prompt and then one token after another.

`RunInfo.calls` has the number of tokens of each call, [9, 1, 1]. The arrays of one site are either whole, or one for
each call under the names `NAME@0`, `NAME@1`, …; here these are joined along their token axis, to what one call with
all tokens would have given. Those of a cache are put side by side (parity.dump.caches).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from parity.dump.caches import CacheLayout, cache_layout
from parity.dump.records import Array, Dump, Entry
from parity.errors import DumpError
from parity.sites import is_cached

_OF_CALL = re.compile(r"(.+)@([0-9]{1,7})")
_TOKEN = ("token", "seq", "query")
_ROWS_AND_TOKENS = "batch*token"


@dataclass(frozen=True)
class _Joined:
    """The arrays of one site, call by call, and how they lie: `entry` is that of the whole.

    The token axis of each is `rows` times as long as its call has tokens. `key` is the axis of the tokens that a
    token can see, which grows from call to call; None where there is none.
    """

    entry: Entry
    parts: tuple[str, ...]
    axis: int
    rows: int
    key: int | None


def call_name(site: str, call: int) -> str:
    """The name of a site's array of one call, the first being 0."""
    return f"{site}@{call}"


def call_of(name: str) -> tuple[str, int | None]:
    """The site and the call that an array's name means; no call where it is of all."""
    found = _OF_CALL.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


def joined(dump: Dump, *, leave_out: bool = False) -> Dump:
    """The same dump with the arrays of all calls joined; itself, if it has none of single calls.

    Closing it closes the other. Raises DumpError if calls are missing or their shapes do not fit `RunInfo.calls`;
    with `leave_out` such sites are not recorded, and a note says so.
    """
    groups: dict[str, dict[int, Entry]] = {}
    for name, entry in dump.entries.items():
        found = _OF_CALL.fullmatch(name)
        if found:
            groups.setdefault(found[1], {})[int(found[2])] = entry
    if not groups:
        return dump
    sites: dict[str, _Joined | CacheLayout] = {}
    for name, parts in groups.items():
        try:
            sites[name] = _site(dump, name, parts)
        except DumpError:
            if not leave_out:
                raise
    entries: dict[str, Entry] = {}
    for name, entry in dump.entries.items():
        found = _OF_CALL.fullmatch(name)
        if found is None:
            entries[name] = entry
        elif found[1] in sites:
            entries[found[1]] = sites[found[1]].entry

    def load(site: str) -> Array:
        found = sites.get(site)
        if isinstance(found, CacheLayout):
            return found.join(dump.read)
        return dump.read(site) if found is None else _join(dump, found)

    note = f"{len(sites)} of {len(groups)} sites were joined from {len(dump.info.calls or ())} calls"
    return Dump(dump.path, replace(dump.info, notes=(*dump.info.notes, note)), entries, load, dump.close)


def _site(dump: Dump, name: str, parts: Mapping[int, Entry]) -> _Joined | CacheLayout:
    path, calls = dump.path, dump.info.calls
    if calls is None:
        raise DumpError(
            f"{path}: holds arrays of single calls — found {call_name(name, min(parts))!r} — "
            "say how many tokens each call had: parity.calls = [9, 1, 1]"
        )
    if name in dump.entries:
        raise DumpError(f"{path}: {name!r} is there whole and in calls — write it one way")
    missing = sorted(set(range(len(calls))) - parts.keys())
    if missing or len(parts) != len(calls):
        which = f"lacks call {missing[0]}" if missing else f"has {len(parts)} calls"
        raise DumpError(
            f"{path}: {name!r} {which} of {len(calls)} — calls count from 0 — write its array of every call, or none"
        )
    ordered = [parts[call] for call in range(len(calls))]
    if is_cached(name):
        return cache_layout(path, name, ordered, [call_name(name, call) for call in range(len(calls))], calls)
    return _layout(path, name, ordered, calls, len(dump.info.token_ids or ((),)))


def _layout(path: Path, name: str, parts: Sequence[Entry], calls: Sequence[int], batch: int) -> _Joined:
    first = parts[0]
    if any(part.dtype != first.dtype or len(part.shape) != len(first.shape) for part in parts):
        raise DumpError(f"{path}: the calls of {name!r} differ in dtype or number of axes — write all alike")
    axis, rows = _token_axis(path, name, parts, calls, batch)
    others = [i for i in range(len(first.shape)) if i != axis and len({part.shape[i] for part in parts}) > 1]
    whole = list(first.shape)
    whole[axis] = rows * sum(calls)
    key = others[0] if others else None
    if key is not None:
        keys = [part.shape[key] for part in parts]
        if len(others) > 1 or not all(map(_fits_keys, keys, accumulate(calls), [sum(calls)] * len(calls))):
            raise DumpError(
                f"{path}: the calls of {name!r} have shapes {first.shape} and {parts[1].shape} — only the axis of "
                "tokens, and that of the keys seen so far, may change from call to call — write it as one array"
            )
        whole[key] = sum(calls)
    names = tuple(call_name(name, call) for call in range(len(calls)))
    return _Joined(replace(first, site=name, shape=tuple(whole)), names, axis, rows, key)


def _fits_keys(keys: int, seen: int, total: int) -> bool:
    """Whether an axis holds the tokens seen so far, or has room for all: in which order a window keeps some is open."""
    return keys in (seen, total)


def _token_axis(path: Path, name: str, parts: Sequence[Entry], calls: Sequence[int], batch: int) -> tuple[int, int]:
    """Which axis counts the tokens of a call, and how many rows of the batch lie flattened in it."""
    shapes = [part.shape for part in parts]
    dims = parts[0].dims or ()
    axes = {rows: [i for i in range(len(shapes[0])) if _counts(shapes, i, calls, rows)] for rows in {1, batch}}
    declared = [
        (i, batch if dim == _ROWS_AND_TOKENS else 1) for i, dim in enumerate(dims) if dim in (*_TOKEN, _ROWS_AND_TOKENS)
    ]
    if declared and declared[0][0] in axes[declared[0][1]]:
        return declared[0]
    found = [(i, rows) for rows in sorted(axes) for i in axes[rows]] if not declared else []
    if not found:
        raise DumpError(
            f"{path}: {call_name(name, 0)!r} to {call_name(name, len(calls) - 1)!r} have shapes {shapes[0]} to "
            f"{shapes[-1]} — no axis has the {', '.join(map(str, calls[:8]))} tokens of parity.calls — "
            "write the rows of every token"
        )
    if len(found) > 1 and max(calls) * batch > 1:
        raise DumpError(
            f"{path}: {call_name(name, 0)!r} has the shape {shapes[0]} — {len(found)} axes may count its {calls[0]} "
            "tokens — declare them: parity.dims"
        )
    # Of axes that have one element in every call any will do, but the last is usually that of features.
    inner = [one for one in found if one[0] < len(shapes[0]) - 1]
    return (inner or found)[-1]


def _counts(shapes: Sequence[tuple[int, ...]], axis: int, calls: Sequence[int], rows: int) -> bool:
    return all(shape[axis] == rows * call for shape, call in zip(shapes, calls, strict=True))


def _join(dump: Dump, site: _Joined) -> Array:
    arrays = [dump.read(part) for part in site.parts]
    if site.key is not None:
        fill = _hidden(site.entry.site, arrays)
        arrays = [_widened(array, site.key, site.entry.shape[site.key], fill) for array in arrays]
    if site.rows == 1:
        return np.concatenate(arrays, axis=site.axis)
    before, after = site.entry.shape[: site.axis], site.entry.shape[site.axis + 1 :]
    split = [array.reshape(*before, site.rows, -1, *after) for array in arrays]
    return np.concatenate(split, axis=site.axis + 1).reshape(site.entry.shape)


def _widened(array: Array, axis: int, total: int, fill: Any) -> Array:
    """An array with as many keys as there are tokens in all: those that come later are hidden."""
    more = (*array.shape[:axis], total - array.shape[axis], *array.shape[axis + 1 :])
    return np.concatenate([array, np.full(more, fill, dtype=array.dtype)], axis=axis)


def _hidden(site: str, arrays: Sequence[Array]) -> Any:
    """What stands for a key that a token does not see: no probability, or the lowest score."""
    wide = [array.astype(np.float32) for array in arrays]
    is_share = not site.endswith("scores") and all(w.min() >= 0 and w.max() <= 1 for w in wide if math.prod(w.shape))
    return 0 if is_share else ml_dtypes.finfo(arrays[0].dtype).min  # type: ignore[no-untyped-call]
