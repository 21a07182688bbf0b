"""Norms on queries and keys: left out, too late, over the wrong numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import Fault, Scope
from parity.faults.norm_changes import QK, adds_one, each, eps_of, exchangeable, exchanged, left_out, rms_norms
from parity.faults.parts import forward, head_dim_of, kv_heads_of, plain, together, wide
from parity.faults.tables import has_rope, original_rotation, with_rotation

Change = AbstractContextManager[None]


def heads_of(scope: Scope, name: str) -> int:
    """Heads that the norm of this name sees."""
    return int(scope.config.num_attention_heads) if name.endswith("q_norm") else kv_heads_of(scope)


def head_axis(x: Tensor, heads: int) -> int:
    """Where the heads of x (b, t, h, d) or (b, h, t, d) are."""
    if x.shape[1] == x.shape[2] == heads:
        # A view of a projection has its heads behind the tokens; transposed, it is no longer contiguous.
        return 2 if x.is_contiguous() else 1
    return 2 if x.shape[2] == heads else 1


def per_head_norms(scope: Scope) -> dict[str, Any]:
    """QK-norms with one weight for each number of a head."""
    return {n: m for n, m in rms_norms(scope, QK).items() if m.weight.numel() == head_dim_of(scope)}


def _over_heads(scope: Scope) -> dict[str, Any]:
    """QK-norms with one weight for each number of all heads."""
    return {n: m for n, m in rms_norms(scope, QK).items() if m.weight.numel() > head_dim_of(scope)}


def _joint(scope: Scope) -> Change:
    def compute(norm: Any, heads: int, x: Tensor) -> Tensor:
        up = x.to(wide(x.dtype))
        square = up.pow(2).mean((head_axis(x, heads), 3), keepdim=True)
        unit = up * torch.rsqrt(square + eps_of(norm))
        factor = norm.weight.to(unit.dtype) + (1.0 if adds_one(norm) else 0.0)
        out: Tensor = (unit * factor).to(x.dtype)
        return out

    return together(
        *(forward(norm, partial(compute, norm, heads_of(scope, name))) for name, norm in per_head_norms(scope).items())
    )


def _separate(scope: Scope) -> Change:
    def compute(norm: Any, x: Tensor) -> Tensor:
        up = x.to(wide(x.dtype)).reshape(*x.shape[:-1], -1, head_dim_of(scope))
        unit = up * torch.rsqrt(up.pow(2).mean(-1, keepdim=True) + eps_of(norm))
        out: Tensor = (unit.flatten(-2) * norm.weight.to(unit.dtype)).to(x.dtype)
        return out

    return together(*(forward(norm, partial(compute, norm)) for norm in _over_heads(scope).values()))


def _after_rope(scope: Scope) -> Change:
    """The norm rotates what it is given and normalizes that; where RoPE was, nothing happens any more."""
    rotate = original_rotation(scope)

    def turned(x: Tensor, heads: int) -> Tensor:
        cos, sin = scope.kwargs["position_embeddings"]
        split = x if x.ndim == 4 else x.reshape(*x.shape[:-1], heads, -1)
        where = 1 if x.ndim == 4 and head_axis(x, heads) == 1 else 2
        return rotate(split, split, cos, sin, unsqueeze_dim=where)[0].reshape(x.shape)

    def of(norm: Any, heads: int) -> Callable[[Tensor], Tensor]:
        plain_forward = norm.forward
        return lambda x: plain_forward(turned(x, heads))

    changes = [forward(norm, of(norm, heads_of(scope, name))) for name, norm in rms_norms(scope, QK).items()]
    return together(*changes, with_rotation(scope, lambda q, k, *_a, **_k: (q.clone(), k.clone())))


FAULTS: tuple[Fault, ...] = (
    Fault(
        "qk-norm-skipped",
        "no norm on queries and keys",
        QK,
        "normalize each head of q and k after the projection and before RoPE, in decoding as well",
        "aprender#2085",
        "two tokens or more",
        plain(each(QK, left_out)),
        lambda s: bool(rms_norms(s, QK)),
    ),
    Fault(
        "qk-norm-after-rope",
        "queries and keys are normalized after RoPE; the reference does so before",
        (*QK, "q_rope", "k_rope"),
        "apply q_norm and k_norm before the rotation",
        "torchtune#2809",
        "two tokens or more, and norm weights that are not all equal",
        plain(_after_rope),
        lambda s: bool(rms_norms(s, QK)) and has_rope(s),
    ),
    Fault(
        "qk-norm-joint",
        "QK-norm runs over all heads together; the reference normalizes each head",
        QK,
        "take the mean square over head_dim alone",
        "vllm#16311",
        "",
        plain(_joint),
        lambda s: bool(per_head_norms(s)),
    ),
    Fault(
        "qk-norm-separate",
        "QK-norm runs over each head; the reference normalizes all heads together",
        QK,
        "take the mean square over all heads, across devices if they are split",
        "",
        "",
        plain(_separate),
        lambda s: bool(_over_heads(s)),
    ),
    Fault(
        "qk-norm-exchanged",
        "the weights of q_norm and k_norm change places",
        QK,
        "q_norm belongs to the queries, k_norm to the keys",
        "",
        "norm weights that differ",
        plain(exchanged(*QK)),
        exchangeable(*QK),
    ),
)
