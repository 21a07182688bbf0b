"""Rotary position embeddings: right angles in the wrong numbers."""

from __future__ import annotations

import torch

from parity.faults.fault import Change, Fault, Scope, fault
from parity.faults.patches.numbers import stored_as
from parity.faults.patches.rope import (
    ROTATED,
    frequencies,
    has_rope,
    tables,
    with_tables,
)


def _phases_in(scope: Scope, dtype: torch.dtype) -> Change:
    return with_tables(scope, tables(scope, *frequencies(scope), store=lambda x: stored_as(x, dtype)))


@fault(
    id="rope-phase-bf16",
    title="RoPE's angles are computed in bfloat16; the reference computes them in float32",
    sites=ROTATED,
    fix="compute positions times frequencies, cosine and sine in float32 and cast only the tables",
    source="candle#3005",
    needs="some dozens of tokens",
    applies=has_rope,
)
def rope_phase_bf16(scope: Scope) -> Change:
    return _phases_in(scope, torch.bfloat16)


@fault(
    id="rope-phase-fp16",
    title="RoPE's angles are computed in float16; the reference computes them in float32",
    sites=ROTATED,
    fix="compute positions times frequencies, cosine and sine in float32 and cast only the tables",
    needs="some hundred tokens, or float32",
    applies=has_rope,
)
def rope_phase_fp16(scope: Scope) -> Change:
    return _phases_in(scope, torch.float16)


@fault(
    id="rope-inv-freq-bf16",
    title="RoPE's frequencies are rounded to bfloat16, as model.to(bfloat16) does to a buffer",
    sites=ROTATED,
    fix="keep inv_freq in float32 when the model is cast",
    source="transformers#25681",
    needs="some hundred tokens, or float32",
    applies=has_rope,
)
def rope_inv_freq_bf16(scope: Scope) -> Change:
    angles, factor = frequencies(scope)
    return with_tables(scope, tables(scope, stored_as(angles, torch.bfloat16), factor))


@fault(
    id="rope-tables-bf16",
    title="RoPE's cosines and sines are rounded to bfloat16 in a model of higher precision",
    sites=ROTATED,
    fix="keep the tables in the dtype of the model",
    needs="float32, or a reference that keeps its tables there",
    applies=has_rope,
)
def rope_tables_bf16(scope: Scope) -> Change:
    cos, sin = tables(scope, *frequencies(scope))
    return with_tables(scope, (stored_as(cos, torch.bfloat16), stored_as(sin, torch.bfloat16)))


FAULTS: tuple[Fault, ...] = (
    rope_phase_bf16,
    rope_phase_fp16,
    rope_inv_freq_bf16,
    rope_tables_bf16,
)
