"""What a site holds, in a few numbers; read block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parity.dump import Array, Dump
from parity.show.layout import Layout, blocks, layout, seen, text_rows

# A channel whose root mean square is at least so many times that of the median channel is an outlier. LLM.int8()
# (Dettmers et al. 2022) calls features of magnitude 6 so, where normed activations are about 1.
OUTLIER = 6.0
# So many outliers are named, the largest first.
_NAMED = 8


@dataclass(frozen=True)
class Outlier:
    """A channel, its name in words, and its root mean square in units of the median channel's."""

    channel: int
    name: str
    times: float


@dataclass(frozen=True)
class Largest:
    """The number of largest magnitude, and where it stands; `token` counts the rows of all sequences."""

    value: float
    token: int
    channel: int
    name: str


@dataclass(frozen=True)
class SiteStatistics:
    """One site. Numbers are in the activation's own units; padding and masked scores are left out of all of them.

    norm       L2 norm of a token's channels, the mean over tokens
    rms        root mean square of all numbers
    low, high  the smallest and the largest number; NaN where none is finite
    of_keys    whether the channels are the keys of attention: scores and probabilities
    outliers   channels whose root mean square stands out (OUTLIER); none for scores and probabilities
    dead       channels that are zero at every token; 0 for scores and probabilities
    nonfinite  how many numbers are NaN or infinite; these are in none of the other figures
    """

    site: str
    dtype: str
    shape: tuple[int, ...]
    rows: int
    channels: int
    norm: float
    rms: float
    low: float
    high: float
    of_keys: bool
    largest: Largest | None
    outliers: tuple[Outlier, ...]
    outlier_count: int
    dead: int
    nonfinite: int


@dataclass(frozen=True)
class Distance:
    """One site in two dumps.

    relative   ‖first − second‖ / ‖first‖ over the numbers that are finite in both; NaN where the first is all zero
    largest    the largest difference
    why_not    why they cannot be lined up; empty if they were
    """

    relative: float = math.nan
    largest: float = math.nan
    why_not: str = ""


class _Sums:
    """What is gathered over the blocks of one site."""

    def __init__(self, width: int) -> None:
        self.squares = np.zeros(width)
        self.numbers = np.zeros(width, dtype=np.int64)
        self.alive = np.zeros(width, dtype=bool)
        self.rows = self.nonfinite = 0
        self.norms = 0.0
        self.low, self.high = math.inf, -math.inf
        self.largest: tuple[float, int, int] | None = None

    def add(self, rows: Array, values: Array, counted: Array) -> None:
        """Add a block (n, channels); `counted` says which of its numbers a mask has not hidden."""
        finite = np.isfinite(values) & counted
        self.nonfinite += int((counted & ~finite).sum())
        self.rows += len(values)
        kept = np.where(finite, values, 0.0)
        squares = kept * kept
        self.squares += squares.sum(0)
        self.numbers += finite.sum(0)
        self.alive |= ((kept != 0) | (counted & ~finite)).any(0)
        self.norms += float(np.sqrt(squares.sum(1)).sum())
        if not finite.any():
            return
        self.low = min(self.low, float(values[finite].min()))
        self.high = max(self.high, float(values[finite].max()))
        place = int(np.abs(kept).argmax())
        row, channel = divmod(place, values.shape[1])
        if self.largest is None or abs(kept[row, channel]) > abs(self.largest[0]):
            self.largest = float(kept[row, channel]), int(rows[row]), channel


def statistics(dump: Dump, site: str) -> SiteStatistics:
    """The figures of a site. Raises DumpError where the dump has no such site or is damaged."""
    entry = dump.entries.get(site)
    array = dump.read(site)  # which says best what is missing
    assert entry is not None, "unreachable because it was read"
    lies = layout(entry, dump.info)
    sums = _Sums(lies.width)
    with np.errstate(over="ignore"):  # squares of what float64 itself can hardly hold
        for rows, values in blocks(array, lies, text_rows(lies, dump.info)):
            if values.size:
                sums.add(rows, values, seen(values, lies))
    total = int(sums.numbers.sum())
    outliers = [] if lies.has_keys else _outliers(sums, lies)
    return SiteStatistics(
        site=site,
        dtype=entry.dtype,
        shape=entry.shape,
        rows=sums.rows,
        channels=lies.width,
        norm=sums.norms / sums.rows if sums.rows else math.nan,
        rms=math.sqrt(float(sums.squares.sum()) / total) if total else math.nan,
        low=sums.low if total else math.nan,
        high=sums.high if total else math.nan,
        of_keys=lies.has_keys,
        largest=Largest(*sums.largest, lies.channel(sums.largest[2])) if sums.largest else None,
        outliers=tuple(outliers[:_NAMED]),
        outlier_count=len(outliers),
        dead=0 if lies.has_keys or not sums.rows else int((~sums.alive).sum()),
        nonfinite=sums.nonfinite,
    )


def _outliers(sums: _Sums, lies: Layout) -> list[Outlier]:
    sizes = np.sqrt(sums.squares / np.maximum(sums.numbers, 1))
    median = float(np.median(sizes)) if sizes.size else 0.0
    if not median > 0:
        return []
    found = [i for i in np.argsort(-sizes, kind="stable") if sizes[i] >= OUTLIER * median]
    return [Outlier(int(i), lies.channel(int(i)), float(sizes[i] / median)) for i in found]


def distance(first: Dump, second: Dump, site: str) -> Distance:
    """How far a site's numbers are apart in two dumps, tokens lined up with tokens, channels in stored order."""
    if site not in second.entries:
        return Distance(why_not="not in the second dump")
    sides = [(dump, layout(dump.entries[site], dump.info)) for dump in (first, second)]
    (_, ours), (_, theirs) = sides
    if ours.sequences != theirs.sequences or ours.width != theirs.width:
        return Distance(why_not=f"shape {theirs.entry.shape} in place of {ours.entry.shape}")
    if ours.names != theirs.names and ours.entry.dims is not None and theirs.entry.dims is not None:
        return Distance(why_not=f"axes {' '.join(theirs.entry.dims)!r} in place of {' '.join(ours.entry.dims)!r}")
    errors = norms = largest = 0.0
    text = text_rows(ours, first.info)
    for mine, other, counted in _together(sides, site, text):
        difference = np.where(counted, mine - other, 0.0)
        errors += float(np.square(difference).sum())
        norms += float(np.square(np.where(counted, mine, 0.0)).sum())
        largest = max(largest, float(np.abs(difference).max(initial=0.0)))
    return Distance(math.sqrt(errors / norms) if norms else math.nan if errors else 0.0, largest)


def _together(sides: list[tuple[Dump, Layout]], site: str, text: Array | None) -> Iterator[tuple[Array, Array, Array]]:
    """Blocks (n, channels) of both sides and which of their numbers count; the others are 0 there."""
    parts = [blocks(dump.read(site), lies, text) for dump, lies in sides]
    for (_, mine), (_, other) in zip(*parts, strict=True):
        counted = np.ones(mine.shape, dtype=bool)
        for values, (_, lies) in zip((mine, other), sides, strict=True):
            counted &= np.isfinite(values) & seen(values, lies)
        yield np.where(counted, mine, 0.0), np.where(counted, other, 0.0), counted
