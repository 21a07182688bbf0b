"""Where the bits of two hashed runs part: Parting (a site) → HashContrast (two runs), as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from parity.results import EXIT_CODES, RunVerdict

HASH_SCHEMA = 1


@dataclass(frozen=True)
class Parting:
    """A site at which two runs have other bits.

    call         of a run in several calls: in which, counted from 0
    first_token  the first token whose bits differ; None where no axis of the array is known to count tokens
    place        the first row that differs, by its axes: `batch 0, head 3, token 17`
    rows         how many rows differ, of `of` (a row: the numbers along the last axis)
    kinds        dtypes and shapes, where these differ; then no row was compared
    """

    site: str
    call: int | None
    first_token: int | None
    place: str
    rows: int
    of: int
    kinds: str = ""


@dataclass(frozen=True)
class HashContrast:
    """Two runs by the hashes of their bits.

    first, second        what ran, in which file
    same                 sites with the same bits
    parted               sites with others, in the order in which the first run computed them
    only_first, …        sites that one run alone has, of which nothing is known
    differences          in what the runs differ before anything is computed: weights, dtype, device, versions
    """

    first: str
    second: str
    same: int
    parted: tuple[Parting, ...]
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    schema: int = HASH_SCHEMA

    @property
    def verdict(self) -> RunVerdict:
        """A match only where every site of both has the same bits."""
        if self.parted:
            return "diverged"
        return "inconclusive" if self.only_first or self.only_second or not self.same else "match"

    @property
    def exit_code(self) -> int:
        """As diff(1)."""
        return EXIT_CODES[self.verdict]
