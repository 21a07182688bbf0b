"""What is said of a quantized tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightError:
    """A tensor of the candidate's own weights, with which the reference computed, beside the checkpoint's.

    relative  ‖theirs − checkpoint's‖ / ‖checkpoint's‖
    ratio     rms error of the worst block over what the format allows it; above 1 it is not rounding to the format;
              None where nothing is known of the format
    how       what happened to it if it is, as far as that can be told
    cost      ‖logits with this tensor alone quantized − logits‖ / ‖logits‖; None where that was not asked for
    """

    tensor: str
    format: str
    relative: float
    ratio: float | None
    how: str = ""
    cost: float | None = None
