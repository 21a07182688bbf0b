"""The arrays of a site of the cache, one a call, as one: what attention read in each call.

The array of a call has the rows of all tokens seen by then, in their order: (b, head, s, head_dim) or
(b, s, head, head_dim), without the batch where that is 1. With fewer rows it has the last ones, as a window keeps
them, and the others are absent; what it has beyond them, in a buffer of fixed length, is not read yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from parity.dump.records import Array, Entry
from parity.errors import DumpError
from parity.sites import CALL

_TOKENS = ("token", "seq", "key")
_ABSENT = -0.0  # see parity.record.cache
_LAYOUTS = {
    (4, 2): ("batch", "head", CALL, "token", "head_dim"),
    (4, 1): ("batch", CALL, "token", "head", "head_dim"),
    (3, 1): ("head", CALL, "token", "head_dim"),
    (3, 0): (CALL, "token", "head", "head_dim"),
}


@dataclass(frozen=True)
class CacheLayout:
    """The arrays of a site's calls, and `entry`, the whole: with an axis of calls before that of the tokens, `axis`."""

    entry: Entry
    parts: tuple[str, ...]
    axis: int
    seen: tuple[int, ...]

    def join(self, read: Callable[[str], Array]) -> Array:
        """All calls in one array (…, calls, t, …), in which each has room for the tokens of the last."""
        arrays = [np.moveaxis(read(part), self.axis, 0) for part in self.parts]
        whole = np.zeros(self.entry.shape, arrays[0].dtype)
        rows = np.moveaxis(whole, (self.axis, self.axis + 1), (0, 1))
        for call, (array, seen) in enumerate(zip(arrays, self.seen, strict=True)):
            absent = max(seen - len(array), 0)
            rows[call, :absent] = _ABSENT
            rows[call, absent:seen] = array[:seen]
        return whole


def cache_layout(
    path: Path, name: str, parts: Sequence[Entry], names: Sequence[str], calls: Sequence[int]
) -> CacheLayout:
    """How the arrays of a site's calls lie. Raises DumpError where no axis counts the tokens seen."""
    seen, first = tuple(accumulate(calls)), parts[0]
    axis = _axis(parts, seen)
    others = {tuple(size for i, size in enumerate(part.shape) if i != axis) for part in parts}
    if axis is None or len(others) > 1 or len({part.dtype for part in parts}) > 1:
        raise DumpError(
            f"{path}: {names[0]!r} to {names[-1]!r} have shapes {first.shape} to {parts[-1].shape} — no axis has the "
            f"{', '.join(map(str, seen[:8]))} rows that the calls read — write what attention read in each: "
            "(batch, head, row, head_dim)"
        )
    shape = (*first.shape[:axis], len(calls), seen[-1], *first.shape[axis + 1 :])
    dims = (*first.dims[:axis], CALL, "token", *first.dims[axis + 1 :]) if first.dims else None
    dims = dims or _LAYOUTS.get((len(first.shape), axis))
    return CacheLayout(replace(first, site=name, shape=shape, dims=dims), tuple(names), axis, seen)


def _axis(parts: Sequence[Entry], seen: Sequence[int]) -> int | None:
    """The axis of rows: the declared one, or that which counts the tokens seen, or that which changes."""
    dims = parts[0].dims
    if dims:
        return next((i for i, dim in enumerate(dims) if dim in _TOKENS), None)
    sizes = [tuple(part.shape[i] for part in parts) for i in range(len(parts[0].shape))]
    if len({len(part.shape) for part in parts}) > 1:
        return None
    counting = [i for i, size in enumerate(sizes) if size == tuple(seen)]
    changing = [i for i, size in enumerate(sizes) if len(set(size)) > 1]
    # A buffer of fixed length has room for all.
    roomy = [axis for rank, axis in _LAYOUTS if rank == len(sizes) and sizes[axis][0] >= seen[-1]]
    return next(iter([*counting, *changing, *(roomy if len(roomy) == 1 else ())]), None)
