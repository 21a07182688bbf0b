"""Attention with something changed: what goes in, the mask, the softmax, or the scores themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from parity.faults.fault import Change, Scope, attribute
from parity.faults.patches.modules import attention_of, forward, head_dim_of
from parity.record.cache import shown
from parity.record.scans import source_of

# Where a change inside attention first shows.
INSIDE = ("scores", "context")
# What attention modules call the factor on their scores; the last divides by it.
_FACTORS, _DIVISOR = ("scaling", "softmax_scale", "inv_norm_factor"), "scale_attn"
_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm")


QKV = tuple[Tensor, Tensor, Tensor]
# (visible (b, 1, t, s), query number (t, 1), key number (s)) -> visible
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
# (query, key, value, mask, scale) -> context and probabilities, as an eager attention of transformers
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def has_attention(scope: Scope) -> bool:
    """Whether the layer's attention is a function that can be exchanged."""
    attention = attention_of(scope)
    return attention is not None and hasattr(source_of(attention), "eager_attention_forward")


def original(scope: Scope) -> Attend:
    """The attention function of the reference."""
    found: Attend = source_of(attention_of(scope)).eager_attention_forward
    return found


def replaced(scope: Scope, new: Attend) -> Change:
    """Another attention function."""
    return attribute(source_of(attention_of(scope)), "eager_attention_forward", new)


def scale_of(scope: Scope) -> float:
    """The factor on the scores."""
    own = _own_scale(scope)
    return own[2] if own is not None else head_dim_of(scope) ** -0.5


def has_scale(scope: Scope) -> bool:
    """Whether the factor on the scores is known and can be changed."""
    return has_attention(scope) or _own_scale(scope) is not None


def _own_scale(scope: Scope) -> tuple[nn.Module, str, float] | None:
    """The module that holds the factor on the scores as a number, under which name, and the factor."""
    for module in attention_of(scope).modules() if attention_of(scope) is not None else ():
        for name in (*_FACTORS, _DIVISOR):
            value = getattr(module, name, None)
            if isinstance(value, (float, Tensor)) and not isinstance(value, nn.Parameter):
                return module, name, 1 / float(value) if name == _DIVISOR else float(value)
    return None


def scaled(scope: Scope, scale: float) -> Change:
    """Scores carry another factor, wherever the attention module applies it: to the queries, or to the scores."""
    own = _own_scale(scope)
    if own is None:
        return with_options(scope, scaling=scale)
    module, name, right = own
    if has_attention(scope):
        return attribute(module, name, scale)
    plain = module.forward

    def compute(*args: Any, **kwargs: Any) -> Any:
        with _FirstProduct(scale / right):
            return plain(*args, **kwargs)

    return forward(module, compute)


class _FirstProduct(TorchFunctionMode):
    """The first product of two activations, which in attention is that of queries and keys, carries a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.is_done = factor, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.is_done or name not in _PRODUCTS:
            return func(*args, **kwargs)
        self.is_done = True
        if name == "baddbmm":
            return func(*args, **kwargs | {"alpha": kwargs.get("alpha", 1) * self.factor})
        return func(*args, **kwargs) * self.factor


def window_of(scope: Scope) -> int | None:
    """How many tokens each sees, itself included; None if all."""
    attention, config = attention_of(scope), scope.config
    kinds = getattr(config, "layer_types", None)
    if hasattr(attention, "sliding_window"):
        found = attention.sliding_window
    elif kinds and scope.index is not None and kinds[scope.index] != "sliding_attention":
        found = None
    else:
        found = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return int(found) if found else None


def softcap_of(scope: Scope) -> float | None:
    """The bound on the scores; None if there is none."""
    found = getattr(scope.config, "attn_logit_softcapping", None)
    return float(found) if found else None


def has_sinks(scope: Scope) -> bool:
    """Whether a learned sink takes part of the probability."""
    return getattr(attention_of(scope), "sinks", None) is not None


# -- the ways of changing it -----------------------------------------------------------------------------------


def reading(scope: Scope, edit: Callable[[Tensor, Tensor, Tensor], QKV]) -> Change:
    """Attention on `edit(query, key, value)`, which takes and gives (b, h, t, d) and twice (b, g, s, d)."""
    attend = original(scope)

    def new(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        return attend(module, *edit(q, k, v), mask, **kwargs)

    return replaced(scope, new)


def with_options(scope: Scope, **options: Any) -> Change:
    """Attention with other keyword arguments: scaling, softcap."""
    attend = original(scope)

    def new(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        return attend(module, q, k, v, mask, **(kwargs | options))

    return replaced(scope, new)


def seeing(scope: Scope, rule: Rule) -> Change:
    """Attention where `rule` says which keys each query sees, (b, 1, t, s)."""
    attend = original(scope)

    def new(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        keys = torch.arange(k.shape[2], device=k.device)
        queries = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
        seen = rule(visible(mask, q, k), queries, keys)
        return attend(module, q, k, v, hiding(~seen, q.dtype), **kwargs)

    return replaced(scope, new)


def visible(mask: Any, q: Tensor, k: Tensor) -> Tensor:
    """Which keys k (b, g, s, d) a mask shows to queries q (b, h, t, d), as (b, 1, t, s); no mask shows all of them."""
    if not isinstance(mask, Tensor):
        return torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    return shown(mask)


def hiding(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask of a dtype, (b, 1, t, s), that hides where `hidden` (b, 1, t, s) is true: `shown` undone."""
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return zeros.masked_fill(hidden, torch.finfo(dtype).min)


class softmax_as(TorchFunctionMode):  # noqa: N801
    """Attention's softmax is `compute`, (b, h, t, s) to the same, in the block; the taps on scores and probs stay.

    Only tensors with an axis of heads are attention's: a router has a softmax of its own.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.softmax and args[0].ndim == 4:
            return self.compute(args[0])
        return func(*args, **(kwargs or {}))


def from_scratch(scope: Scope, on_scores: Callable[[Tensor], Tensor]) -> Change:
    """Attention without softcap and sinks, with `on_scores`, (b, h, t, s) to the same, between scaling and mask."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scale = kwargs.get("scaling")
        scores = on_scores(q @ k.transpose(2, 3) * (scale if scale is not None else module.head_dim**-0.5))
        scores = scores if mask is None else scores + mask
        probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return (probs @ v).transpose(1, 2).contiguous(), probs

    return replaced(scope, attend)
