"""Tiny random checkpoints of many decoders that transformers has: dense, mixtures, linear attention, state spaces.

No two sizes of one model are alike, windows are shorter than a test's prompt, and every parameter and learned buffer
holds numbers of its own: what is one or zero in a fresh model would hide that it is forgotten.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Settings = dict[str, Any]

VOCAB = 223
_SIZES: Settings = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 120,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 640,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OLD: Settings = {"vocab_size": VOCAB, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 640}
_WINDOW, _FULL = "sliding_attention", "full_attention"


def _of(*without: str, **settings: Any) -> Settings:
    return {key: value for key, value in {**_SIZES, **settings}.items() if key not in without}


_HEADS = {"head_dim": 20}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
_MULTIPLIERS: Settings = {
    "embedding_multiplier": 2.5,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.12,
}
_LATENT: Settings = {
    "q_lora_rank": 28,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 6,
}
_GROUPED: Settings = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 40,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.6,
    "first_k_dense_replace": 1,
}
_DELTA: Settings = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 14,
    "layer_types": ["linear_attention", _FULL, "linear_attention"],
}
_YARN = {"rope_type": "yarn", "rope_theta": 2e4, "factor": 4.0, "original_max_position_embeddings": 64}
_MAMBA2: Settings = {"mamba_d_state": 16, "mamba_chunk_size": 16, "mamba_n_groups": 2}

# Name: (model type, settings). The first word of a name says of what kind a model is where it is not dense.
ARCHITECTURES: dict[str, tuple[str, Settings]] = {
    "llama": ("llama", _of(**_HEADS, attention_bias=True, rope_parameters={
        "rope_type": "llama3", "rope_theta": 3e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64})),
    "mistral": ("mistral", _of(**_HEADS, sliding_window=11)),
    "ministral": ("ministral", _of(**_HEADS, sliding_window=11, layer_types=[_WINDOW, _FULL, _WINDOW])),
    "qwen2": ("qwen2", _of(use_sliding_window=True, sliding_window=11, max_window_layers=1)),
    "qwen3": ("qwen3", _of(**_HEADS)),
    "gemma": ("gemma", _of(**_HEADS)),
    "gemma2": ("gemma2", _of(**_HEADS, sliding_window=11, query_pre_attn_scalar=28)),
    "gemma3": ("gemma3_text", _of(**_HEADS, sliding_window=11, query_pre_attn_scalar=28,
                                  layer_types=[_WINDOW, _FULL, _WINDOW])),
    "gemma3n": ("gemma3n_text", _of(**_HEADS, num_hidden_layers=4, sliding_window=11, num_kv_shared_layers=2,
                                    layer_types=[_WINDOW, _FULL, _WINDOW, _FULL], vocab_size_per_layer_input=VOCAB,
                                    hidden_size_per_layer_input=10, laurel_rank=8, altup_num_inputs=3,
                                    activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0])),
    "gemma4": ("gemma4_text", _of(**_HEADS, global_head_dim=24, sliding_window=11, num_kv_shared_layers=0,
                                  layer_types=[_WINDOW, _FULL, _FULL], vocab_size_per_layer_input=VOCAB,
                                  hidden_size_per_layer_input=10)),
    "vaultgemma": ("vaultgemma", _of(**_HEADS, sliding_window=11, query_pre_attn_scalar=28,
                                     layer_types=[_WINDOW, _FULL, _FULL])),
    "phi": ("phi", _of(num_key_value_heads=6, partial_rotary_factor=0.5, qk_layernorm=True)),
    "phi3": ("phi3", _of(sliding_window=None, original_max_position_embeddings=32, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1 + 0.1 * i for i in range(8)],
        "long_factor": [1.4 + 0.5 * i for i in range(8)], "original_max_position_embeddings": 32})),
    "olmo": ("olmo", _of(clip_qkv=1.5)),
    "olmo2": ("olmo2", _of()),
    "olmo3": ("olmo3", _of(sliding_window=11)),
    "gpt2": ("gpt2", {**_OLD, "n_inner": 118}),
    "gpt_neo": ("gpt_neo", {"vocab_size": VOCAB, "hidden_size": 96, "num_layers": 2, "num_heads": 6, "window_size": 11,
                            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 640}),
    "gpt_neox": ("gpt_neox", _of("num_key_value_heads", rotary_pct=0.5)),
    "gpt_bigcode": ("gpt_bigcode", {**_OLD, "n_inner": 118}),
    "gptj": ("gptj", {**_OLD, "rotary_dim": 8}),
    "codegen": ("codegen", {**_OLD, "rotary_dim": 8, "n_head": 4, "n_ctx": 640}),
    "opt": ("opt", _of("num_key_value_heads", "intermediate_size", ffn_dim=118, word_embed_proj_dim=40)),
    "xglm": ("xglm", {"vocab_size": VOCAB, "d_model": 96, "ffn_dim": 118, "num_layers": 3, "attention_heads": 6,
                      "max_position_embeddings": 640}),
    "biogpt": ("biogpt", _of("num_key_value_heads")),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 96, "n_layer": 3, "n_head": 6}),
    "mpt": ("mpt", {"vocab_size": VOCAB, "d_model": 96, "n_layers": 3, "n_heads": 6, "expansion_ratio": 2}),
    "falcon": ("falcon", _of("num_key_value_heads", "intermediate_size", num_kv_heads=2, new_decoder_architecture=True,
                             ffn_hidden_size=118)),
    "persimmon": ("persimmon", _of("num_key_value_heads", qk_layernorm=True, partial_rotary_factor=0.5)),
    "stablelm": ("stablelm", _of(use_qkv_bias=True, qk_layernorm=True, use_parallel_residual=False)),
    "starcoder2": ("starcoder2", _of(sliding_window=11)),
    "cohere": ("cohere", _of(use_qk_norm=True)),
    "cohere2": ("cohere2", _of(**_HEADS, sliding_window=11, layer_types=[_WINDOW, _FULL, _WINDOW])),
    "granite": ("granite", _of(**_MULTIPLIERS)),
    "glm": ("glm", _of(**_HEADS, partial_rotary_factor=0.5)),
    "glm4": ("glm4", _of(**_HEADS, partial_rotary_factor=0.5, attention_bias=True)),
    "smollm3": ("smollm3", _of(**_HEADS, no_rope_layers=[1, 0, 1], no_rope_layer_interval=2)),
    "nemotron": ("nemotron", _of(**_HEADS, partial_rotary_factor=0.5)),
    "exaone4": ("exaone4", _of(**_HEADS, sliding_window=11, layer_types=[_WINDOW, _FULL, _WINDOW],
                               sliding_window_pattern="LGL")),
    "ernie4_5": ("ernie4_5", _of(**_HEADS, use_bias=True)),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _of(**_HEADS)),
    "seed_oss": ("seed_oss", _of(**_HEADS)),
    "arcee": ("arcee", _of(**_HEADS)),
    "apertus": ("apertus", _of()),
    "helium": ("helium", _of(head_dim=16)),
    "diffllama": ("diffllama", _of("num_key_value_heads", num_key_value_heads=2)),
    "bitnet": ("bitnet", _of()),
    "nanochat": ("nanochat", _of(**_HEADS)),
    "youtu": ("youtu", _of(**_LATENT)),
    "bert": ("bert", _of("num_key_value_heads", is_decoder=True)),
    "mixtral": ("mixtral", _of(**_HEADS, **_LOCAL)),
    "mixtral_odd": ("mixtral", _of(**_HEADS, **_LOCAL, hidden_size=84, intermediate_size=118)),
    "qwen2_moe": ("qwen2_moe", _of(**_EXPERTS, shared_expert_intermediate_size=56, decoder_sparse_step=2)),
    "qwen3_moe": ("qwen3_moe", _of(**_HEADS, **_EXPERTS, norm_topk_prob=True, mlp_only_layers=[1])),
    "granitemoe": ("granitemoe", _of(**_LOCAL, **_MULTIPLIERS)),
    "olmoe": ("olmoe", _of(num_experts=5, num_experts_per_tok=2)),
    "phimoe": ("phimoe", _of(**_LOCAL, attention_bias=True, lm_head_bias=True, sliding_window=11)),
    "gpt_oss": ("gpt_oss", _of(**_HEADS, **_LOCAL, sliding_window=11, intermediate_size=48, rope_parameters={
        **_YARN, "factor": 8.0, "truncate": False})),
    "deepseek_v2": ("deepseek_v2", _of(**_LATENT, **_GROUPED, topk_method="group_limited_greedy")),
    "deepseek_v3": ("deepseek_v3", _of(**_LATENT, **_GROUPED, norm_topk_prob=True, rope_parameters={
        **_YARN, "mscale": 1.0, "mscale_all_dim": 0.7})),
    "glm4_moe": ("glm4_moe", _of(**_HEADS, **{**_GROUPED, "n_group": 1, "topk_group": 1}, use_qk_norm=True,
                                 norm_topk_prob=True, partial_rotary_factor=0.5)),
    "dots1": ("dots1", _of(**_HEADS, **{**_GROUPED, "n_group": 1, "topk_group": 1}, norm_topk_prob=True)),
    "ernie4_5_moe": ("ernie4_5_moe", _of(moe_num_experts=6, moe_k=2, moe_intermediate_size=40, moe_layer_start_index=1,
                                         moe_num_shared_experts=1, use_bias=True)),
    "llama4": ("llama4_text", _of(**_HEADS, intermediate_size_mlp=118, intermediate_size=48, num_local_experts=4,
                                  num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=16,
                                  use_qk_norm=True, no_rope_layers=[1, 1, 0], attn_temperature_tuning=True,
                                  floor_scale=8)),
    "minimax": ("minimax", _of(**_HEADS, **_LOCAL, block_size=16,
                               layer_types=["linear_attention", _FULL, "linear_attention"])),
    "qwen3_next": ("qwen3_next", _of(**_HEADS, **_EXPERTS, **_DELTA, shared_expert_intermediate_size=56,
                                     partial_rotary_factor=0.5)),
    "qwen3_5": ("qwen3_5_text", _of(**_DELTA, head_dim=32, rope_parameters={
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2],
        "mrope_interleaved": True})),
    "lfm2": ("lfm2", _of(conv_L_cache=3, block_multiple_of=2, layer_types=["conv", _FULL, "conv"])),
    "mamba": ("mamba", {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8,
                        "time_step_rank": 6}),
    "mamba2": ("mamba2", {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16,
                          "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16}),
    "falcon_mamba": ("falcon_mamba", {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8,
                                      "time_step_rank": 6}),
    "jamba": ("jamba", _of(num_experts=4, num_experts_per_tok=2, attn_layer_period=3, attn_layer_offset=1,
                           expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=6,
                           use_mamba_kernels=False)),
    "bamba": ("bamba", _of(**_MAMBA2, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=24)),
    "falcon_h1": ("falcon_h1", _of(**_MAMBA2, mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16)),
}  # fmt: skip


def make(name: str, path: Path, dtype: str = "float32") -> Path:
    """Write the checkpoint of an architecture to `path`, and return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **copy.deepcopy(settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, seed=sum(name.encode()))
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Numbers of their own for all parameters and learned buffers, of sizes at which activations stay alive."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    for name, parameter in model.named_parameters():
        if any(word in name for word in ("A_log", "dt_bias", "dt_proj.bias")):
            parameter += 0.1 * noise(parameter)
        elif parameter.dim() <= 1:
            parameter += 0.25 * noise(parameter)
        elif ("embed" in name and "unembed" not in name) or ".wte" in name or ".wpe" in name:
            parameter.copy_(noise(parameter))
        else:
            inputs = math.prod(parameter.shape[1:]) if "conv" in name or parameter.dim() > 3 else parameter.shape[-1]
            parameter.copy_(1.2 * noise(parameter) / math.sqrt(inputs))
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer += 0.15 * noise(buffer)
        elif name.endswith("layer_scalar"):
            buffer *= 0.7
