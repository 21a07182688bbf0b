"""Attention gone wrong between the rotated heads and o_proj."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from impl.qwen3 import rotate
from tests.planted.base import Attention, Cache, Change, Qwen3, Variant, get, rebind, replaced

CONTEXT = "self_attn.context"
SCORES, PROBS = "self_attn.scores", "self_attn.probs"


def plain_scores(self: Attention, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """q kᵀ / √d + mask for heads that GQA has already repeated."""
    return q @ k.transpose(2, 3) * self.head_dim**-0.5 + mask


def plain_softmax(scores: Tensor) -> Tensor:
    """Probabilities (b, h, t, s) in the dtype of the scores."""
    return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)


def grouped(self: Attention, heads: Tensor) -> Tensor:
    """Key or value heads (b, g, s, d), each repeated for its query heads."""
    return heads.repeat_interleave(self.group, dim=1)


def attending(
    scores: Callable[..., Tensor] = plain_scores,
    softmax: Callable[[Tensor], Tensor] = plain_softmax,
    group_k: Callable[[Attention, Tensor], Tensor] = grouped,
    group_v: Callable[[Attention, Tensor], Tensor] = grouped,
) -> Change:
    """Attention with one of its steps replaced."""

    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        seen = self.scores(scores(self, q, group_k(self, k), mask))
        return (self.probs(softmax(seen)) @ group_v(self, v)).transpose(1, 2)

    return replaced("self_attn", attend, method="attend")


def masked(see: Callable[[Tensor, Tensor, int], Tensor]) -> Change:
    """Attention where query i sees key j iff `see(i, j, number of keys)`, on broadcast positions (t, s)."""

    def scores(self: Attention, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        t, s = mask.shape
        rows = torch.arange(s - t, s, device=mask.device)[:, None]
        visible = see(rows, torch.arange(s, device=mask.device)[None], s)
        hidden = torch.finfo(mask.dtype).min
        return plain_scores(self, q, k, torch.zeros_like(mask).masked_fill(~visible, hidden))

    return attending(scores=scores)


def scale(factor: Callable[[Any], float]) -> Change:
    """Attention whose scores carry `factor(config)` in place of head_dim**-0.5."""

    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        value = factor(model.config)
        change = attending(scores=lambda _self, q, k, mask: q @ k.transpose(2, 3) * value + mask)
        change(model, layers)

    return apply


def capped(cap: float) -> Callable[..., Tensor]:
    def scores(self: Attention, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        raw = q @ k.transpose(2, 3) * self.head_dim**-0.5
        return cap * torch.tanh(raw / cap) + mask

    return scores


def softmax_in_bf16(scores: Tensor) -> Tensor:
    weights = (scores.bfloat16() - scores.bfloat16().amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)).to(scores.dtype)


def softmax_summed_in_bf16(scores: Tensor) -> Tensor:
    x = scores.bfloat16()
    weights = (x - x.amax(-1, keepdim=True)).exp()
    total = torch.zeros_like(weights[..., :1])
    for weight in weights.split(1, dim=-1):
        total = total + weight
    return (weights / total).to(scores.dtype)


def softmax_stored_in_bf16(scores: Tensor) -> Tensor:
    return scores.bfloat16().softmax(-1).to(scores.dtype)


def softmax_not_upcast(scores: Tensor) -> Tensor:
    raised = (scores - scores.amax(-1, keepdim=True)).exp()
    return raised / raised.sum(-1, keepdim=True)


def softmax_with_dropout(scores: Tensor) -> Tensor:
    kept = torch.rand(scores.shape, generator=torch.Generator().manual_seed(5)) > 0.1
    return plain_softmax(scores) * kept.to(scores) / 0.9


def softmax_with_sink(scores: Tensor) -> Tensor:
    sink = torch.zeros_like(scores[..., :1])
    return plain_softmax(torch.cat([scores, sink], dim=-1))[..., :-1]


def tiled(self: Attention, heads: Tensor) -> Tensor:
    return heads.repeat(1, self.group, 1, 1)


def first_head_from_second(self: Attention, heads: Tensor) -> Tensor:
    return grouped(self, torch.cat([heads[:, 1:2], heads[:, 1:]], dim=1))


def in_fp8(self: Attention, heads: Tensor) -> Tensor:
    return grouped(self, heads.to(torch.float8_e4m3fn).to(heads.dtype))


def in_int8(self: Attention, heads: Tensor) -> Tensor:
    step = heads.abs().amax(-1, keepdim=True) / 127
    return grouped(self, (heads / step).round() * step)


def in_fp16(self: Attention, heads: Tensor) -> Tensor:
    return grouped(self, heads.half().to(heads.dtype))


def scores_of_fp16(self: Attention, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return plain_scores(self, q.half().to(q.dtype), k, mask)


def softmax_kept_in_fp16(scores: Tensor) -> Tensor:
    return plain_softmax(scores).half().to(scores.dtype)


def reversed_heads(self: Attention, heads: Tensor) -> Tensor:
    return grouped(self, heads.flip(1))


def next_heads(self: Attention, heads: Tensor) -> Tensor:
    return grouped(self, heads.roll(-1, 1))


def projected(self: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the three projections as (b, t, h, d)."""
    b, t, _ = x.shape
    q, k, v = (p(x).view(b, t, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
    return q, k, v


def wired(
    inputs: Callable[..., tuple[Tensor, Tensor, Tensor]] = projected,
    merge: Callable[[Tensor], Tensor] = lambda context: context.flatten(2),
    turn_v: bool = False,
) -> Change:
    """Attention with other wires into its norms, its RoPE or its o_proj."""

    def forward(self: Attention, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        q, k, v = inputs(self, x)
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = self.q_rope(rotate(q, cos, sin)), self.k_rope(rotate(k, cos, sin))
        v = rotate(v, cos, sin) if turn_v else v
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        out: Tensor = self.o_proj(merge(self.context(self.attend(q, k, v, mask))))
        return out

    return replaced("self_attn", forward)


def k_and_v_exchanged(self: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = projected(self, x)
    return q, v, k


def heads_last(self: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = projected(self, x)
    b, t, h, d = q.shape
    return q.reshape(b, t, d, h).transpose(2, 3), k, v


def causal(i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def _shared_kv_norm(model: Qwen3, layers: Sequence[int]) -> None:
    for i in layers:
        attention = get(model, i, "self_attn")
        rebind(attention, lambda self, q, k, v, mask: type(self).attend(self, q, k, k, mask), "attend")


def _k_for_v(model: Qwen3, layers: Sequence[int]) -> None:
    for i in layers:
        attention = get(model, i, "self_attn")
        rebind(attention, lambda self, q, k, v, mask: type(self).attend(self, q, v, k, mask), "attend")


def _rolled_heads(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return type(self).attend(self, q, k, v, mask).roll(1, 2)


_ONE_TOKEN = "A single token attends to itself alone, with probability one whatever its score."
_CAP = "Felt only by scores that are not small beside the cap."


def _bug(id: str, about: str, apply: Change, *inner: str, **more: Any) -> Variant:
    return Variant(id, about, (CONTEXT,), apply, inner=inner, **({"min_tokens": 2} | more))


BUGS = (
    _bug(
        "attention-scale-hidden",
        "scores scaled by (hidden / heads)**-0.5 where head_dim is another number",
        scale(lambda c: (c.hidden_size / c.num_attention_heads) ** -0.5),
        SCORES,
        note=_ONE_TOKEN,
    ),
    _bug(
        "attention-scale-1.01",
        "scores 1 % too large",
        scale(lambda c: 1.01 * c.head_dim**-0.5),
        SCORES,
        dtypes=("float32",),
        note=_ONE_TOKEN + " In bfloat16 about the size of the rounding; only its direction gives it away.",
    ),
    _bug("attention-scale-missing", "scores not scaled", scale(lambda _c: 1.0), SCORES, note=_ONE_TOKEN),
    _bug("attention-scale-twice", "scores scaled twice", scale(lambda c: 1 / c.head_dim), SCORES, note=_ONE_TOKEN),
    _bug("mask-inverted", "each token sees itself and those after it", masked(lambda i, j, s: j >= i), SCORES),
    _bug(
        "window-applied-32",
        "a sliding window of 32 tokens",
        masked(lambda i, j, s: causal(i, j) & (i - j < 32)),
        SCORES,
        min_tokens=33,
    ),
    _bug("mask-none", "no causal mask", masked(lambda i, j, s: j < s), SCORES, note=_ONE_TOKEN),
    _bug("mask-next-token", "each token also sees the next", masked(lambda i, j, s: j <= i + 1), SCORES),
    _bug(
        "mask-hides-self",
        "each token but the first sees only those before it",
        masked(lambda i, j, s: (j < i) | ((i == 0) & (j == 0))),
        SCORES,
    ),
    _bug(
        "window-applied-half",
        "a sliding window of half the prompt",
        masked(lambda i, j, s: causal(i, j) & (i - j < max(1, s // 2))),
        SCORES,
        note="Nothing happens before the prompt is longer than the window.",
    ),
    _bug(
        "window-applied-all-but-one",
        "a sliding window one shorter than the prompt: the last token misses the first",
        masked(lambda i, j, s: causal(i, j) & (i - j < s - 1)),
        SCORES,
        note="One row of the prompt, and there one key: any figure over the whole tensor dilutes it.",
        dtypes=("float32",),
        min_tokens=3,
    ),
    _bug(
        "gqa-tile",
        "query head h reads key/value head h % kv_heads",
        attending(group_k=tiled, group_v=tiled),
        SCORES,
        CONTEXT,
        min_tokens=1,
    ),
    _bug(
        "v-first-head",
        "the first value head holds the second's values",
        attending(group_v=first_head_from_second),
        CONTEXT,
        min_tokens=1,
    ),
    _bug(
        "kv-heads-reversed",
        "key/value heads in reverse order",
        attending(group_k=reversed_heads, group_v=reversed_heads),
        SCORES,
        CONTEXT,
        min_tokens=1,
    ),
    _bug("v-head-shifted", "values of the next key/value head", attending(group_v=next_heads), CONTEXT, min_tokens=1),
    _bug("kv-exchanged", "keys and values exchanged in attention", _k_for_v, SCORES, CONTEXT, min_tokens=1),
    _bug(
        "heads-rolled",
        "each head's context in the place of the next",
        replaced("self_attn", _rolled_heads, "attend"),
        CONTEXT,
        min_tokens=1,
    ),
    _bug("v-is-k", "the rotated keys in place of the values", _shared_kv_norm, CONTEXT, min_tokens=1),
    _bug("v-rope", "RoPE on the values as well", wired(turn_v=True), CONTEXT),
    Variant(
        "kv-projections-exchanged",
        "what k_proj and v_proj returned exchanged",
        ("self_attn.k_norm", CONTEXT),
        wired(inputs=k_and_v_exchanged),
        inner=(CONTEXT,),
    ),
    Variant(
        "heads-split-wrong",
        "q_proj's output split as (head_dim, heads)",
        ("self_attn.q_norm",),
        wired(inputs=heads_last),
    ),
    Variant(
        "heads-merged-wrong",
        "the context flattened as (head_dim, heads) before o_proj",
        ("self_attn.o_proj",),
        wired(merge=lambda context: context.transpose(2, 3).flatten(2)),
    ),
    _bug(
        "softcap-applied",
        "scores capped at 30 by tanh",
        attending(scores=capped(30.0)),
        SCORES,
        note=_ONE_TOKEN + " " + _CAP,
    ),
    _bug(
        "softcap-applied-50",
        "scores capped at 50 by tanh",
        attending(scores=capped(50.0)),
        SCORES,
        dtypes=("float32",),
        note=_ONE_TOKEN + " " + _CAP,
    ),
    _bug("softmax-plus-one", "a sink takes part of the probability", attending(softmax=softmax_with_sink), PROBS),
    _bug(
        "softmax-bf16",
        "softmax in bfloat16, step by step",
        attending(softmax=softmax_in_bf16),
        PROBS,
        kind="precision",
        dtypes=("float32",),
        note=_ONE_TOKEN + " In bfloat16 the context may hide it; the probabilities show it.",
    ),
    _bug(
        "softmax-sum-bf16",
        "softmax in bfloat16, its sum one term after another",
        attending(softmax=softmax_summed_in_bf16),
        PROBS,
        kind="precision",
        dtypes=("float32",),
        note=_ONE_TOKEN + " In bfloat16 the context may hide it; the probabilities show it.",
    ),
    _bug(
        "softmax-stored-bf16",
        "softmax of bfloat16 scores, as torch computes it",
        attending(softmax=softmax_stored_in_bf16),
        PROBS,
        kind="precision",
        dtypes=("float32",),
        note=_ONE_TOKEN,
    ),
    _bug(
        "softmax-low",
        "softmax step by step in the dtype of the model",
        attending(softmax=softmax_not_upcast),
        PROBS,
        kind="precision",
        dtypes=("bfloat16",),
        note=_ONE_TOKEN,
    ),
    _bug(
        "attention-dropout",
        "dropout of the probabilities left on",
        attending(softmax=softmax_with_dropout),
        PROBS,
        min_tokens=1,
    ),
    _bug(
        "kv-cache-int8",
        "keys and values stored in 8-bit integers",
        attending(group_k=in_int8, group_v=in_int8),
        SCORES,
        CONTEXT,
        kind="precision",
        min_tokens=1,
    ),
    _bug(
        "kv-cache-fp16",
        "keys and values stored in float16",
        attending(group_k=in_fp16, group_v=in_fp16),
        SCORES,
        CONTEXT,
        kind="precision",
        dtypes=("float32",),
        min_tokens=1,
    ),
    _bug(
        "attention-operands-fp16",
        "queries, keys, values and probabilities rounded to float16 before they are multiplied",
        attending(scores=scores_of_fp16, softmax=softmax_kept_in_fp16, group_k=in_fp16, group_v=in_fp16),
        SCORES,
        PROBS,
        CONTEXT,
        kind="precision",
        dtypes=("float32",),
        min_tokens=1,
    ),
    _bug(
        "kv-cache-fp8",
        "keys and values stored in float8 e4m3",
        attending(group_k=in_fp8, group_v=in_fp8),
        SCORES,
        CONTEXT,
        kind="precision",
        min_tokens=1,
    ),
)
