"""How an array of a dump lies: which axes count tokens, and which are the channels of a token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from parity.dump import DTYPES, Array, Entry, RunInfo

_TOKEN = ("token", "seq", "query", "batch*token")
_KEY = "key"
# Numbers of an array that are in memory at a time.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Layout:
    """An array as rows of channels: a row for each token of each sequence, the other axes being its channels.

    rows      the axes that count rows, the sequence first; empty where an array has none
    channels  the other axes, in stored order, and
    names     how these are called, with their sizes
    has_token whether the last axis of `rows` counts tokens
    """

    entry: Entry
    rows: tuple[int, ...]
    channels: tuple[int, ...]
    names: tuple[tuple[str, int], ...]
    has_token: bool

    @property
    def width(self) -> int:
        """How many channels a row has."""
        return math.prod(self.entry.shape[axis] for axis in self.channels)

    @property
    def counts(self) -> tuple[int, ...]:
        """Sizes of the axes that count rows."""
        return tuple(self.entry.shape[axis] for axis in self.rows)

    @property
    def sequences(self) -> tuple[int, int]:
        """How many sequences there are, and the rows of each."""
        if len(self.counts) == 2 and self.has_token:
            return self.counts[0], self.counts[1]
        return 1, math.prod(self.counts)

    @property
    def has_keys(self) -> bool:
        """Whether the channels of a token are what it sees of others: scores or probabilities of attention."""
        return self.has_token and bool(self.names) and self.names[-1][0] == _KEY

    def channel(self, index: int) -> str:
        """A channel in words: `head 3, head_dim 5`; `channel 7` where its axis has no name of its own."""
        if len(self.names) == 1:
            return f"channel {index}"
        sizes = [size for _, size in self.names]
        places = np.unravel_index(index, sizes)
        return ", ".join(f"{name} {place}" for (name, _), place in zip(self.names, places, strict=True))


def layout(entry: Entry, info: RunInfo) -> Layout:
    """How a site's array lies, by its dims; where it has none, by its shape and the number of tokens."""
    dims, axes = entry.dims, range(len(entry.shape))
    if dims is not None:
        token = next((i for i in axes if dims[i] in _TOKEN), None)
        batch = next((i for i in axes if dims[i] == "batch" and token is not None), None)
    else:
        tokens = len(info.token_ids[0]) if info.token_ids else None
        found = [i for i in axes[:-1] if entry.shape[i] == tokens]
        token = found[0] if len(found) == 1 else None
        batch = 0 if token == 1 and len(entry.shape) > 2 else None
    named = tuple(i for i in (batch, token) if i is not None)
    rows = tuple(axes[:-1]) if token is None else named
    channels = tuple(i for i in axes if i not in rows)
    names = tuple((dims[i] if dims is not None else "channel", entry.shape[i]) for i in channels)
    return Layout(entry, rows, channels, names, token is not None)


def blocks(array: Array, lies: Layout, text: Array | None = None) -> Iterator[tuple[Array, Array]]:
    """Blocks of an array of any shape, each as row numbers (n,) and float64 values (n, channels), in order.

    Only a block is in memory. `text` (rows,) says which rows count; none of the others are given.
    """
    width = max(lies.width, 1)
    shape = tuple(array.shape[axis] for axis in lies.channels)
    # Contiguous rows are regrouped, and transposed ones keep their two axes: nothing is copied.
    sequences = np.transpose(array, (*lies.rows, *lies.channels)).reshape(*lies.sequences, *shape)
    step = max(_BLOCK // width, 1)
    first = 0
    for sequence in sequences:
        for start in range(0, len(sequence), step):
            part = sequence[start : start + step]
            values = np.asarray(part, dtype=np.float64).reshape(len(part), -1)
            numbers = np.arange(first + start, first + start + len(part))
            keep = slice(None) if text is None else text[numbers]
            yield numbers[keep], values[keep]
        first += len(sequence)


def seen(values: Array, lies: Layout) -> Array:
    """Which numbers (n, channels) are none that a mask has hidden from a token: the lowest of the dtype, or -inf."""
    if not (lies.has_keys and "float" in lies.entry.dtype):
        return np.ones(values.shape, dtype=bool)
    lowest = float(ml_dtypes.finfo(DTYPES[lies.entry.dtype]).min)  # type: ignore[no-untyped-call]
    hidden: Array = values <= lowest
    return ~hidden


def text_rows(lies: Layout, info: RunInfo) -> Array | None:
    """Which rows of an array are text (rows,) of bool; None if all are, or if it is not known which are padding."""
    if info.attention_mask is None or not lies.has_token:
        return None
    mask = np.asarray(info.attention_mask, dtype=bool).reshape(-1)
    return mask if mask.size == math.prod(lies.counts) else None
