"""A tiny random checkpoint of any decoder that transformers has: its own default config with the sizes of one table.

tests.architectures has the decoders whose every number was chosen with care; this has all the others, so that
`python -m tests.bench.architectures --every` can say of each whether parity runs it, or in which words it refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.architectures import ARCHITECTURES, Settings, fill

_SMALL: Settings = {
    **dict.fromkeys(("vocab_size",), 223),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "lru_width"), 96),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dim_ff"), 120),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 120),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 3),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 6),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 6),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 640),
    **dict.fromkeys(("head_dim", "dim_head", "mamba_head_dim", "index_head_dim", "attention_chunk_size"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 6),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "index_topk", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "n_groups", "mamba_n_groups"), 2),
    **dict.fromkeys(("mamba_ngroups", "n_group", "index_n_heads", "linear_num_key_heads", "type_vocab_size"), 2),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 56),
    "moe_intermediate_size": 40,
    "q_lora_rank": 28,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 14,
    "v_head_dim": 12,
    "mamba_d_head": 24,
    "mamba_dt_rank": 6,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 14,
    "sliding_window": 11,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "is_decoder": True,
}


def others() -> list[str]:
    """The types of all causal language models of transformers that tests.architectures has not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = {model_type for model_type, _ in ARCHITECTURES.values()}
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in known]


def small(model_type: str) -> Any:
    """The smallest sensible config of a type: its defaults with the sizes of the table."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type], **OWN.get(model_type, {}))


def make_small(model_type: str, path: Path, dtype: str = "float32") -> Path:
    """Write the checkpoint of a type to `path`, and return it.

    Raises whatever transformers raises where it cannot make the model, and MemoryError for one that is not small.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = small(model_type)
    with torch.device("meta"):
        numbers = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if numbers > 2e7:
        raise MemoryError(f"{numbers / 1e6:.0f} million numbers")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, seed=sum(model_type.encode()))
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def _shrunk(kind: Any, **own: Any) -> Any:
    default = kind()
    plain = {k: v for k, v in _SMALL.items() if _is_number(default, k)}
    if "kv_lora_rank" in plain:
        plain |= {"num_key_value_heads": 6} | ({"head_dim": 8} if "head_dim" in plain else {})
    parts = {
        name: _shrunk(part).to_dict()
        for name, part in (getattr(kind, "sub_configs", None) or {}).items()
        if getattr(part, "model_type", "")
    }
    return kind(**{**plain, **_kinds(default), **parts, **own})


def _is_number(config: Any, name: str) -> bool:
    return isinstance(config.to_dict().get(name, ...), (int, float, str, type(None)))


def _kinds(config: Any) -> Settings:
    """Three layers or more, one of each kind at least."""
    given = {name: config.to_dict().get(name) for name in ("layer_types", "mlp_layer_types", "layers_block_type")}
    kinds = {name: list(dict.fromkeys(value)) for name, value in given.items() if isinstance(value, (list, tuple))}
    if not kinds:
        return {}
    number = max(3, *map(len, kinds.values()))
    return {"num_hidden_layers": number} | {name: (each * number)[:number] for name, each in kinds.items()}


# What the table and the rule of kinds do not get right.
OWN: dict[str, Settings] = {
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}},
    "dbrx": {
        "n_heads": 6, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 5, "moe_top_k": 2, "hidden_size": 96},
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 56},
    "kimi_linear": {"num_experts": 6, "num_experts_per_token": 2, "num_expert_group": 2, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 2, "ffn_hidden_size": 120, "expert_ffn_hidden_size": 40, "moe_topk": 2,
                      "zero_expert_num": 2},
    "prophetnet": {"num_encoder_layers": 3, "num_decoder_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
              "attention_hidden_size": 192, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 24},
}  # fmt: skip
