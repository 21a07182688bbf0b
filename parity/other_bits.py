"""OtherBits: how the first operation rounds whose bits are not the reference's, as plain numbers and words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OtherBits:
    """How the first operation with other bits rounds, where equal bits were asked for.

    ways       orders of sums and places of rounding each of which gives every bit of the candidate that was tried
    tried      so many numbers of the site were, all of them unless it is large, and `differing` of these are not the
               reference's own
    floors     distance from the reference's bits in units of its own rounding error there; None where it has none
    """

    site: str
    ways: tuple[str, ...]
    tried: int
    differing: int
    floors: float | None
