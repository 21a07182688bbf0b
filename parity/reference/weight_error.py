"""How far quantized weights are off the checkpoint, against what their format allows.

A format keeps each block of a row on a grid of its own, whose step follows from the block's numbers: rounding to it
may be off by so many steps. What is further off was not quantized but damaged: a wrong scale, order, row or tensor.

| format | block | step | allowed rms, in steps |
|---|---|---|---|
| Q8_0 | 32 | largest / 127 | 0.75: half a step, and the step itself is float16 |
| Q4_0, Q5_0 | 32 | largest / 8, / 16 | 1: the grid lacks one end |
| Q4_1, Q5_1 | 32 | range / 15, / 31 | 0.75 |
| Q2_K, Q4_K, Q5_K | 16, 32, 32 | range / 3, / 15, / 31 | 1.5: quantizers search for a step, which is rounded too |
| Q3_K, Q6_K | 16 | largest / 4, / 32 | the same |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from parity.quantization import WeightError
from parity.reference.checkpoint import Checkpoint

_EXACT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SUPER = 256
# The step of a block is itself kept in float16, whose smallest number is this.
_TINY = 2.0**-24


@dataclass(frozen=True)
class Format:
    """A block of so many numbers has so many steps; `ranged` from its least number to its largest, else from zero.

    `scales` is how many steps the blocks' own steps have, of 256 numbers together; 0 where each has its own.
    """

    block: int
    steps: int
    ranged: bool = False
    allowed: float = 0.75
    scales: int = 0


FORMATS: dict[str, Format] = {
    "Q8_0": Format(32, 127),
    "Q4_0": Format(32, 8, allowed=1.0),
    "Q5_0": Format(32, 16, allowed=1.0),
    "Q4_1": Format(32, 15, ranged=True),
    "Q5_1": Format(32, 31, ranged=True),
    "Q2_K": Format(16, 3, ranged=True, allowed=1.5, scales=15),
    "Q3_K": Format(16, 4, allowed=1.5, scales=31),
    "Q4_K": Format(32, 15, ranged=True, allowed=1.5, scales=63),
    "Q5_K": Format(32, 31, ranged=True, allowed=1.5, scales=63),
    "Q6_K": Format(16, 32, allowed=1.5, scales=127),
}


def weight_errors(checkpoint: Checkpoint) -> list[WeightError]:
    """Each tensor that `checkpoint.weights` have, beside the checkpoint's own; none where there are no such weights."""
    if checkpoint.weights is None:
        return []
    return [_error(name, stored, checkpoint) for name, stored in _stored(checkpoint)]


