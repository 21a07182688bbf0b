"""What formats of quantized weights keep, and how far rounding to them may be off.

A format keeps each block of a row on a grid of its own, whose step follows from the block's numbers: rounding to it
may be off by so many steps.

| format | block | step | allowed rms, in steps |
|---|---|---|---|
| Q8_0 | 32 | largest / 127 | 0.75: half a step, and the step itself is float16 |
| Q4_0, Q5_0 | 32 | largest / 8, / 16 | 1: the grid lacks one end |
| Q4_1, Q5_1 | 32 | range / 15, / 31 | 0.75 |
| Q2_K, Q4_K, Q5_K | 16, 32, 32 | range / 3, / 15, / 31 | 1.5: quantizers search for a step, which is rounded too |
| Q3_K, Q6_K | 16 | largest / 4, / 32 | the same |
| MLX, n bits | the group | range / (2ⁿ - 1) | 0.75, and what the dtype of step and start rounds off the largest |
| ONNX, 8 bits | the row, or all | largest / 127, or range / 255 | 1: some quantizers keep a bit less |
| MatMulNBits | its block | largest / 2ⁿ⁻¹, or range / (2ⁿ - 1) | 1: its zero is rounded, or the grid lacks one end |
| int8 of torch | the row, or a group | largest / 127 | 0.75 |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EXACT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The dtype in which numbers are kept that are not quantized → the format's name.
PLAIN = {dtype: name for name, dtype in EXACT.items()}
_SUPER = 256
# The step of a block is itself kept in float16, whose smallest number is this.
_TINY = 2.0**-24


def rounded(kind: str, stored: Tensor) -> Tensor | None:
    """`stored` numbers (…) as a format that is not quantized keeps them, (…) in float32; None for another format."""
    return stored.to(EXACT[kind]).float() if kind in EXACT else None


@dataclass(frozen=True)
class Grid:
    """A block of so many numbers has so many steps; `ranged` from its least number to its largest, else from zero.

    `block` 0 is the whole row. `scales` is how many steps the blocks' own steps have, of 256 numbers together; 0 where
    each has its own. `shared` means that all blocks have the same step.
    """

    block: int
    steps: int
    ranged: bool = False
    allowed: float = 0.75
    scales: int = 0
    shared: bool = False

    def blocks(self, rows: Tensor) -> Tensor:
        """Weights (row, column) as (row, block, number); zeros fill up a last block that is not whole."""
        size = self.block or rows.shape[-1]
        return F.pad(rows, (0, -rows.shape[-1] % size)).reshape(len(rows), -1, size)

    def may_be_off(self, stored: Tensor) -> Tensor:
        """The rms error that each block may have, (row, block), of weights (row, column)."""
        blocks = self.blocks(stored)
        low = blocks.amin(-1).clamp_max(0).neg() if self.ranged else torch.zeros(blocks.shape[:2])
        extent = blocks.amax(-1).clamp_min(0) + low if self.ranged else blocks.abs().amax(-1)
        if self.shared:
            extent = extent.max().expand_as(extent)
        step = extent / self.steps
        if self.scales and not stored.shape[-1] % _SUPER:
            # A step rounded to `scales` parts of the largest is off by half of one; the largest number feels it most.
            together = _SUPER // self.block
            largest = (extent + low).reshape(len(stored), -1, together).amax(-1) / (2 * self.scales)
            step = step + largest.repeat_interleave(together, -1)
        return self.allowed * step + _TINY * self.steps


GGML: dict[str, Grid] = {
    "Q8_0": Grid(32, 127),
    "Q4_0": Grid(32, 8, allowed=1.0),
    "Q5_0": Grid(32, 16, allowed=1.0),
    "Q4_1": Grid(32, 15, ranged=True),
    "Q5_1": Grid(32, 31, ranged=True),
    "Q2_K": Grid(16, 3, ranged=True, allowed=1.5, scales=15),
    "Q3_K": Grid(16, 4, allowed=1.5, scales=31),
    "Q4_K": Grid(32, 15, ranged=True, allowed=1.5, scales=63),
    "Q5_K": Grid(32, 31, ranged=True, allowed=1.5, scales=63),
    "Q6_K": Grid(16, 32, allowed=1.5, scales=127),
}
