"""Between torch and numpy without changing a bit, bfloat16 and float8 included."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# torch and numpy have no such dtype in common: the bits travel as integers of the same size.
_FOREIGN: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}
_BACK = {np.dtype(there): (bits, here) for here, (bits, there) in _FOREIGN.items()}


def to_numpy(value: Tensor) -> NDArray[Any]:
    """The tensor's numbers as a numpy array; shares memory where the tensor is contiguous on the CPU.

    It may have any shape.
    """
    value = value.detach().cpu().contiguous()
    if value.dtype in _FOREIGN:
        bits, dtype = _FOREIGN[value.dtype]
        return value.view(bits).numpy().view(dtype)
    return value.numpy()


def to_torch(array: NDArray[Any]) -> Tensor:
    """The array's numbers as a tensor that may be written to. It may have any shape."""
    array = np.array(array, copy=True, order="C")
    if array.dtype in _BACK:
        bits, dtype = _BACK[array.dtype]
        integers = array.view(np.int16 if bits is torch.int16 else np.uint8)
        return torch.from_numpy(integers).view(dtype)
    return torch.from_numpy(array)
