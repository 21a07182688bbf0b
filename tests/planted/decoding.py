"""Bugs of the cache and of positions that show only once a model is called again, planted in copies of `impl`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from impl.qwen3 import Attention, Qwen3, rope_tables, rotate
from tests.planted.base import ROPE, Place, attention_with, rebind

# Positions (t) of a later call, and how many tokens came before it -> positions.
Count = Callable[[Tensor, int], Tensor]
# Query numbers (t, 1), key numbers (s), tokens before this call, tokens of the first call -> which keys to hide (t, s).
Hide = Callable[[Tensor, Tensor, int, int], Tensor]
CONTEXT = ("self_attn.context",)


def _one_too_long(model: Qwen3) -> None:
    """Later calls see a row of zeros behind the last."""

    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if mask.shape[-1] > mask.shape[-2]:
            k, v, mask = pad(k, (0, 0, 0, 1)), pad(v, (0, 0, 0, 1)), pad(mask, (0, 1))
        return Attention.attend(self, q, k, v, mask)

    for layer in model.model.layers:
        rebind(layer.self_attn, attend, "attend")


@dataclass(frozen=True)
class LateBug:
    """`apply` plants it in all layers; `guilty` are the families that it makes wrong, `faults` its right names."""

    id: str
    apply: Callable[[Qwen3], None]
    guilty: tuple[str, ...]
    faults: tuple[str, ...]


def _positions(count: Count) -> Callable[[Qwen3], None]:
    def turn(self: Attention, _which: str, x: Tensor, place: Place) -> Tensor:
        past = int(place.positions[0])
        if not past:
            return rotate(x, place.cos, place.sin)
        theta: float = self.theta  # type: ignore[assignment]
        return rotate(x, *rope_tables(count(place.positions, past), self.head_dim, theta, x.dtype))

    def apply(model: Qwen3) -> None:
        for layer in model.model.layers:
            layer.self_attn.theta = model.config.rope_theta
            rebind(layer.self_attn, attention_with(turn))

    return apply


def _hidden(hide: Hide) -> Callable[[Qwen3], None]:
    def apply(model: Qwen3) -> None:
        prompt = [0]

        def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            t, s = mask.shape[-2:]
            past = s - t
            if past:
                i, j = torch.arange(past, s)[:, None], torch.arange(s)
                mask = mask.masked_fill(hide(i, j, past, prompt[0]), torch.finfo(mask.dtype).min)
            else:
                prompt[0] = t
            return Attention.attend(self, q, k, v, mask)

        for layer in model.model.layers:
            rebind(layer.self_attn, attend, "attend")

    return apply


LATE: tuple[LateBug, ...] = (
    LateBug("positions-zero", _positions(lambda p, _past: p * 0), ROPE, ("position-decode-zero",)),
    LateBug("positions-ahead", _positions(lambda p, _past: p + 1), ROPE, ("position-decode-ahead",)),
    LateBug("positions-behind", _positions(lambda p, _past: p - 1), ROPE, ("position-decode-behind",)),
    LateBug("positions-retained", _positions(lambda p, _past: p.clamp_max(10)), ROPE, ("position-retained-rows",)),
    LateBug("positions-jump", _positions(lambda p, _past: p + 9), ROPE, ("position-prefix-twice",)),
    LateBug("mask-top-left", _hidden(lambda i, j, past, _: j > i - past), CONTEXT, ("cache-mask-top-left",)),
    LateBug("mask-long", _one_too_long, CONTEXT, ("cache-empty-slot-seen",)),
    LateBug("prefix-short", _hidden(lambda _i, j, _past, n: (j >= n - 3) & (j < n)), CONTEXT, ("cache-prefix-short",)),
    LateBug("cache-unread", _hidden(lambda i, j, _past, _prompt: j != i), CONTEXT, ("cache-unused",)),
    LateBug("not-extended", _hidden(lambda i, j, _, n: (j >= n) & (j != i)), CONTEXT, ("cache-not-extended",)),
    LateBug("mask-short", _hidden(lambda i, j, _past, _prompt: j == i), CONTEXT, ("cache-hides-self",)),
    LateBug(
        "last-overwritten", _hidden(lambda i, j, _, n: (j == n - 1) & (i >= n)), CONTEXT, ("cache-overwrites-last",)
    ),
)
# The decoded token with which these begin, where it is not the first.
LATE_STEP = {"not-extended": 2, "positions-retained": 3}
# These begin with a chunk of a prompt that is read after another, (5, 8).
LATE_CHUNK: tuple[LateBug, ...] = (
    LateBug(
        "chunk-restart", _positions(lambda p, past: p - past), ROPE, ("position-restart", "position-chunk-restart")
    ),
    LateBug("chunk-jump", _positions(lambda p, past: p + past), ROPE, ("position-prefix-twice",)),
    LateBug("chunk-top-left", _hidden(lambda i, j, past, _: j > i - past), CONTEXT, ("cache-mask-top-left",)),
    LateBug("chunk-alone", _hidden(lambda _i, j, past, _prompt: j < past), CONTEXT, ("cache-lost",)),
)
