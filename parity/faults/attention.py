"""Attention: scale, which heads meet, softmax, and how keys and values are kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from parity.faults.attend import (
    from_scratch,
    has_attention,
    has_sinks,
    original,
    reading,
    replaced,
    scale_of,
    softcap_of,
    softmax_as,
    with_options,
)
from parity.faults.fault import Fault, Number, Scope
from parity.faults.parts import (
    attention_of,
    forward,
    head_dim_of,
    hidden_per_head,
    kv_heads_of,
    linear,
    norms_of,
    plain,
    stored_as,
    together,
)
from parity.faults.tables import has_rope, original_rotation, with_rotation

INSIDE = ("scores", "context")
TWO_TOKENS = "two tokens or more"
Change = AbstractContextManager[None]


def _scaled(value: Callable[[Scope], float]) -> Callable[[Scope], Change]:
    return lambda scope: with_options(scope, scaling=value(scope))


def _scale_is_not(value: Callable[[Scope], float]) -> Callable[[Scope], bool]:
    return lambda scope: has_attention(scope) and abs(value(scope) / scale_of(scope) - 1) > 1e-6


def _by_hidden(scope: Scope) -> float:
    return hidden_per_head(scope) ** -0.5


def _by_head_dim(scope: Scope) -> float:
    return head_dim_of(scope) ** -0.5


# -- heads ---------------------------------------------------------------------------------------------------


def _is_grouped(scope: Scope) -> bool:
    return has_attention(scope) and 1 < kv_heads_of(scope) < scope.config.num_attention_heads


def _several_kv(scope: Scope) -> bool:
    return has_attention(scope) and kv_heads_of(scope) > 1


def _tiled(scope: Scope) -> Change:
    """Key/value heads in the order 0, 1, 0, 1, …: all of them are laid out, so the reference repeats none."""
    attend = original(scope)

    def new(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        group = q.shape[1] // k.shape[1]
        # The reference repeats each head `group` times and would do so again: take every group-th for it.
        order = torch.arange(q.shape[1], device=q.device) % k.shape[1]
        rows = [
            attend(module, q[:, order == head], k[:, head : head + 1].expand(-1, 1, -1, -1), v[:, head : head + 1], mask, **kwargs)
            for head in range(k.shape[1])
        ]
        del group
        return rows

    return replaced(scope, new)


def _heads_permuted(scope: Scope) -> Change:
    """q's and k's projections split as (head_dim, heads)."""

    def split(x: Tensor) -> Tensor:
        return x.flatten(2).unflatten(2, (x.shape[3], x.shape[2])).transpose(2, 3)

    norms = [m for name, m in norms_of(scope).items() if name.endswith((".q_norm", ".k_norm"))]
    if norms:

        def of(norm: nn.Module) -> Callable[[Tensor], Tensor]:
            before: Callable[[Tensor], Tensor] = norm.forward
            return lambda x: before(split(x))

        return together(*(forward(norm, of(norm)) for norm in norms))
    rotate = original_rotation(scope)

    def turned(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = (split(x.transpose(1, 2)).transpose(1, 2) for x in (q, k))
        return rotate(q, k, *args, **kwargs)

    return with_rotation(scope, turned)


def _merged_wrong(scope: Scope) -> Change:
    out = linear(scope, "o_proj")
    assert out is not None, "unreachable because the fault applies only where there is one"
    before, size = out.forward, head_dim_of(scope)
    return forward(out, lambda x: before(x.unflatten(-1, (-1, size)).transpose(-1, -2).flatten(-2)))
