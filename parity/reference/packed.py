"""Integers of a few bits, packed into bytes."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 1 << 22  # bytes: their bits take eight times as much


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """The integers (row, n) of `bits` bits in bytes (row, m) of uint8, lowest bits first; spare bits are dropped."""
    if bits == 8:
        return packed
    if not packed.numel():
        return packed.new_empty(len(packed), packed.shape[-1] * 8 // bits)
    step = max(1, _AT_ONCE // packed.shape[-1])
    return torch.cat([_unpacked(packed[start : start + step], bits) for start in range(0, len(packed), step)])


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    single = packed[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    count = packed.shape[-1] * 8 // bits
    grouped = single.reshape(len(packed), -1)[:, : count * bits].reshape(len(packed), count, bits)
    return (grouped << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
