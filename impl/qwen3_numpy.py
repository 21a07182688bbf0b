"""Qwen3 in numpy, on whole sequences in float32: a worked example of a port that is not torch.

    parity record --prompt "The capital of France is" -o ref.h5      # also writes ref.tokens.txt
    python -m impl.qwen3_numpy parity/models/tiny-qwen3 ref.tokens.txt port.safetensors
    parity diff ref.h5 port.safetensors

`forward` returns the value at every site of the reference, by the reference's name for it; `write_dump` puts them
into a file that parity reads. impl/qwen3.py says what is easy to get wrong about this model.

Axes in shape comments: b batch, t token, s token attended to, h query head, g key/value head, d head_dim.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches numpy the name bfloat16, in which most checkpoints are stored
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Array = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Config:
    """The keys of config.json that change the computation, but for the sizes that the weights show."""

    layers: int
    head_dim: int
    eps: float
    theta: float
    tied: bool

    @classmethod
    def read(cls, path: Path) -> Config:
        """Read config.json; raises ValueError for a feature that this port does not have."""
        raw: dict[str, Any] = json.loads(path.read_text())
        rope: dict[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        supported = {
            "model_type": raw.get("model_type") == "qwen3",
            "hidden_act": raw.get("hidden_act", "silu") == "silu",
            "rope_type": rope.get("rope_type", rope.get("type", "default")) == "default",
            "use_sliding_window": not raw.get("use_sliding_window"),
        }
        if not all(supported.values()):
            names = ", ".join(name for name, is_supported in supported.items() if not is_supported)
            raise ValueError(f"{path}: this port does not implement its setting of {names}")
        return cls(
            layers=raw["num_hidden_layers"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            eps=raw["rms_norm_eps"],
            theta=float(raw.get("rope_theta") or rope["rope_theta"]),
            tied=raw.get("tie_word_embeddings", False),
        )


def read_weights(model_dir: Path) -> dict[str, Array]:
    """All tensors of a checkpoint as float32, from one file or from the shards that its index names."""
    index = model_dir / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else []
    tensors: dict[str, Array] = {}
    for file in files or ["model.safetensors"]:
        tensors |= {name: x.astype(np.float32) for name, x in load_file(model_dir / file).items()}
    return tensors


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis."""
    y: Array = weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))
    return y


def rope_tables(tokens: int, config: Config) -> tuple[Array, Array]:
    """Cosines and sines (t, 1, d/2) of the angle of each token in each pair."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = 1 / np.float32(config.theta) ** exponents
    angles = np.arange(tokens, dtype=np.float32)[:, None, None] * frequencies
    return np.cos(angles), np.sin(angles)


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """Turn each pair (x[i], x[i + d/2]) of x (b, t, h, d) by the angle of its token."""
    (cos, sin), (first, second) = tables, np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q kᵀ / √d) v over past tokens, for q (b, t, h, d) and k, v (b, t, g, d); returns (b, t, h, d)."""
    _, tokens, heads, head_dim = q.shape
    # Query head h reads key/value head h // (heads / groups).
    q, k, v = (np.repeat(x, heads // x.shape[2], axis=2).swapaxes(1, 2) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) * np.float32(head_dim**-0.5)
    scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    context: Array = probs @ v
    return context.swapaxes(1, 2)


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    with np.errstate(over="ignore"):  # for a very negative x, exp(-x) is infinite and the result rightly -0
        y: Array = x / (1 + np.exp(-x))
    return y


@dataclass
class Qwen3:
    """The model, and what its last run had at every site."""

    config: Config
    weights: dict[str, Array]
    sites: dict[str, Array] = field(default_factory=dict)

    def put(self, site: str, x: Array) -> Array:
        """Record a value."""
        self.sites[site] = x
        return x

    def linear(self, name: str, x: Array) -> Array:
        """`x` · weightᵀ, and the bias if the checkpoint has one."""
        y = x @ self.weights[f"{name}.weight"].T
        return self.put(name, y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y)

    def norm(self, name: str, x: Array) -> Array:
        """RMSNorm over the last axis."""
        return self.put(name, rms_norm(x, self.weights[f"{name}.weight"], self.config.eps))

    def attention(self, at: str, x: Array, tables: tuple[Array, Array]) -> Array:
        """Causal grouped-query attention with a norm on every head and RoPE: (b, t, hidden) to the same."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q = self.norm(f"{at}.q_norm", self.linear(f"{at}.q_proj", x).reshape(heads))
        k = self.norm(f"{at}.k_norm", self.linear(f"{at}.k_proj", x).reshape(heads))
        v = self.linear(f"{at}.v_proj", x).reshape(heads)
        q, k = self.put(f"{at}.q_rope", rotate(q, tables)), self.put(f"{at}.k_rope", rotate(k, tables))
        context = self.put(f"{at}.context", attend(q, k, v))
        return self.linear(f"{at}.o_proj", context.reshape(*x.shape[:2], -1))

    def mlp(self, at: str, x: Array) -> Array:
        """SwiGLU: down(silu(gate(x)) * up(x))."""
        activated = self.put(f"{at}.act_fn", silu(self.linear(f"{at}.gate_proj", x)))
        return self.linear(f"{at}.down_proj", self.put(f"{at}.product", activated * self.linear(f"{at}.up_proj", x)))

    def forward(self, token_ids: Ids) -> dict[str, Array]:
        """The value at every site for token ids (b, t), in order of execution; the last are the logits."""
        self.sites = {}
        x = self.put("model.embed_tokens", self.weights["model.embed_tokens.weight"][token_ids])
        tables = rope_tables(token_ids.shape[1], self.config)
        for at in (f"model.layers.{layer}" for layer in range(self.config.layers)):
            x = x + self.attention(f"{at}.self_attn", self.norm(f"{at}.input_layernorm", x), tables)
            self.put(f"{at}.resid_mid", x)
            x = self.put(at, x + self.mlp(f"{at}.mlp", self.norm(f"{at}.post_attention_layernorm", x)))
        head = "model.embed_tokens" if self.config.tied else "lm_head"
        self.put("lm_head", self.norm("model.norm", x) @ self.weights[f"{head}.weight"].T)
        return self.sites


def read_tokens(path: Path) -> Ids:
    """Token ids (b, t) from the text that `parity record` writes: one line for each row of the batch."""
    return np.array([line.split() for line in path.read_text().splitlines()], dtype=np.int64)


def write_dump(path: Path, sites: dict[str, Array], token_ids: Ids, producer: str) -> None:
    """Write sites of shape (b, t, feature) or (b, t, h, d) as a dump, with the names of their axes."""
    dims = {site: "batch token head head_dim" if x.ndim == 4 else "batch token feature" for site, x in sites.items()}
    metadata = {
        "parity.producer": producer,
        "parity.token_ids": json.dumps(token_ids.tolist()),
        "parity.dims": json.dumps(dims),
    }
    save_file({site: np.ascontiguousarray(x) for site, x in sites.items()}, path, metadata)


def main(model_dir: Path, tokens: Path, out: Path) -> None:
    """Run a checkpoint on the ids in a tokens file, and dump all of it."""
    model = Qwen3(Config.read(model_dir / "config.json"), read_weights(model_dir))
    token_ids = read_tokens(tokens)
    write_dump(out, model.forward(token_ids), token_ids, "impl.qwen3_numpy")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python -m impl.qwen3_numpy MODEL_DIR TOKENS.txt OUT.safetensors")
    main(*map(Path, sys.argv[1:]))