def _stored(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    assert checkpoint.weights is not None, "unreachable because the caller has looked"
    with ExitStack() as stack:
        for shard in checkpoint.open(stack):
            for name in shard.keys():  # noqa: SIM118
                if checkpoint.weights.format(name):
                    yield name, shard.get_tensor(name).float()


def _error(name: str, stored: Tensor, checkpoint: Checkpoint) -> WeightError:
    assert checkpoint.weights is not None, "unreachable because the caller has looked"
    kind, mine = checkpoint.weights.format(name), checkpoint.weights.tensor(name)
    size = float(stored.norm()) or 1.0
    relative = float((mine - stored).norm()) / size
    if kind in _EXACT:
        same = torch.equal(mine, stored.to(_EXACT[kind]).float())
        how = "" if same else f"differs in {float((mine != stored).float().mean()):.0%} of its numbers"
        return WeightError(name, kind, relative, 0.0 if same else float("inf"), how)
    if kind not in FORMATS or stored.dim() != 2 or stored.shape[-1] % FORMATS[kind].block:
        return WeightError(name, kind, relative, None)
    grid = FORMATS[kind]
    ratios = _ratios(mine, stored, grid)
    worst = float(ratios.max())
    how = "" if worst <= 1 else _how(name, mine, stored, grid, checkpoint)
    return WeightError(name, kind, relative, worst, how)


def _ratios(mine: Tensor, stored: Tensor, grid: Format) -> Tensor:
    """Rms error of each block over what the format allows there, (row, block), of weights (row, column)."""
    error = (mine - stored).reshape(len(stored), -1, grid.block).square().mean(-1).sqrt()
    return error / _allowed(stored, grid)


def _allowed(stored: Tensor, grid: Format) -> Tensor:
    """The rms error that each block may have, (row, block), of weights (row, column)."""
    blocks = stored.reshape(len(stored), -1, grid.block)
    low = blocks.amin(-1).clamp_max(0).neg() if grid.ranged else torch.zeros(blocks.shape[:2])
    extent = blocks.amax(-1).clamp_min(0) + low if grid.ranged else blocks.abs().amax(-1)
    allowed = extent / grid.steps
    if grid.scales and not stored.shape[-1] % _SUPER:
        # A step rounded to `scales` parts of the largest is off by half of one, which the largest number feels most.
        together = _SUPER // grid.block
        largest = (extent + low).reshape(len(stored), -1, together).amax(-1) / (2 * grid.scales)
        allowed = allowed + largest.repeat_interleave(together, -1)
    return grid.allowed * allowed + _TINY * grid.steps


# -- what happened -------------------------------------------------------------------------------------------


def _how(name: str, mine: Tensor, stored: Tensor, grid: Format, checkpoint: Checkpoint) -> str:
    """What happened to a tensor that is further off than its format allows, in words, as far as it can be told."""
    bad = _ratios(mine, stored, grid) > 1
    rows = bad.any(-1).nonzero().flatten().tolist()
    where = f"{int(bad.sum())} of {bad.numel()} blocks, in {len(rows)} of {len(bad)} rows, first in row {rows[0]}"
    if len(rows) > len(bad) / 2:
        twin = _twin(name, mine, grid, checkpoint)
        if twin:
            return f"it holds {twin}"
    row = rows[0]
    block = int(bad[row].nonzero()[0])
    told = _other_row(row, mine, stored, grid) or _in_row(row, block, mine, stored, grid)
    return f"{told}; wrong are {where}" if told else f"wrong are {where}"


def _twin(name: str, mine: Tensor, grid: Format, checkpoint: Checkpoint) -> str:
    """The tensor of the checkpoint that these numbers are of."""
    for other, stored in _stored(checkpoint):
        if other != name and stored.shape == mine.shape and bool((_ratios(mine, stored, grid) <= 1).all()):
            return other
    return ""


def _other_row(row: int, mine: Tensor, stored: Tensor, grid: Format) -> str:
    nearest = int((stored - mine[row]).square().sum(-1).argmin())
    fits = nearest != row and bool((_ratios(mine[row : row + 1], stored[nearest : nearest + 1], grid) <= 1).all())
    return f"row {row} holds row {nearest}" if fits else ""


def _in_row(row: int, block: int, mine: Tensor, stored: Tensor, grid: Format) -> str:
    """What happened to one block of a row: it is another one, or in another order, or its scale is wrong."""
    allowed = _allowed(stored[row : row + 1], grid)[0]
    theirs = stored[row].reshape(-1, grid.block)
    found = mine[row].reshape(-1, grid.block)[block]

    def off(expected: Tensor, at: int) -> bool:
        return float((found - expected).square().mean().sqrt()) > float(allowed[at])

    nearest = int((theirs - found).square().sum(-1).argmin())
    if nearest != block and not off(theirs[nearest], nearest):
        return f"block {block} of row {row} holds block {nearest}"
    halves = theirs[block].reshape(2, -1)
    for order, about in (
        (halves.T.reshape(-1), "has its halves interleaved"),
        (theirs[block].reshape(-1, 2).T.reshape(-1), "has its pairs taken apart"),
        (halves.flip(0).reshape(-1), "has its halves exchanged"),
        (theirs[block].flip(0), "is reversed"),
    ):
        if not off(order, block):
            return f"block {block} of row {row} {about}"
    scale = float((found * theirs[block]).sum() / theirs[block].square().sum())
    rest = float((found - scale * theirs[block]).square().mean().sqrt())
    fits = rest <= max(abs(scale), 1.0) * float(allowed[block])
    return (
        f"the scale of block {block} of row {row} is {scale:.2g} times too large"
        if fits and scale > 1
        else (f"the scale of block {block} of row {row} is {scale:.2g} of what it should be" if fits else "")
    )
