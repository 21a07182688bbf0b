"""What llama.cpp's flash attention rounds: it goes through the keys one by one and keeps its sums in float16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity.faults.fault import Change, Fault, Scope, fault
from parity.faults.patches.attention import has_attention, has_sinks, original, replaced, softcap_of
from parity.faults.patches.modules import head_dim_of
from parity.faults.patches.numbers import stored_as, wide
from parity.record.cache import shown


def _is_plain(scope: Scope) -> bool:
    return has_attention(scope) and not has_sinks(scope) and softcap_of(scope) is None


def _in_fp16(x: Tensor) -> Tensor:
    return stored_as(x, torch.float16)


def _key_by_key(scores: Tensor, hidden: Tensor, v: Tensor, store: Callable[[Tensor], Tensor]) -> Tensor:
    """Context (b, h, t, d) of scores (b, h, t, s), hidden keys of the same shape and values (b, h, s, d).

    The sum so far is `store`d whenever a key is added to it, and whenever a larger score scales it down.
    """
    top = torch.full_like(scores[..., :1], -torch.inf)
    total, context = torch.zeros_like(top), torch.zeros_like(scores[..., :1] * v[..., :1, :])
    for key in range(scores.shape[-1]):
        score, skipped = scores[..., key : key + 1], hidden[..., key : key + 1]
        grows = score > top
        new_top = torch.where(grows, score, top)
        shrink, weight = (top - new_top).exp(), (score - new_top).exp()
        summed = store(torch.where(grows, store(context * shrink), context) + v[..., key : key + 1, :] * weight)
        context = torch.where(skipped, context, summed)
        total = torch.where(skipped, total, total * shrink + weight)
        top = torch.where(skipped, top, new_top)
    return context / total


@fault(
    id="attention-sums-fp16",
    title="attention takes float16 and sums values in it, key by key, as llama.cpp's flash attention on a CPU",
    sites=("context",),
    fix="switch flash attention off and keep the cache in float32 (llama.cpp: -fa off, cache types f32), or accept it",
    source="llama.cpp: flash attention with an F16 cache accumulates in F16",
    needs="float32",
    applies=_is_plain,
    regime=True,
)
def attention_sums_fp16(scope: Scope) -> Change:
    attend = original(scope)

    def new(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        _, probs = attend(module, q, k, v, mask, **kwargs)
        up, group = wide(q.dtype), q.shape[1] // k.shape[1]
        k, v = (_in_fp16(x).to(up).repeat_interleave(group, 1) for x in (k, v))
        scale = kwargs.get("scaling")
        scores = _in_fp16(q).to(up) @ k.transpose(2, 3) * (scale if scale is not None else head_dim_of(scope) ** -0.5)
        seen = shown(mask) if isinstance(mask, Tensor) else torch.ones_like(scores, dtype=torch.bool)
        context = _key_by_key(scores, ~seen.expand_as(scores), v, _in_fp16)
        return context.to(q.dtype).transpose(1, 2).contiguous(), probs

    return replaced(scope, new)


FAULTS: tuple[Fault, ...] = (attention_sums_fp16,)
