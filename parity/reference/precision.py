"""Higher precision than the model's author asked for.

transformers keeps islands of float32 in every dtype: RMSNorm, softmax and RoPE tables cast to float32
explicitly, so a model moved to float64 still rounds there. `promoted` turns those casts into casts to
float64, and the stock model into a true float64 oracle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Bits of precision, the implicit one included: a unit in the last place of x is 2**(exponent(x) - bits).
PRECISION_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def truth_dtype(working: torch.dtype) -> torch.dtype:
    """A dtype whose own rounding does not matter beside that of the working dtype."""
    return torch.float64 if working in (torch.float32, torch.float64) else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest: 2**-bits."""
    return float(2.0 ** -PRECISION_BITS[dtype])


@contextmanager
def promoted(dtype: torch.dtype) -> Iterator[None]:
    """Where `dtype` is float64, every cast to a narrower float in the block becomes one to float64."""
    if dtype is not torch.float64:
        yield
        return
    with _Promote():  # type: ignore[no-untyped-call]
        yield


class _Promote(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def stochastically_rounded(value: torch.Tensor, working: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """`value` rounded to a neighbour in `working`, up or down with the odds of their distances; its dtype stays."""
    _, exponent = torch.frexp(value)
    ulp = torch.ldexp(torch.ones_like(value), exponent - PRECISION_BITS[working])
    draw = torch.rand(value.shape, generator=generator, device=value.device, dtype=value.dtype)
    return torch.where(value.isfinite() & (value != 0), torch.floor(value / ulp + draw) * ulp, value)


def jittered(value: torch.Tensor, working: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """`value` moved by less than the rounding to `working` that it may have gone through.

    Each element moves by a uniform draw from ±½ unit in the last place of `working`: an operation fused
    with the one before it may have seen any of these numbers before they were rounded.
    """
    _, exponent = torch.frexp(value)
    ulp = torch.ldexp(torch.ones_like(value), exponent - PRECISION_BITS[working])
    draw = torch.rand(value.shape, generator=generator, device=value.device, dtype=value.dtype) - 0.5
    return torch.where(value == 0, value, value + draw * ulp)
