"""The cases: small configs of many architectures, and the bugs that ports of them have had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.bench import case_changes as changes
from tests.bench.case_changes import FULL, LONG_FACTORS, SLIDING

SIZES = {
    "vocab_size": 151,
    "hidden_size": 80,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 2e5,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
_YARN = {"rope_type": "yarn", "rope_theta": 2e4, "factor": 8.0, "original_max_position_embeddings": 64}
_PER_KIND = {
    SLIDING: {"rope_type": "default", "rope_theta": 3e3},
    FULL: {"rope_type": "linear", "rope_theta": 4e5, "factor": 4.0},
}
_UNSCALED = {"rope_type": "default", "rope_theta": 2e5}
_ONE_TABLE = dict.fromkeys(_PER_KIND, _PER_KIND[FULL])
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": LONG_FACTORS,
    "original_max_position_embeddings": 256,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": _LLAMA3},
    "qwen3": {"head_dim": 16, "rope_parameters": _YARN},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 20,
        "query_pre_attn_scalar": 25,
        "layer_types": [SLIDING, FULL, SLIDING],
        "rope_parameters": _PER_KIND,
    },
    "gemma2": {"head_dim": 20, "sliding_window": 20, "query_pre_attn_scalar": 25},
    "phi3": {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 256, "sliding_window": None},
    "smollm3": {"head_dim": 16, "no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "olmo": {"clip_qkv": 0.5},
    "gpt_neox": {"rotary_pct": 0.5},
    "mistral": {"head_dim": 16, "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
    "qwen2": {},
    "cohere2": {"head_dim": 16, "sliding_window": 24, "layer_types": [SLIDING, FULL, SLIDING], "logit_scale": 0.25},
    "gpt_oss": {
        "head_dim": 16,
        "swiglu_limit": 1.5,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
        "intermediate_size": 40,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "falcon_h1": {
        "mlp_multipliers": [1.0, 0.8],
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 12,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 16,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
}


@dataclass(frozen=True)
class Case:
    """A bug: the config that the port reads in place of the checkpoint's, or a change to its model.

    `names` are right names for it; where it is one in some layers and another in others, both.
    """

    id: str
    architecture: str
    names: frozenset[str]
    config: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], None] | None = None


def _case(id: str, architecture: str, *names: str, change: Callable[[Any], None] | None = None, **config: Any) -> Case:
    return Case(id, architecture, frozenset(names), config, change)


CASES = (
    _case("llama3-factor", "llama", "rope-scaling-factor", rope_parameters=_LLAMA3 | {"factor": 8.0}),
    _case("llama3-ignored", "llama", "rope-scaling-ignored", rope_parameters=_UNSCALED),
    _case("yarn-factor", "qwen3", "rope-scaling-factor", rope_parameters=_YARN | {"factor": 4.0}),
    _case("yarn-attention-factor", "qwen3", "rope-attention-factor", rope_parameters=_YARN | {"attention_factor": 1.0}),
    _case("global-table", "gemma3_text", "rope-of-other-layers", rope_parameters=_ONE_TABLE),
    _case("local-theta", "gemma3_text", "rope-theta",
          rope_parameters=_PER_KIND | {SLIDING: {"rope_type": "default", "rope_theta": 4e5}}),
    _case("global-unscaled", "gemma3_text", "rope-scaling-ignored", "rope-scaling-factor",
          rope_parameters=_PER_KIND | {FULL: {"rope_type": "default", "rope_theta": 4e5}}),
    _case("window-inclusive", "gemma3_text", "window-plus-one", sliding_window=21),
    _case("one-twice", "gemma3_text", "norm-one-twice", change=changes.one_more),
    _case("scale-head-dim", "gemma2", "attention-scale-head-dim", change=changes.scale),
    _case("windows-exchanged", "gemma2", "window-ignored", "window-of-other-layers", change=changes.kinds_exchanged),
    _case("long-factors", "phi3", "rope-long-factors", change=changes.long),
    _case("nope-inverted", "smollm3", "rope-skipped", "rope-on-nope-layer", change=changes.inverted),
    _case("clip-missing", "olmo", "clip-qkv-missing", clip_qkv=None),
    _case("qkv-in-blocks", "gpt_neox", "qkv-in-blocks", change=changes.blocks),
    _case("logits-multiplied", "granite", "logits-scale", logits_scaling=1 / 6.0),
    _case("residual-multiplier", "granite", "residual-multiplier", change=changes.residual),
    _case("llama3-low", "llama", "rope-low-freq-factor", rope_parameters=_LLAMA3 | {"low_freq_factor": 2.0}),
    _case("llama3-high", "llama", "rope-high-freq-factor", rope_parameters=_LLAMA3 | {"high_freq_factor": 8.0}),
    _case("llama3-length", "llama", "rope-scaling-length",
          rope_parameters=_LLAMA3 | {"original_max_position_embeddings": 96}),
    _case("llama3-linear", "llama", "rope-scaled-linearly",
          rope_parameters={"rope_type": "linear", "rope_theta": 2e5, "factor": 16.0}),
    _case("yarn-beta-slow", "qwen3", "rope-beta-slow", rope_parameters=_YARN | {"beta_slow": 3.0}),
    _case("yarn-length", "qwen3", "rope-scaling-length",
          rope_parameters=_YARN | {"original_max_position_embeddings": 128}),
    _case("yarn-not-truncated", "qwen3", "rope-yarn-not-truncated", rope_parameters=_YARN | {"truncate": False}),
    _case("longrope-unscaled", "phi3", "rope-frequencies-unscaled",
          change=changes.frequencies(lambda f: 1e4 ** (-torch.arange(8.0) / 8))),
    _case("longrope-one-factor", "phi3", "rope-frequencies",
          change=changes.frequencies(lambda f: f * torch.tensor([1, 1, 1, 1.1, 1, 1, 1, 1]))),
    _case("partial-quarter", "gpt_neox", "rope-fraction",
          rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}),
    _case("frequencies-shifted", "mistral", "rope-frequencies", change=changes.frequencies(lambda f: f.roll(1))),
    _case("frequencies-stretched", "mistral", "rope-frequencies",
          change=changes.frequencies(lambda f: f * torch.linspace(1, 1.3, 8))),
    _case("positions-halved", "mistral", "rope-positions", change=changes.positions(lambda p: p // 2)),
    _case("positions-bounded", "mistral", "rope-positions", change=changes.positions(lambda p: p.clamp(max=50))),
    _case("norm-of-first-layer", "mistral", "norm-other-weights", change=changes.norm_of_first),
    _case("norm-one-channel", "mistral", "norm-other-weights", change=changes.norm_channel),
    _case("bias-of-first-layer", "qwen2", "bias-other", change=changes.bias_of_first),
    _case("bias-added", "mistral", "bias-other", change=changes.bias_added),
    _case("fused-k-v-q", "phi3", "rows-reordered",
          change=changes.rows("self_attn.qkv_proj", lambda i: i.roll(-len(i) // 3))),
    _case("fused-by-head", "phi3", "rows-reordered",
          change=changes.rows("self_attn.qkv_proj", lambda i: i.reshape(3, 5, -1).transpose(0, 1).flatten())),
    _case("fused-up-gate", "phi3", "rows-reordered",
          change=changes.rows("mlp.gate_up_proj", lambda i: i.roll(len(i) // 2))),
    _case("heads-reversed", "mistral", "rows-reordered",
          change=changes.rows("self_attn.q_proj", lambda i: i.reshape(5, -1).flip(0).flatten())),
    _case("qkv-cut-late", "mistral", "rows-of-other-projection", change=changes.cut_late),
    _case("heads-merged-late", "mistral", "columns-reordered", "heads-merged-wrong",
          change=changes.columns("self_attn.o_proj", lambda i: i.reshape(5, -1).T.flatten())),
    _case("ids-of-64-bits-halved", "mistral", "embedding-other-ids",
          change=changes.ids(lambda x: torch.stack([x, x * 0], -1).flatten(-2)[..., : x.shape[-1]])),
    _case("scale-of-one-layer", "mistral", "attention-scale", change=changes.scale_of_one),
    _case("softcap-dropped", "gemma2", "softcap-dropped", change=changes.capped(None)),
    _case("softcap-other", "gemma2", "softcap-other", change=changes.capped(5.0)),
    _case("logits-capped-lower", "gemma2", "logits-softcap-other", final_logit_softcapping=3.0),
    _case("logit-scale", "cohere2", "logits-scale", logit_scale=1.0),
    _case("embedding-multiplier", "granite", "embedding-multiplier", embedding_multiplier=1.0),
    _case("mlp-multiplier", "falcon_h1", "mlp-multiplier", mlp_multipliers=[1.0, 1.0]),
    _case("sinks-zero", "gpt_oss", "sinks-zero", change=changes.without_sinks),
    _case("swiglu-alpha", "gpt_oss", "swiglu-alpha", change=changes.experts(alpha=1.0)),
    _case("swiglu-limit", "gpt_oss", "swiglu-limit", change=changes.experts(limit=1.2)),
)  # fmt: skip
