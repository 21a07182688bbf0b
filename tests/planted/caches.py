"""Bugs of what stands in the cache, planted in copies of `impl`: each shows where attention reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from impl.qwen3 import Attention, Cache, Qwen3, rotate
from tests.planted.base import rebind

BOTH = ("self_attn.cache_k", "self_attn.cache_v")
# (keys or values (b, g, s, d) of all tokens seen, how many were cached before, layer) -> what is read
Read = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class CacheBug:
    """`apply` plants it in all layers; `guilty` are the families that it makes wrong, `faults` its right names.

    `rows` is how many sequences a run needs, `call` the first call in which it shows; `dtypes` where it does.
    """

    id: str
    apply: Callable[[Qwen3], None]
    faults: tuple[str, ...]
    guilty: tuple[str, ...] = BOTH
    rows: int = 1
    call: int = 1
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


class _Reading(Cache):
    """Keeps what it is given, and gives back something else."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self._read = read

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        t = k.shape[2]
        k, v = super().extend(layer, k, v)
        past = k.shape[2] - t
        return self._read(k.clone(), past, layer), self._read(v.clone(), past, layer)


def _reading(read: Read) -> Callable[[Qwen3], None]:
    def apply(model: Qwen3) -> None:
        model.new_cache = lambda: _Reading(read)  # type: ignore[method-assign]
        for layer in model.model.layers:
            rebind(layer.self_attn, _attend_to_what_is_left, "attend")

    return apply


def _attend_to_what_is_left(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return Attention.attend(self, q, k, v, mask[..., -k.shape[2] :])


def _later(change: Callable[[Tensor, int], Any]) -> Callable[[Qwen3], None]:
    """In later calls rows are changed in place: `change(rows (b, g, s, d), how many were cached before)`."""

    def read(x: Tensor, past: int, _layer: int) -> Tensor:
        if past:
            change(x, past)
        return x

    return _reading(read)


def _stale(x: Tensor, _past: int) -> None:
    x[:, :, 2] = x[:, :, 1]


def _wrong_slot(x: Tensor, _past: int) -> None:
    x[:, :, 8] = x[:, :, 9]


def _empty(x: Tensor, _past: int) -> None:
    x[:, :, 9:] = 0


def _other(x: Tensor, past: int) -> None:
    x[:, :, :past] = torch.cat([x[-1:, :, :past], x[:-1, :, :past]])


def _first(x: Tensor, past: int) -> None:
    for row in range(1, x.shape[0]):
        x[row, :, :past] = x[0, :, :past]


def _other_prompt(x: Tensor, _past: int) -> None:
    generator = torch.Generator().manual_seed(x.shape[2])
    x[:, :, :4] = torch.randn(x[:, :, :4].shape, generator=generator).to(x.dtype) * x.std()


def _int8(x: Tensor, _past: int, _layer: int) -> Tensor:
    step = x.abs().amax(-1, keepdim=True).float() / 127
    return ((x.float() / step).round() * step).to(x.dtype)


def _in(dtype: torch.dtype) -> Callable[[Qwen3], None]:
    return _reading(lambda x, _past, _layer: x.to(dtype).to(x.dtype))


def _before_rope(model: Qwen3) -> None:
    """The cache is given keys that are not rotated; those of the call at hand are."""

    def forward(self: Attention, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        b, t, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, t, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, t, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        q, turned = self.q_rope(rotate(q, cos, sin)), self.k_rope(rotate(k, cos, sin))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
            turned = torch.cat([k[:, :, :-t], turned], dim=2)
        k, v = self.cache_k(turned), self.cache_v(v)
        out: Tensor = self.o_proj(self.context(self.attend(q, k, v, mask)).reshape(b, t, -1))
        return out

    for layer in model.model.layers:
        rebind(layer.self_attn, forward)


# The prompt has 9 tokens, and 4 are decoded.
CACHES: tuple[CacheBug, ...] = (
    CacheBug("stale-row", _later(_stale), ("cache-row-stale",)),
    CacheBug("wrong-slot", _later(_wrong_slot), ("cache-wrong-slot",)),
    CacheBug("empty-rows", _later(_empty), ("cache-row-empty",)),
    CacheBug("evicted", _reading(lambda x, past, _: x[:, :, -7:] if past else x), ("cache-evicted",)),
    CacheBug("other-sequence", _later(_other), ("cache-other-sequence",), rows=3),
    CacheBug("first-sequence", _later(_first), ("cache-first-sequence",), rows=3),
    CacheBug("before-rope", _before_rope, ("cache-before-rope",), ("self_attn.cache_k",)),
    CacheBug("other-prompt", _later(_other_prompt), ()),
    CacheBug("float8", _in(torch.float8_e4m3fn), ("kv-cache-fp8",), call=0),
    CacheBug("int8", _reading(_int8), ("kv-cache-int8",), call=0, dtypes=("float32",)),
    CacheBug("float16", _in(torch.float16), ("kv-cache-fp16",), call=0, dtypes=("float32",)),
)
