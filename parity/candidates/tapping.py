"""Has looking at a run changed it? A compiler or runtime may compute differently where a value must be shown."""

from __future__ import annotations

from parity.results import Check


def tapping_check(moved: float, unit: float, operations: int) -> Check:
    """Whether the logits with and without taps differ by rounding at most.

    moved       the norm of their difference, as a part of theirs
    unit        the unit roundoff of the run
    operations  how many values were looked at. That many roundings add up to their root; four times that is allowed.
    """
    how = "are bit-equal" if moved == 0 else f"differ by {moved:.1e} of their size"
    return Check("run without taps", moved <= 4 * unit * operations**0.5, f"logits with and without taps {how}")
