"""Weights: right numbers misread, rounded or quantized."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parity.faults.fault import Change, Fault, Scope, fault
from parity.faults.patches.modules import linears_of
from parity.faults.patches.numbers import as_written, stored_as, truncated
from parity.faults.patches.weight import LINEARS, each, has_linears


def _as_float16(w: Tensor) -> Tensor:
    """The bits of bfloat16 numbers taken for float16."""
    return w.to(torch.bfloat16).contiguous().view(torch.float16)


@fault(
    id="weight-read-as-fp16",
    title="the bits of a bfloat16 weight are read as float16",
    sites=LINEARS,
    fix="mind the dtype in the header of the file: both have two bytes",
    source="llama.cpp#1473",
    applies=has_linears,
)
def weight_read_as_fp16(scope: Scope) -> Change:
    return each(scope, _as_float16)


def _storage(w: Tensor) -> torch.dtype:
    """The narrowest dtype that holds a weight exactly: what the checkpoint stores it in."""
    return next((d for d in (torch.bfloat16, torch.float16) if torch.equal(w.to(d).to(w.dtype), w)), torch.float32)


def _bytes_swapped(w: Tensor) -> Tensor:
    """The bytes of each stored number in reverse."""
    stored = w.to(_storage(w)).contiguous()
    size = stored.element_size()
    swapped = stored.view(torch.uint8).reshape(*stored.shape, size).flip(-1).contiguous()
    return swapped.view(stored.dtype).reshape(w.shape)


@fault(
    id="weight-bytes-swapped",
    title="the bytes of the weight are in the wrong order",
    sites=LINEARS,
    fix="read the file as little-endian",
    source="safetensors#307",
    applies=has_linears,
)
def weight_bytes_swapped(scope: Scope) -> Change:
    return each(scope, _bytes_swapped)


def _is_finer_than(dtype: torch.dtype) -> Callable[[Scope], bool]:
    """Whether the checkpoint holds numbers that `dtype` does not."""

    def test(scope: Scope) -> bool:
        with as_written():
            return any(_storage(m.weight.data) != dtype for m in linears_of(scope).values())

    return test


@fault(
    id="weight-truncated-bf16",
    title="the float32 weight is cut to bfloat16 by dropping its low bits",
    sites=LINEARS,
    fix="round to nearest even when converting",
    needs="a float32 checkpoint",
    applies=_is_finer_than(torch.bfloat16),
)
def weight_truncated_bf16(scope: Scope) -> Change:
    return each(scope, truncated)


@fault(
    id="weight-rounded-bf16",
    title="the float32 weight is rounded to bfloat16",
    sites=LINEARS,
    fix="keep the weight in the dtype of the checkpoint, or run the reference in bfloat16 as well",
    needs="a float32 checkpoint",
    applies=_is_finer_than(torch.bfloat16),
)
def weight_rounded_bf16(scope: Scope) -> Change:
    return each(scope, lambda w: stored_as(w, torch.bfloat16))


def _int8_by_rows(w: Tensor) -> Tensor:
    """Rounded to whole steps, 127 of them up to the largest number of each row."""
    # In float32 as in the wild: where a weight lies halfway, the rounding of the quotient decides.
    w = w.float()
    step = w.abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, (w / step).round() * step, w)


@fault(
    id="weight-int8",
    title="the weight is in 8-bit integers, one step for each row",
    sites=LINEARS,
    fix="load the weight unquantized, or compare with a reference that is quantized as well",
    applies=has_linears,
)
def weight_int8(scope: Scope) -> Change:
    return each(scope, _int8_by_rows)


def _fp8_by_rows(w: Tensor) -> Tensor:
    """float8 e4m3 with one step for each row, as most 8-bit checkpoints have it."""
    w = w.float()
    step = w.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
    return (w / step).to(torch.float8_e4m3fn).float() * step


@fault(
    id="weight-fp8",
    title="the weight is in float8 (e4m3), one step for each row",
    sites=LINEARS,
    fix="load the weight unquantized, or compare with a reference that is quantized as well",
    applies=has_linears,
)
def weight_fp8(scope: Scope) -> Change:
    return each(scope, _fp8_by_rows)


def _int8_by_blocks(w: Tensor) -> Tensor:
    """As GGUF's Q8_0: blocks of 32 along a row, each with a step of its own, kept in float16."""
    blocks = w.float().reshape(w.shape[0], -1, 32)
    step = (blocks.abs().amax(-1, keepdim=True) / 127).to(torch.float16).float()
    return torch.where(step > 0, (blocks / step).round() * step, blocks).flatten(-2)


def _fits_blocks(scope: Scope) -> bool:
    """Whether every row is a number of whole blocks."""
    return has_linears(scope) and all(m.weight.shape[-1] % 32 == 0 for m in linears_of(scope).values())


@fault(
    id="weight-8bit-blocks",
    title="the weight is in 8-bit integers by blocks of 32, as GGUF's Q8_0",
    sites=LINEARS,
    fix="load the weight unquantized, or compare with a reference that is quantized as well",
    applies=_fits_blocks,
)
def weight_8bit_blocks(scope: Scope) -> Change:
    return each(scope, _int8_by_blocks)


FAULTS: tuple[Fault, ...] = (
    weight_read_as_fp16,
    weight_bytes_swapped,
    weight_truncated_bf16,
    weight_rounded_bf16,
    weight_int8,
    weight_fp8,
    weight_8bit_blocks,
)
