"""What a site looks like: a histogram, a map of tokens and channels, and what each token attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from parity.dump import Array, Dump
from parity.show.layout import Layout, blocks, layout, seen, text_rows
from parity.show.statistics import SiteStatistics

BINS = 64
MOST_TOKENS, MOST_CHANNELS = 96, 256
_MOST_HEADS, _MOST_KEYS = 32, 96
_PROBABILITIES = "probs"


@dataclass(frozen=True)
class Histogram:
    """How many numbers are in each of `counts` equal bins from `low` to `high`."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Heatmap:
    """Rows of tokens, columns of channels; a cell is the number of largest magnitude in it.

    NaN where a cell has no finite number. `tokens` and `channels` are how many there are in all.
    """

    cells: tuple[tuple[float, ...], ...]
    tokens: int
    channels: int


@dataclass(frozen=True)
class Head:
    """What one head attends to in the first sequence, the mean over its tokens.

    first, itself, previous  share of the probability on the first token, the token itself and the one before
    entropy                  of the probabilities, in bits
    cells                    the largest probability of each cell, rows of queries and columns of keys
    """

    number: int
    first: float
    itself: float
    previous: float
    entropy: float
    cells: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class View:
    """All there is to look at in one site; `heads` where it holds probabilities of attention."""

    statistics: SiteStatistics
    histogram: Histogram | None
    heatmap: Heatmap | None
    heads: tuple[Head, ...] = ()


def view(dump: Dump, found: SiteStatistics) -> View:
    """Look at a site of a dump again, now that its range is known."""
    lies = layout(dump.entries[found.site], dump.info)
    if not found.rows or not math.isfinite(found.high - found.low):
        return View(found, None, None)
    counts = np.zeros(BINS, dtype=np.int64)
    pool = _Pool(found.rows, lies.width)
    width = (found.high - found.low) or 1.0
    for _, values in blocks(dump.read(found.site), lies, text_rows(lies, dump.info)):
        finite = np.isfinite(values) & seen(values, lies)
        place = np.floor((values[finite] - found.low) / width * BINS).astype(np.int64)
        counts += np.bincount(np.minimum(place, BINS - 1), minlength=BINS)
        pool.add(np.where(finite, values, np.nan))
    heads = _heads(dump, lies) if lies.has_keys and found.site.endswith(_PROBABILITIES) else ()
    histogram = Histogram(found.low, found.high, tuple(map(int, counts)))
    return View(found, histogram, Heatmap(_tuples(pool.cells), found.rows, lies.width), heads)


class _Pool:
    """Blocks of rows pooled to at most MOST_TOKENS x MOST_CHANNELS cells, each the number of largest magnitude."""

    def __init__(self, rows: int, channels: int) -> None:
        self.high, self.wide = (
            math.ceil(n / most) or 1 for n, most in ((rows, MOST_TOKENS), (channels, MOST_CHANNELS))
        )
        self.cells = np.full((math.ceil(rows / self.high), math.ceil(channels / self.wide)), np.nan)
        self.done = 0

    def add(self, values: Array) -> None:
        """Add the next rows (n, channels)."""
        columns = _largest(values, self.wide, axis=1)
        for row in columns:
            cell = self.cells[self.done // self.high]
            self.cells[self.done // self.high] = np.where(
                np.isnan(cell) | (np.abs(np.nan_to_num(row)) > np.abs(cell)), np.where(np.isnan(row), cell, row), cell
            )
            self.done += 1


def _largest(values: Array, width: int, axis: int) -> Array:
    """Along an axis, of each `width` neighbours the number of largest magnitude; NaN where none is one."""
    missing = -values.shape[axis] % width
    padding = [(0, missing if i == axis else 0) for i in range(values.ndim)]
    padded = np.pad(values, padding, constant_values=np.nan)
    grouped = padded.reshape(*padded.shape[:axis], -1, width, *padded.shape[axis + 1 :])
    place = np.abs(np.nan_to_num(grouped)).argmax(axis + 1)
    picked: Array = np.take_along_axis(grouped, np.expand_dims(place, axis + 1), axis + 1).squeeze(axis + 1)
    empty = np.isnan(grouped).all(axis + 1)
    # A NaN among zeros must not stand for them.
    return np.where(empty, np.nan, np.where(np.isnan(picked), 0.0, picked))


def _heads(dump: Dump, lies: Layout) -> tuple[Head, ...]:
    """The heads of the first sequence (head, token, key)."""
    array = np.transpose(dump.read(lies.entry.site), (*lies.rows, *lies.channels))
    if len(lies.counts) == 2:
        array = array[0]
    text = text_rows(lies, dump.info)
    rows = np.arange(array.shape[0]) if text is None else np.flatnonzero(text[: array.shape[0]])
    heads = array.reshape(array.shape[0], -1, array.shape[-1])
    earlier = max(array.shape[-1] - array.shape[0], 0)  # keys of tokens before these
    return tuple(
        _head(number, np.asarray(heads[rows, number], dtype=np.float64), rows + earlier)
        for number in range(min(heads.shape[1], _MOST_HEADS))
    )


def _head(number: int, probs: Array, places: Array) -> Head:
    """One head from its probabilities (token, key); `places` (token,) are the tokens' own among the keys."""
    keys = probs.shape[1]
    places = np.minimum(places, keys - 1)
    before = np.maximum(places - 1, 0)
    index = np.arange(len(places))
    safe = np.where(probs > 0, probs, 1.0)
    wide = math.ceil(keys / _MOST_KEYS) or 1
    cells = _largest(_largest(probs, wide, axis=1), math.ceil(len(places) / _MOST_KEYS) or 1, axis=0)
    return Head(
        number=number,
        first=float(probs[:, int(places[0])].mean()),
        itself=float(probs[index, places].mean()),
        previous=float(probs[index[1:], before[1:]].mean()) if len(places) > 1 else 0.0,
        entropy=float(-(probs * np.log2(safe)).sum(1).mean()),
        cells=_tuples(cells),
    )


def _tuples(cells: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(f"{v:.4g}") for v in row) for row in cells)
