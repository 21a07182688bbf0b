"""Small random checkpoints with every coincidence removed, in the format of Hugging Face.

Identity hides bugs: norm weights of one make (1 + w) a plain factor, heads x head_dim = hidden lets a wrong
head_dim fit, one query head for each key/value head makes the order of GQA vanish. No two sizes here are
equal, no norm weight is one, theta is unusual, the first hidden states are small enough that eps matters,
attention is far from uniform and some logits are large.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

QWEN3: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
}

_SMALL: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 5432.0}}

OTHER: dict[str, dict[str, Any]] = {
    "qwen3_moe": _SMALL
    | _ROPE
    | {"head_dim": 20, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 56},
    "qwen2": _SMALL | _ROPE,
    "llama": _SMALL | _ROPE,
    "mistral": _SMALL | _ROPE | {"head_dim": 20, "sliding_window": 7},
    "gemma3_text": _SMALL
    | {
        "head_dim": 20,
        "sliding_window": 7,
        "query_pre_attn_scalar": 30,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": _SMALL | _ROPE,
    "olmo2": _SMALL | _ROPE,
    "gpt_neox": _SMALL | {"rotary_pct": 0.5},
}


def qwen3(
    path: Path,
    *,
    tied: bool = False,
    layers: int = 4,
    shards: int = 1,
    dtype: str = "bfloat16",
    bias: bool = False,
    **config: Any,
) -> Path:
    """Write a random Qwen3 of about 200,000 parameters to `path` and return it.

    `shards` above 1 splits the file into at least two. `config` overrides keys of config.json.
    """
    settings = QWEN3 | {
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "tie_word_embeddings": tied,
        "attention_bias": bias,
    }
    return _write(path, "qwen3", settings | config, dtype, shards)


def other(model_type: str, path: Path, *, dtype: str = "bfloat16", **config: Any) -> Path:
    """Write a tiny random checkpoint of one of the architectures in `OTHER` to `path` and return it."""
    return _write(path, model_type, OTHER[model_type] | config, dtype, 1)


def _write(path: Path, model_type: str, settings: dict[str, Any], dtype: str, shards: int) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed=sum(model_type.encode()))
    model = model.to(getattr(torch, dtype))
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(path, max_shard_size=size // shards if shards > 1 else "1GB")
    return path


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Give every parameter numbers of its own, of a size at which activations stay alive."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            low = 1.0 if "q_norm" in name or "k_norm" in name else 0.5
            noise = torch.rand(parameter.shape, generator=generator)
            is_norm = name.endswith("weight") and "norm" in name
            parameter.copy_(low + noise * (2 * low) if is_norm else 0.4 * (noise - 0.5))
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        inputs = parameter.shape[-1]
        if "embed" in name:
            # Small, so that eps is not lost beside the mean square of the first hidden states.
            scale = 0.03
        elif any(end in name for end in ("o_proj", "down_proj", "dense")):
            scale = 0.5 / math.sqrt(inputs)
        elif name.startswith("lm_head"):
            scale = 4.0 / math.sqrt(inputs)
        else:
            scale = 1.2 / math.sqrt(inputs)
        parameter.copy_(noise * scale)
