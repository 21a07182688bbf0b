"""Numbers as other formats would hold them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that careful code computes in where the model works in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def as_written() -> Iterator[None]:
    """Casts in the block do what they say, even where the truth is being computed in higher precision."""
    with _disable_current_modes():
        yield


def stored_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x`, of any shape, after a round trip through `dtype`, in its own dtype."""
    with as_written():
        return x.to(dtype).to(x.dtype)


def truncated(x: Tensor) -> Tensor:
    """`x`, of any shape, cut to bfloat16 by dropping the low 16 bits of its float32, in its own dtype."""
    with as_written():
        bits = x.to(torch.float32).contiguous().view(torch.int32)
        return (bits & -65536).view(torch.float32).to(x.dtype)


def rounded(x: Tensor, bits: int) -> Tensor:
    """`x`, of any shape, rounded to `bits` significant bits, the implicit one included; ties away from zero.

    So does the instruction that makes TF32 of float32 (cvt.rna).
    """
    with as_written():
        mantissa, exponent = torch.frexp(x.to(torch.float64))
        away = torch.trunc(mantissa * 2.0**bits + torch.copysign(torch.full_like(mantissa, 0.5), mantissa))
        return torch.ldexp(away, exponent - bits).to(x.dtype)
