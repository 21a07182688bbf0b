"""Qwen3 in JAX, jitted, in float32: a worked example of a port whose layers are one `lax.scan`.

    parity record --prompt "The capital of France is" -o ref.h5      # also writes ref.tokens.txt
    python -m impl.qwen3_jax parity/models/tiny-qwen3 ref.tokens.txt port.safetensors
    parity diff ref.h5 port.safetensors

A jitted function has no side effects, so nothing can be recorded on the way: every function returns the values at
its sites beside its result. `scan` stacks those of the layers; `forward` gives each layer its own again.
impl/qwen3.py says what is easy to get wrong about this model.

Axes in shape comments: b batch, t token, s token attended to, h query head, g key/value head, d head_dim.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from impl.qwen3_numpy import Config, read_tokens, read_weights, write_dump

Params = dict[str, Any]
"""Weights as the checkpoint names them, those of the layers without `model.layers.N.` and stacked: (layer, …)."""
Sites = dict[str, Array]


def stacked(weights: dict[str, Any]) -> tuple[Params, Params]:
    """The weights outside the layers, and those of the layers stacked by what they are called in their layer."""
    outside = {name: jnp.asarray(x) for name, x in weights.items() if ".layers." not in name}
    layers: dict[str, dict[int, Any]] = {}
    for name, x in weights.items():
        if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            layers.setdefault(found[2], {})[int(found[1])] = x
    return outside, {name: jnp.asarray(np.stack([of[n] for n in sorted(of)])) for name, of in layers.items()}


def rms_norm(params: Params, name: str, x: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis."""
    return params[f"{name}.weight"] * (x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps))


def linear(params: Params, name: str, x: Array) -> Array:
    """`x` · weightᵀ, and the bias if the checkpoint has one."""
    y = x @ params[f"{name}.weight"].T
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def rotate(x: Array, theta: float) -> Array:
    """RoPE: turn each pair (x[i], x[i + d/2]) of x (b, t, h, d) by the angle of its token."""
    frequencies = 1 / theta ** (jnp.arange(0, x.shape[-1], 2, dtype=jnp.float32) / x.shape[-1])
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    (cos, sin), (first, second) = (jnp.cos(angles), jnp.sin(angles)), jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q kᵀ / √d) v over past tokens, for q (b, t, h, d) and k, v (b, t, g, d); returns (b, t, h, d)."""
    (_, tokens, heads, head_dim), groups = q.shape, k.shape[2]
    # Query head h reads key/value head h // (heads / groups).
    k, v = (jnp.repeat(x, heads // groups, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * head_dim**-0.5
    causal = jnp.tri(tokens, dtype=bool)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)), v)


def attention(config: Config, params: Params, x: Array) -> tuple[Array, Sites]:
    """Causal grouped-query attention with a norm on every head and RoPE: (b, t, hidden) to the same."""
    sites = {f"self_attn.{name}_proj": linear(params, f"self_attn.{name}_proj", x) for name in "qkv"}
    q, k, v = (y.reshape(*x.shape[:2], -1, config.head_dim) for y in sites.values())
    q, k = (rms_norm(params, f"self_attn.{name}_norm", y, config.eps) for name, y in (("q", q), ("k", k)))
    sites |= {"self_attn.q_norm": q, "self_attn.k_norm": k}
    q, k = rotate(q, config.theta), rotate(k, config.theta)
    context = attend(q, k, v)
    out = linear(params, "self_attn.o_proj", context.reshape(*x.shape[:2], -1))
    inside = {"q_rope": q, "k_rope": k, "context": context, "o_proj": out}
    return out, sites | {f"self_attn.{name}": y for name, y in inside.items()}


def mlp(params: Params, x: Array) -> tuple[Array, Sites]:
    """SwiGLU: down(silu(gate(x)) * up(x))."""
    gate, up = linear(params, "mlp.gate_proj", x), linear(params, "mlp.up_proj", x)
    activated = jax.nn.silu(gate)
    out = linear(params, "mlp.down_proj", activated * up)
    sites = {"gate_proj": gate, "up_proj": up, "act_fn": activated, "product": activated * up, "down_proj": out}
    return out, {f"mlp.{name}": y for name, y in sites.items()}


def layer(config: Config, x: Array, params: Params) -> tuple[Array, Sites]:
    """One decoder layer on the residual stream (b, t, hidden). Its own output is the site ""."""
    normed = rms_norm(params, "input_layernorm", x, config.eps)
    attended, in_attention = attention(config, params, normed)
    middle = x + attended
    normed_middle = rms_norm(params, "post_attention_layernorm", middle, config.eps)
    out, in_mlp = mlp(params, normed_middle)
    own = {"input_layernorm": normed, "resid_mid": middle, "post_attention_layernorm": normed_middle}
    return middle + out, own | in_attention | in_mlp | {"": middle + out}


@partial(jax.jit, static_argnums=0)
def run(config: Config, params: Params, layers: Params, token_ids: Array) -> tuple[Sites, Sites]:
    """Token ids (b, t) to the values outside the layers, logits among them, and those of the layers, stacked."""
    embedded = params["model.embed_tokens.weight"][token_ids]
    x, in_layers = lax.scan(partial(layer, config), embedded, layers)
    normed = rms_norm(params, "model.norm", x, config.eps)
    logits = linear(params, "model.embed_tokens" if config.tied else "lm_head", normed)
    return {"model.embed_tokens": embedded, "model.norm": normed, "lm_head": logits}, in_layers


def forward(config: Config, weights: dict[str, Any], token_ids: Any) -> Sites:
    """The value at every site for token ids (b, t), by the reference's name for it."""
    sites: Sites
    # On an accelerator, JAX multiplies in less than float32 unless told not to.
    with jax.default_matmul_precision("highest"):
        sites, in_layers = run(config, *stacked(weights), token_ids)
    for name, values in in_layers.items():
        sites |= {f"model.layers.{n}.{name}".rstrip("."): value for n, value in enumerate(values)}
    return sites


def main(model_dir: Path, tokens: Path, out: Path) -> None:
    """Run a checkpoint on the ids in a tokens file, and dump all of it."""
    token_ids = read_tokens(tokens)
    sites = forward(Config.read(model_dir / "config.json"), read_weights(model_dir), token_ids)
    write_dump(out, {site: np.asarray(x) for site, x in sites.items()}, token_ids, "impl.qwen3_jax")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python -m impl.qwen3_jax MODEL_DIR TOKENS.txt OUT.safetensors")
    main(*map(Path, sys.argv[1:]))
