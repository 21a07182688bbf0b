"""Checkpoints that also see: their text part is examined, wherever its layers are, and the rest is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parity
from parity.reference.build import auto_class
from parity.reference.checkpoint import find
from parity.reference.pieces import PiecewiseModel
from parity.results import Comparison
from tests.architectures import fill
from tests.conftest import slow_but

_TEXT = {
    "vocab_size": 223,
    "hidden_size": 96,
    "intermediate_size": 120,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 640,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
# The towers have more layers than the decoder.
_SEES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2}
_SEES |= {"image_size": 28, "patch_size": 14}
_DEEP = {"hidden_size": 32, "intermediate_size": 40, "depth": 4, "num_heads": 2, "out_hidden_size": 96}
KINDS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {**_TEXT, "sliding_window": 11}, "vision_config": _SEES, "mm_tokens_per_image": 4},
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_SEES, "model_type": "pixtral"},
    },
    "qwen2_5_vl": {"text_config": _TEXT | _ROPE, "vision_config": {**_DEEP, "fullatt_block_indexes": [0]}},
    "qwen3_vl": {"text_config": _TEXT | _ROPE, "vision_config": {**_DEEP, "deepstack_visual_indexes": [0]}},
}
TOKENS = " ".join(str((i * 37 + 11) % 190 + 10) for i in range(40))


def written(folder: Path, name: str) -> Path:
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **KINDS[name])
    model = auto_class(config).from_config(config, dtype=torch.float32)
    fill(model, seed=3)
    model.save_pretrained(folder)
    return folder


def loaded(path: Path) -> nn.Module:
    from transformers import AutoConfig

    model: nn.Module = auto_class(AutoConfig.from_pretrained(path)).from_pretrained(path, dtype=torch.float32).eval()
    return model


def diff(candidate: Any, path: Path) -> Comparison:
    return parity.diff(candidate, model=str(path), tokens=TOKENS, dtype="float32", power=False)


@pytest.mark.parametrize("name", slow_but(["qwen2_5_vl", "mistral3"], KINDS))
def test_the_text_part_is_examined(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name)
    model = PiecewiseModel(find(str(path)), torch.float32)
    assert model.is_cut
    assert len(model.layers) == 2
    assert not [key for key, _ in model.model.named_parameters() if "vision" in key or "visual" in key]
    found = diff("hf:?attn=sdpa", path)
    assert found.verdict == "match", found.headline
    assert [check.name for check in found.checks if not check.ok] == []


def test_a_bug_in_the_text_part_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "qwen2_5_vl")
    model = loaded(path)
    attention = model.get_submodule("model.language_model.layers.1.self_attn")
    attention.scaling = attention.scaling * 1.1
    found = diff(model, path)
    assert [finding.fault.id for finding in found.findings if finding.fault] == ["attention-scale"]
    assert found.findings[0].layers == (1,)
