"""Qwen3 from scratch in plain torch: a worked example of a port.

What is unusual about this model, and easy to get wrong:

* RMSNorm on every query and key head (`q_norm`, `k_norm`), after the projection and before RoPE;
* `head_dim` is its own number in the config: heads x head_dim need not equal the hidden size;
* grouped-query attention: query head h reads key/value head h // (heads / kv_heads);
* RoPE rotates the two halves of a head (i, i + head_dim/2), with theta 1e6 rather than 1e4;
* norms, softmax and the RoPE tables are computed in float32 whatever the dtype of the model;
* small models tie `lm_head` to `embed_tokens`, large ones do not;
* in a padded batch text sees no padding, and its tokens are counted from 0 wherever the padding is.

Attributes carry the names of the checkpoint, so loading needs no map. Where an activation has no
module of its own, an `nn.Identity` stands in its place: ordinary forward hooks then see everything.

Axes in shape comments: b batch, t token, s past and present tokens, h query head, g key/value head, d head_dim.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The keys of config.json that change the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    attention_bias: bool

    @classmethod
    def read(cls, path: Path) -> Config:
        """Read config.json; raises ValueError for a feature that this port does not have."""
        raw: dict[str, Any] = json.loads(path.read_text())
        rope: dict[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        unsupported = {
            "model_type": raw.get("model_type") != "qwen3",
            "hidden_act": raw.get("hidden_act", "silu") != "silu",
            "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
            "use_sliding_window": bool(raw.get("use_sliding_window")),
        }
        if any(unsupported.values()):
            names = ", ".join(name for name, is_set in unsupported.items() if is_set)
            raise ValueError(f"{path}: impl.qwen3 does not implement this setting of {names}")
        derived = {
            "rope_theta": float(raw.get("rope_theta") or rope["rope_theta"]),
            "head_dim": raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            "tie_word_embeddings": raw.get("tie_word_embeddings", False),
            "attention_bias": raw.get("attention_bias", False),
        }
        return cls(**derived, **{name: raw[name] for name in cls.__dataclass_fields__ if name not in derived})


@dataclass
class Cache:
    """Keys and values of the tokens seen so far, one pair for each layer: (b, g, s, d)."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of tokens already stored in every layer."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values (b, g, t, d) and return all of them (b, g, s, d)."""
        if layer in self.layers:
            past_k, past_v = self.layers[layer]
            k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        self.layers[layer] = (k, v)
        return k, v


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the division in float32, the product in the model's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (…, size)."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions (…, t): two tables (…, t, d), whose halves are equal."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + d/2]) of x (b, h, t, d) by the angle of its token."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention with QK-norm and RoPE."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.q_rope, self.k_rope = nn.Identity(), nn.Identity()
        self.cache_k, self.cache_v = nn.Identity(), nn.Identity()
        self.scores, self.probs, self.context = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        """Attend from x (b, t, hidden) to all tokens that mask (t, s), or (b, 1, t, s), leaves visible."""
        b, t, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, t, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, t, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        q, k = self.q_rope(rotate(q, cos, sin)), self.k_rope(rotate(k, cos, sin))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        k, v = self.cache_k(k), self.cache_v(v)
        context = self.context(self.attend(q, k, v, mask))
        out: Tensor = self.o_proj(context.reshape(b, t, -1))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """softmax(q kᵀ / √d + mask) v for q (b, h, t, d) and k, v (b, g, s, d); returns (b, t, h, d)."""
        k, v = k.repeat_interleave(self.group, dim=1), v.repeat_interleave(self.group, dim=1)
        scores = self.scores(q @ k.transpose(2, 3) * self.head_dim**-0.5 + mask)
        probs = self.probs(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype))
        context: Tensor = (probs @ v).transpose(1, 2)
        return context


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn, self.product = nn.SiLU(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, t, hidden) to (b, t, hidden)."""
        out: Tensor = self.down_proj(self.product(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))
        return out


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.resid_mid = nn.Identity()
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        """One layer on the residual stream x (b, t, hidden)."""
        x = self.resid_mid(x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Backbone(nn.Module):
    """Everything but the head; a module of its own only because checkpoints say `model.`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3(nn.Module):
    """The causal language model."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits (b, t, vocab) for token ids (b, t) that continue whatever the cache holds.

        attention_mask  (b, s) 1 for text and 0 for padding, of all tokens seen so far; None without padding
        position_ids    (b, t) where each token stands; None to count those of text from 0
        """
        past, t = cache.length if cache else 0, input_ids.shape[1]
        x = self.model.embed_tokens(input_ids)
        hidden = torch.full((t, past + t), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device)
        mask, positions = hidden.triu(diagonal=past + 1), torch.arange(past, past + t, device=x.device)
        if attention_mask is not None:
            mask = mask.masked_fill(attention_mask[:, None, None] == 0, torch.finfo(x.dtype).min)
            positions = (attention_mask.cumsum(-1)[:, None, past:] - 1).clamp_min(0)
        if position_ids is not None:
            positions = position_ids[:, None]
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask, cache)
        logits: Tensor = self.lm_head(self.model.norm(x))
        return logits

    def new_cache(self) -> Cache:
        """An empty cache for `forward`, which then takes a text in as many calls as one likes."""
        return Cache()

    @torch.no_grad()
    def generate(self, input_ids: Tensor, new_tokens: int) -> Tensor:
        """Greedy continuation with the cache: (b, t) → (b, t + new_tokens)."""
        cache, step = Cache(), input_ids
        for _ in range(new_tokens):
            step = self(step, cache)[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, step], dim=1)
        return input_ids


def read_weights(model_dir: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, single file or sharded. Raises FileNotFoundError when there is none."""
    index, single = model_dir / "model.safetensors.index.json", model_dir / "model.safetensors"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [single.name]
    weights: dict[str, Tensor] = {}
    for name in names:
        with safe_open(model_dir / name, framework="pt") as shard:
            weights.update({key: shard.get_tensor(key) for key in shard.keys()})  # noqa: SIM118
    return weights


def load(model_dir: str | Path, dtype: str = "bfloat16", device: str = "cpu") -> Qwen3:
    """Build the model of a Hugging Face checkpoint directory.

    Raises ValueError or RuntimeError if any tensor of the checkpoint is missing, unknown or misshapen.
    """
    config = Config.read(Path(model_dir) / "config.json")
    with torch.device("meta"):
        model = Qwen3(config)
    weights = read_weights(Path(model_dir))
    if config.tie_word_embeddings:
        # Some checkpoints store the tied head as well; it must then be the same numbers.
        head = weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        if not torch.equal(head, weights["model.embed_tokens.weight"]):
            raise ValueError(f"{model_dir}: config.json ties lm_head to embed_tokens, but the checkpoint holds two")
    target = getattr(torch, dtype)
    model.load_state_dict({name: w.to(device, target) for name, w in weights.items()}, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)
