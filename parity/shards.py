"""One comparison in several parts: which of them a process computes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from parity.errors import UsageError

T = TypeVar("T")

# What it costs to walk through a piece on the way to those of a shard, of what it costs to measure it.
_WALKED = 0.3


@dataclass(frozen=True)
class Shard:
    """The `number`-th of `count` parts, from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `2/4`. Raises UsageError."""
        found = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", text)
        if not found or int(found[1]) > int(found[2]):
            raise UsageError(
                f"--shard {text!r}: no part of a whole. Give its number and how many there are: 1/4 … 4/4."
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def share(self, pieces: Sequence[T]) -> Sequence[T]:
        """Its pieces, in order: every piece is in one shard.

        All shards take about as long: one that begins late walks through more on its way, and has fewer of its own.
        """
        lengths = [1.0]
        for _ in range(self.count - 1):
            lengths.append(lengths[-1] * (1 - _WALKED))
        ends = [0.0, *accumulate(lengths)]
        first, last = (round(len(pieces) * ends[i] / ends[-1]) for i in (self.number - 1, self.number))
        return pieces[first:last]
