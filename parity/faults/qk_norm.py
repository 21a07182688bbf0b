"""Norms on queries and keys: left out, too late, over the wrong numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import Change, Fault, Scope, fault
from parity.faults.patches.modules import attention_of, forward, head_dim_of, together
from parity.faults.patches.norm import (
    QK_NORMS,
    adds_one,
    each,
    eps_of,
    exchangeable,
    exchanged,
    head_axis,
    heads_of,
    left_out,
    per_head_norms,
    rms_norms,
)
from parity.faults.patches.numbers import wide
from parity.faults.patches.rope import has_rope, original_rotation, with_rotation


@fault(
    id="qk-norm-skipped",
    title="no norm on queries and keys",
    sites=QK_NORMS,
    fix="normalize each head of q and k after the projection and before RoPE, in decoding as well",
    source="aprender#2085",
    needs="two tokens or more",
    applies=lambda s: bool(rms_norms(s, QK_NORMS)),
)
def qk_norm_skipped(scope: Scope) -> Change:
    return each(scope, QK_NORMS, left_out)


@fault(
    id="qk-norm-after-rope",
    title="queries and keys are normalized after RoPE; the reference does so before",
    sites=(*QK_NORMS, "q_rope", "k_rope"),
    fix="apply q_norm and k_norm before the rotation",
    source="torchtune#2809",
    needs="two tokens or more, and norm weights that are not all equal",
    applies=lambda s: bool(rms_norms(s, QK_NORMS)) and has_rope(s),
)
def qk_norm_after_rope(scope: Scope) -> Change:
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

    changes = [forward(norm, of(norm, heads_of(scope, name))) for name, norm in rms_norms(scope, QK_NORMS).items()]
    return together(*changes, with_rotation(scope, lambda q, k, *_a, **_k: (q.clone(), k.clone())))


def _shared_norm(scope: Scope) -> Any:
    """A norm without weights that takes queries and keys (b, t, heads, d) alike; None if there is none."""
    found = getattr(attention_of(scope), "qk_norm", None)
    return found if hasattr(found, "eps") and getattr(found, "weight", None) is None else None


def _joint(x: Tensor, eps: float) -> Tensor:
    up = x.to(wide(x.dtype))
    return (up * torch.rsqrt(up.pow(2).mean((-2, -1), keepdim=True) + eps)).to(x.dtype)


@fault(
    id="qk-norm-joint",
    title="QK-norm runs over all heads together; the reference normalizes each head",
    sites=(*QK_NORMS, "qk_norm"),
    fix="take the mean square over head_dim alone",
    source="vllm#16311",
    applies=lambda s: bool(per_head_norms(s)) or _shared_norm(s) is not None,
)
def qk_norm_joint(scope: Scope) -> Change:
    def compute(norm: Any, heads: int, x: Tensor) -> Tensor:
        up = x.to(wide(x.dtype))
        square = up.pow(2).mean((head_axis(x, heads), 3), keepdim=True)
        unit = up * torch.rsqrt(square + eps_of(norm))
        factor = norm.weight.to(unit.dtype) + (1.0 if adds_one(norm) else 0.0)
        out: Tensor = (unit * factor).to(x.dtype)
        return out

    shared = _shared_norm(scope)
    if shared is not None:
        return forward(shared, lambda x: _joint(x, float(shared.eps)))
    return together(
        *(forward(norm, partial(compute, norm, heads_of(scope, name))) for name, norm in per_head_norms(scope).items())
    )


def _over_heads(scope: Scope) -> dict[str, Any]:
    """QK-norms with one weight for each number of all heads."""
    return {n: m for n, m in rms_norms(scope, QK_NORMS).items() if m.weight.numel() > head_dim_of(scope)}


@fault(
    id="qk-norm-separate",
    title="QK-norm runs over each head; the reference normalizes all heads together",
    sites=QK_NORMS,
    fix="take the mean square over all heads, across devices if they are split",
    applies=lambda s: bool(_over_heads(s)),
)
def qk_norm_separate(scope: Scope) -> Change:
    def compute(norm: Any, x: Tensor) -> Tensor:
        up = x.to(wide(x.dtype)).reshape(*x.shape[:-1], -1, head_dim_of(scope))
        unit = up * torch.rsqrt(up.pow(2).mean(-1, keepdim=True) + eps_of(norm))
        out: Tensor = (unit.flatten(-2) * norm.weight.to(unit.dtype)).to(x.dtype)
        return out

    return together(*(forward(norm, partial(compute, norm)) for norm in _over_heads(scope).values()))


@fault(
    id="qk-norm-exchanged",
    title="the weights of q_norm and k_norm change places",
    sites=QK_NORMS,
    fix="q_norm belongs to the queries, k_norm to the keys",
    needs="norm weights that differ",
    applies=exchangeable(*QK_NORMS),
)
def qk_norm_exchanged(scope: Scope) -> Change:
    return exchanged(scope, *QK_NORMS)


FAULTS: tuple[Fault, ...] = (
    qk_norm_skipped,
    qk_norm_after_rope,
    qk_norm_joint,
    qk_norm_separate,
    qk_norm_exchanged,
)
