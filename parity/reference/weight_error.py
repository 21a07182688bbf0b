"""How far quantized weights are off the checkpoint, against what their format allows.

What is further off was not quantized but damaged: a wrong scale, order, row or tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from parity.quantization import WeightError
from parity.reference.checkpoint import Checkpoint
from parity.reference.grids import Grid


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
    if (kept := checkpoint.weights.as_kept(name, stored)) is not None:
        same = torch.equal(mine, kept)
        how = "" if same else f"differs in {float((mine != stored).float().mean()):.0%} of its numbers"
        return WeightError(name, kind, relative, 0.0 if same else float("inf"), how)
    grid = checkpoint.weights.grid(name)
    if grid is None or stored.dim() != 2:
        return WeightError(name, kind, relative, None)
    ratios = _ratios(mine, stored, grid)
    worst = float(ratios.max())
    how = "" if worst <= 1 else _how(name, mine, stored, grid, checkpoint)
    return WeightError(name, kind, relative, worst, how)


def _ratios(mine: Tensor, stored: Tensor, grid: Grid) -> Tensor:
    """Rms error of each block over what the format allows there, (row, block), of weights (row, column)."""
    return grid.blocks(mine - stored).square().mean(-1).sqrt() / grid.may_be_off(stored)


# -- what happened -------------------------------------------------------------------------------------------


def _how(name: str, mine: Tensor, stored: Tensor, grid: Grid, checkpoint: Checkpoint) -> str:
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


def _twin(name: str, mine: Tensor, grid: Grid, checkpoint: Checkpoint) -> str:
    """The tensor of the checkpoint that these numbers are of."""
    for other, stored in _stored(checkpoint):
        if other != name and stored.shape == mine.shape and bool((_ratios(mine, stored, grid) <= 1).all()):
            return other
    return ""


def _other_row(row: int, mine: Tensor, stored: Tensor, grid: Grid) -> str:
    nearest = int((stored - mine[row]).square().sum(-1).argmin())
    moved = mine.index_copy(0, torch.tensor([nearest]), mine[row : row + 1])
    fits = nearest != row and bool((_ratios(moved, stored, grid)[nearest] <= 1).all())
    return f"row {row} holds row {nearest}" if fits else ""


def _orders(block: Tensor) -> Iterator[tuple[Tensor, str]]:
    """A block in other orders, and what each is."""
    yield block.flip(0), "is reversed"
    if len(block) % 2 == 0:
        halves = block.reshape(2, -1)
        yield halves.T.reshape(-1), "has its halves interleaved"
        yield block.reshape(-1, 2).T.reshape(-1), "has its pairs taken apart"
        yield halves.flip(0).reshape(-1), "has its halves exchanged"


def _in_row(row: int, block: int, mine: Tensor, stored: Tensor, grid: Grid) -> str:
    """What happened to one block of a row: it is another one, or in another order, or its scale is wrong."""
    allowed = grid.may_be_off(stored)[row]
    theirs, found = grid.blocks(stored)[row], grid.blocks(mine)[row, block]

    def off(expected: Tensor, at: int) -> bool:
        return float((found - expected).square().mean().sqrt()) > float(allowed[at])

    nearest = int((theirs - found).square().sum(-1).argmin())
    if nearest != block and not off(theirs[nearest], nearest):
        return f"block {block} of row {row} holds block {nearest}"
    for order, about in _orders(theirs[block]):
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
