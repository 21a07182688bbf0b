"""Ways in which a matrix product may be summed and rounded, done number by number: which of them gives these bits?

A product of a row of inputs and a row of weights is a sum of K terms. Engines take it in lanes, in blocks, with each
term rounded or fused into the addition, and round to the dtype of the model at the end, after each block or after
each term. All of that is done here in float32 as the engine would, so that the right way gives its very bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from parity.record.arrays import to_torch

Singles = NDArray[np.float32]
_LANES = (1, 4, 8, 16, 32, 64)
_BLOCKS = (8, 16, 32, 64, 128, 192, 256, 320, 384, 512, 1024)
_PARTS = (2, 4, 8, 16)
_MOST = 1 << 24
"""Terms that are kept in memory: of large products only some numbers are tried."""
_OUTPUTS = 1 << 22
"""Numbers of the rows that they are taken from, which torch computes whole."""


@dataclass(frozen=True)
class Order:
    """How K terms are summed: in blocks of so many (0: all at once), in each of them in so many lanes.

    fused   a term is not rounded before it is added (a multiply-add)
    halves  lanes are added halves to halves, in place of one after another
    """

    lanes: int = 1
    block: int = 0
    fused: bool = False
    halves: bool = False

    def __str__(self) -> str:
        lanes = "one after another" if self.lanes == 1 else f"in {self.lanes} lanes"
        halves = " added halves to halves" if self.halves else ""
        block = f", in blocks of {self.block}" if self.block else ""
        return f"sums {lanes}{halves}{block}{', with fused multiply-adds' if self.fused else ''}"


def orders(terms: int, *, exact_terms: bool) -> Iterator[Order]:
    """The orders that sums of so many terms are tried in; `exact_terms` need no multiply-add to be exact."""
    for fused in (False,) if exact_terms else (False, True):
        for block in (0, *(block for block in _BLOCKS if block < terms)):
            for lanes in _LANES:
                if lanes <= (block or terms):
                    yield Order(lanes, block, fused)
                    if lanes > 1:
                        yield Order(lanes, block, fused, halves=True)


def summed(x: Singles, w: Singles, order: Order) -> Singles:
    """Sums (p,) of the products of inputs x and weights w (p, k), in float32, in one order."""
    size = order.block or x.shape[1]
    steps = -(-size // order.lanes)
    x, w = (_in_lanes(values, size, steps, order.lanes) for values in (x, w))
    if order.fused:
        running = np.zeros((*x.shape[:2], order.lanes), np.float32)
        for step in range(steps):  # the product of two float32 is exact in float64
            exact = x[:, :, step].astype(np.float64) * w[:, :, step]
            running = (running + exact).astype(np.float32)
    else:
        running = np.add.accumulate(x * w, 2, np.float32)[:, :, -1]
    blocks = _halves(running) if order.halves else np.add.accumulate(running, 2, np.float32)[:, :, -1]
    found: Singles = np.add.accumulate(blocks, 1, np.float32)[:, -1]
    return found


def summed_low(x: Singles, w: Singles, block: int, dtype: torch.dtype) -> Tensor:
    """Sums (p,) of products (p, k) that are rounded to a narrow dtype after each block."""
    running = torch.zeros(len(x), dtype=dtype)
    for start in range(0, x.shape[1], block):
        part = summed(x[:, start : start + block], w[:, start : start + block], Order())
        running = (running.float() + to_torch(part)).to(dtype)
    return running


def _in_lanes(values: Singles, size: int, steps: int, lanes: int) -> Singles:
    """Terms (p, k) as (p, blocks, steps, lanes), filled up with zeros, which change no sum."""
    blocks = -(-values.shape[1] // size)
    values = np.pad(values, ((0, 0), (0, blocks * size - values.shape[1]))).reshape(len(values), blocks, size)
    return np.pad(values, ((0, 0), (0, 0), (0, steps * lanes - size))).reshape(len(values), blocks, steps, lanes)


def _halves(values: Singles) -> Singles:
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


@dataclass(frozen=True)
class Asked:
    """Some numbers of a product: inputs x (n, k), weights w (m, k), its bias (m,) or None, and which numbers.

    rows, columns  (p,) of each number; `found` (p,) what the candidate has there, in its dtype
    """

    x: Tensor
    w: Tensor
    bias: Tensor | None
    rows: Tensor
    columns: Tensor
    found: Tensor

    @classmethod
    def of(cls, x: Tensor, w: Tensor, bias: Tensor | None, found: Tensor, ours: Tensor) -> Asked:
        """All numbers of a product, or of a large one as many as fit, those first in which `found` is not `ours`.

        x (n, k), w (m, k), found and ours (n, m).
        """
        differing = found != ours
        worst = torch.argsort(differing.sum(1), descending=True, stable=True)[: max(_OUTPUTS // w.shape[0], 1)]
        x, found, differing = x[worst], found[worst], differing[worst].flatten()
        order = torch.argsort(differing.int(), descending=True, stable=True)[: max(_MOST // w.shape[1], 1)]
        rows, columns = order // w.shape[0], order % w.shape[0]
        kept, rows = torch.unique(rows, return_inverse=True)
        return cls(x[kept], w, bias, rows, columns, found.flatten()[order])

    def ways(self) -> Iterator[tuple[str, Tensor]]:
        """One way after another, and the numbers (p,) that it gives."""
        dtype = self.found.dtype
        for about, sums in self._sums():
            if self.bias is None:
                yield about, sums.to(dtype)
                continue
            bias = self.bias[self.columns]
            yield f"{about}, the bias added before rounding", (sums + bias.to(sums.dtype)).to(dtype)
            if dtype is not torch.float32:
                yield f"{about}, rounded before the bias is added", (sums.to(dtype) + bias).to(dtype)

    def _sums(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._by_library()
        x, w = (values[which].float().numpy() for values, which in ((self.x, self.rows), (self.w, self.columns)))
        narrow = self.found.dtype is not torch.float32
        yield "sums in float64, rounded once", to_torch(np.einsum("pk,pk->p", x, w, dtype=np.float64))
        for order in orders(x.shape[1], exact_terms=narrow):
            yield str(order), to_torch(summed(x, w, order))
        if narrow:
            name = str(self.found.dtype).removeprefix("torch.")
            for block in (1, *(block for block in _BLOCKS if block < x.shape[1])):
                after = "every term" if block == 1 else f"every block of {block} terms"
                yield f"sums rounded to {name} after {after}", summed_low(x, w, block, self.found.dtype)

    def _by_library(self) -> Iterator[tuple[str, Tensor]]:
        x, w = self.x, self.w

        def some(values: Tensor) -> Tensor:
            return values[self.rows, self.columns]

        if x.dtype is not torch.float32:
            yield "torch's product of float32 copies", some(linear(x.float(), w.float()))
        yield "torch's product of one row at a time", some(torch.cat([linear(row[None], w) for row in x]))
        wide = [values.float() for values in (x, w)]
        for parts in _PARTS:
            chunks = zip(*(values.chunk(parts, 1) for values in wide), strict=True)
            partial = [some(linear(*chunk)) for chunk in chunks]
            if len(partial) == parts:
                yield f"sums in {parts} parts of the inputs, added in float32", _one_by_one(partial)


def _one_by_one(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
