"""Random checkpoints of other kinds, for bugs that need a bias, wide rows, float32 weights or ungrouped heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import checkpoints

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    # Biases, stored in float32, rows of whole blocks of 32, and k_proj rows that q_proj's heads divide.
    "wide": {
        "bias": True,
        "dtype": "float32",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 24,
    },
    "mha": {"num_key_value_heads": 6},
}


def checkpoint(needs: str, folder: Path, layers: int) -> Path:
    """Write a checkpoint that has what a variant needs to a folder of its own in `folder`, once."""
    kind = needs if needs in KINDS else "plain"
    path = folder / kind
    return path if path.exists() else checkpoints.qwen3(path, layers=layers, **KINDS[kind])
