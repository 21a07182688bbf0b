"""What engines of quantized weights do to the inputs of products: they round them to what the weight's kernel takes.

llama.cpp multiplies a Q4_0, Q5_0 or Q8_0 weight by inputs in Q8_0, a K-quant by inputs in Q8_K and an F16 weight by
inputs in float16; sums are float32. So these are regimes: right by design, and provable to the last rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from parity.faults.fault import Change, Fault, Scope, fault
from parity.faults.patches.modules import forward, linears_of, together
from parity.faults.patches.numbers import as_written, stored_as
from parity.faults.patches.weight import LINEARS, has_linears


def _inputs_as(scope: Scope, store: Callable[[Tensor], Tensor]) -> Change:
    """Every linear module takes `store(x)`, x (…, i) to the same."""
    return together(
        *(forward(m, lambda x, m=m: F.linear(store(x), m.weight, m.bias)) for m in linears_of(scope).values())
    )


def _whole_blocks(size: int) -> Callable[[Scope], bool]:
    """Whether every row of inputs is a number of whole blocks."""
    return lambda scope: has_linears(scope) and all(m.in_features % size == 0 for m in linears_of(scope).values())


@fault(
    id="products-fp16-inputs",
    title="matrix products take their inputs in float16 and sum in float32",
    sites=LINEARS,
    fix="keep inputs in float32 (llama.cpp: a GGUF in F32), or accept it",
    source="llama.cpp: a product with an F16 weight rounds the other operand to F16",
    needs="float32",
    applies=has_linears,
    regime=True,
)
def products_fp16_inputs(scope: Scope) -> Change:
    return _inputs_as(scope, lambda x: stored_as(x, torch.float16))


def in_q8_0(x: Tensor) -> Tensor:
    """x (…, i) in ggml's Q8_0: blocks of 32, integers up to 127 by a step that is kept in float16."""
    with as_written():
        blocks = x.float().reshape(*x.shape[:-1], -1, 32)
        largest = blocks.abs().amax(-1, keepdim=True)
        step = (largest / 127).to(torch.float16).float()
        # The integers are made with the step as it was before it was rounded.
        whole = torch.where(largest > 0, blocks * (127 / largest), 0).round()
        return (whole * step).reshape(x.shape).to(x.dtype)


@fault(
    id="products-q8-0-inputs",
    title="matrix products take their inputs in 8-bit blocks of 32 (ggml's Q8_0)",
    sites=LINEARS,
    fix="accept it, or keep inputs in float32: llama.cpp does so only with weights in F32",
    source="llama.cpp: a product with a weight in Q4_0, Q5_0 or Q8_0 takes Q8_0",
    needs="float32",
    applies=_whole_blocks(32),
    regime=True,
)
def products_q8_0_inputs(scope: Scope) -> Change:
    return _inputs_as(scope, in_q8_0)


def _in_q8_k(x: Tensor) -> Tensor:
    """ggml's Q8_K: blocks of 256, the number that is largest without its sign becomes -127; the step is float32."""
    with as_written():
        blocks = x.float().reshape(*x.shape[:-1], -1, 256)
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        inverse = torch.where(largest != 0, -127 / largest, 0)
        whole = (inverse * blocks).round().clamp_max(127)
        return torch.where(largest != 0, whole * (1 / inverse), 0).reshape(x.shape).to(x.dtype)


@fault(
    id="products-q8-k-inputs",
    title="matrix products take their inputs in 8-bit blocks of 256 (ggml's Q8_K)",
    sites=LINEARS,
    fix="accept it, or keep inputs in float32: llama.cpp does so only with weights in F32",
    source="llama.cpp: a product with a K-quant takes Q8_K",
    needs="float32",
    applies=_whole_blocks(256),
    regime=True,
)
def products_q8_k_inputs(scope: Scope) -> Change:
    return _inputs_as(scope, _in_q8_k)


def _in_uint8(x: Tensor) -> Tensor:
    """x (b, …, i), each prompt of it in 256 steps from its least number to its largest, both counted from zero."""
    with as_written():
        numbers, inner = x.float(), tuple(range(1, x.dim()))
        low, high = numbers.amin(inner, keepdim=True).clamp_max(0), numbers.amax(inner, keepdim=True).clamp_min(0)
        step = (high - low) / 255
        zero = (-low / step).round()
        whole = ((numbers / step).round() + zero).clamp(0, 255)
        return torch.where(step > 0, (whole - zero) * step, 0).to(x.dtype)


@fault(
    id="products-uint8-inputs",
    title="matrix products take their inputs in 8 bits, with one step for all tokens of a prompt",
    sites=LINEARS,
    fix="accept it, or quantize weights only: with one step for all, a large number of one token costs all others",
    source="ONNX Runtime: quantize_dynamic puts DynamicQuantizeLinear before a product",
    needs="float32",
    applies=has_linears,
    regime=True,
)
def products_uint8_inputs(scope: Scope) -> Change:
    return _inputs_as(scope, _in_uint8)


def _in_int8_rows(x: Tensor) -> Tensor:
    """x (…, i), each row of it in whole numbers of 2/255 of its largest."""
    with as_written():
        numbers = x.float()
        step = (numbers.abs().amax(-1, keepdim=True) / 127.5).clamp_min(torch.finfo(torch.float32).eps)
        return ((numbers * (1 / step)).round().clamp(-128, 127) * step).to(x.dtype)


@fault(
    id="products-int8-rows",
    title="matrix products take their inputs in 8 bits, with a step for each token",
    sites=LINEARS,
    fix="accept it, or quantize weights only",
    source="torchao: Int8DynamicActivationInt8WeightConfig",
    needs="float32",
    applies=has_linears,
    regime=True,
)
def products_int8_rows(scope: Scope) -> Change:
    return _inputs_as(scope, _in_int8_rows)


FAULTS: tuple[Fault, ...] = (
    products_fp16_inputs,
    products_q8_0_inputs,
    products_q8_k_inputs,
    products_uint8_inputs,
    products_int8_rows,
)
