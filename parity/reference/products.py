"""Logits that are never whole: the last matrix product of a pass, its rows computed when they are asked for.

A vocabulary is large: of 2048 tokens and 152 thousand words, logits in float32 are 1.2 GB, and a replay has several of
them. The working dtype's are computed at once, because their bits are the reference's answer; those in the precision
of the truth only serve sums over rows, and a row of a product depends on no other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from parity.reference.batch import Batch
from parity.reference.pieces import PiecewiseModel
from parity.sites import without_call

# Logits of fewer numbers are computed at once: 256 MB in float32.
LARGE = 1 << 26


@dataclass(frozen=True)
class Product:
    """inputs (…, features) times weight (width, features), plus bias (width) if there is one: (…, width), unborn.

    A slice of the rows (n, width) of a flattened one is a tensor.
    """

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Its sizes, as if it were a tensor."""
        return torch.Size((*self.inputs.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its numbers."""
        return self.inputs.dtype

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.inputs.device

    def numel(self) -> int:
        """How many numbers it has."""
        return self.shape.numel()

    def flatten(self, _first: int = 0, _last: int = -2) -> Product:
        """The same with rows (n, width)."""
        return Product(self.inputs.flatten(0, -2), self.weight, self.bias)

    def rows(self, which: Tensor) -> Product:
        """Some rows (n, width): those where `which` (…) is true."""
        return Product(self.inputs[which.to(self.inputs.device)], self.weight, self.bias)

    def __getitem__(self, rows: slice) -> Tensor:
        return linear(self.inputs[rows], self.weight, self.bias)


Values = Tensor | Product
"""The activation of a pass: a tensor, or logits whose rows are computed when they are asked for."""


V = TypeVar("V", Tensor, Product, Values)


def rows_of(value: V, which: Tensor) -> V:
    """Of a value (…, width) the rows (n, width) where `which` (…) is true."""
    return value.rows(which) if isinstance(value, Product) else value[which.to(value.device)]


class _WithheldError(Exception):
    """Ends a pass before its last product."""


def withholds(model: PiecewiseModel, input_ids: Tensor | Batch) -> bool:
    """Whether the logits of token ids (b, t) are large, and nothing but a matrix product makes them."""
    last = model.sites[-1]
    module = model.model.get_submodule(last.module)
    once = sum(site.module == last.module and site.where == last.where for site in model.sites) == 1
    is_product = type(module).forward is nn.Linear.forward and last.where == "output"
    large = is_product and input_ids.numel() * int(module.out_features) > LARGE
    return large and once and last.name == without_call(last.name)


def run_to_product(model: PiecewiseModel, run: Callable[[], object]) -> Product:
    """What the last product of a pass would give; `run()` starts the pass, which ends before it."""
    module = model.model.get_submodule(model.sites[-1].module)
    taken: list[Tensor] = []

    def withhold(inputs: Tensor) -> Tensor:
        taken.append(inputs)
        raise _WithheldError

    module.forward = withhold
    try:
        with suppress(_WithheldError):
            run()
    finally:
        del module.forward
    bias = module.bias
    return Product(taken[0], module.weight.detach(), None if bias is None else bias.detach())
