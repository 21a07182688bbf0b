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
_WIDE = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float64) | {
    torch.complex64: torch.complex128
}
# Integers of the same size, and the bits of the mantissa.
_EXPONENT = {torch.float32: (torch.int32, 23), torch.float64: (torch.int64, 52)}


def truth_dtype(working: torch.dtype) -> torch.dtype:
    """A dtype whose own rounding does not matter beside that of the working dtype."""
    return torch.float64 if working in (torch.float32, torch.float64) else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest: 2**-bits."""
    return float(2.0 ** -PRECISION_BITS[dtype])


@contextmanager
def promoted(dtype: torch.dtype) -> Iterator[None]:
    """Where `dtype` is float64, every operation in the block is done in float64, however its file spells a cast.

    A cast to a narrower float becomes one to float64, a new tensor is one of float64 unless its numbers are no
    floats, and a narrower tensor from outside is widened where it is used.
    """
    if dtype is not torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Promote():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)


class _Promote(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _WIDE:
            kwargs["dtype"] = _WIDE[kwargs["dtype"]]
        if not func.is_view and not func._schema.is_mutable:
            args = _widened(args)
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(_WIDE[value.dtype]) if value.dtype in _WIDE else value
    return type(value)(map(_widened, value)) if type(value) in (list, tuple) else value


def stochastically_rounded(value: torch.Tensor, working: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """`value` rounded to a neighbour in `working`, up or down with the odds of their distances; its dtype stays.

    `value` may have any shape.
    """
    ulp = _ulp(value, working, least=1)
    draw = torch.rand(value.shape, generator=generator, device=value.device, dtype=value.dtype)
    return torch.floor(value / ulp + draw) * ulp


def jittered(value: torch.Tensor, working: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """`value` moved by less than the rounding to `working` that it may have gone through.

    Each element moves by a uniform draw from ±½ unit in the last place of `working`: an operation fused
    with the one before it may have seen any of these numbers before they were rounded. `value` may have any shape.
    """
    draw = torch.rand(value.shape, generator=generator, device=value.device, dtype=value.dtype).sub_(0.5)
    return draw.mul_(_ulp(value, working, least=0)).add_(value)


def _ulp(value: torch.Tensor, working: torch.dtype, least: int) -> torch.Tensor:
    """The unit in the last place of `working` at each number, read off its exponent; finite even at what is not.

    Below the smallest normal number it is that of exponent `least`, 0 being a unit of zero.
    """
    bits, mantissa = _EXPONENT[value.dtype]
    exponents = torch.iinfo(bits).max >> mantissa
    # Plain arithmetic on bits: frexp, where and comparisons take twenty times as long on a CPU.
    exponent = (value.view(bits) >> mantissa).bitwise_and_(exponents).clamp_(least, exponents - 1)
    return (exponent << mantissa).view(value.dtype).mul_(2.0 ** (1 - PRECISION_BITS[working]))
