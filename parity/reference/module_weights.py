"""What a library has quantized of a live torch module: parameters in a tensor class of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parity.record.tap import without_wrappers
from parity.reference.grids import Grid


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor (…) is of a library's own class, which may know no comparison of numbers."""
    return type(tensor) not in (Tensor, nn.Parameter)


class ModuleWeights:
    """The quantized parameters of a module by their names; the others must be the checkpoint's."""

    are_all = False

    def __init__(self, name: str, parameters: Mapping[str, Tensor]) -> None:
        self.name, self._parameters = name, parameters

    @classmethod
    def of(cls, name: str, module: nn.Module) -> ModuleWeights | None:
        """The weights of a module that has some quantized ones that can be read back; None for any other."""
        found = {
            without_wrappers(key): p.detach()
            for key, p in module.named_parameters(remove_duplicate=False)
            if is_quantized(p)
        }
        readable = all(type(p).dequantize is not Tensor.dequantize for p in found.values())
        return cls(name, found) if found and readable else None

    def format(self, name: str) -> str:
        """How a parameter is quantized (`int8/row`), by its name; empty for one that is not."""
        found = self._parameters.get(name)
        grid = self.grid(name)
        return "" if found is None else type(found).__name__ if grid is None else f"int8/{grid.block or 'row'}"

    def grid(self, name: str) -> Grid | None:
        """The grid of a parameter in torchao's int8: a scale for each row, or for each group of a row."""
        found: Any = self._parameters.get(name)
        block = getattr(found, "block_size", None)
        if getattr(getattr(found, "qdata", None), "dtype", None) is not torch.int8 or not block or block[0] != 1:
            return None
        return Grid(0 if block[-1] == found.shape[-1] else int(block[-1]), 127)

    def as_kept(self, name: str, stored: Tensor) -> None:
        """Nothing of `stored` numbers (…), for all of them are quantized."""

    def tensor(self, name: str) -> Tensor | None:
        """A quantized parameter read back to float32, (out, in); None for another."""
        found: Any = self._parameters.get(name)
        if found is None:
            return None
        plain: Tensor = found.dequantize()
        return plain.float().cpu()
