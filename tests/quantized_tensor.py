"""A tensor class such as quantizing libraries have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Int8(torch.Tensor):
    """A weight as torchao keeps it: integers, and a scale for each row."""

    qdata: Tensor
    scale: Tensor
    block_size: list[int]

    @staticmethod
    def of(weight: Tensor, *, factor: float = 1.0, coarser: float = 1.0) -> Int8:
        """A weight with all scales `factor` times too large, or with larger steps."""
        scale = weight.abs().amax(-1, keepdim=True) / 127 * coarser
        whole = (weight / scale).round()
        made = (whole * scale * factor).as_subclass(Int8)
        made.qdata, made.scale, made.block_size = whole.to(torch.int8), scale * factor, [1, weight.shape[-1]]
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.equal, torch.Tensor.ne, torch.Tensor.to):
            raise NotImplementedError(func)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if func is torch.Tensor.detach:
            found = found.as_subclass(cls)
            found.qdata, found.scale, found.block_size = args[0].qdata, args[0].scale, args[0].block_size
        return found

    def dequantize(self) -> Tensor:
        return self.qdata.float() * self.scale
