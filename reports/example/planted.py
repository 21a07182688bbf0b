"""A candidate with two bugs planted in it, for the example report: RoPE rotates the wrong pairs, one layer has GELU."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from impl import qwen3


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[2i], x[2i + 1]) of x (b, h, t, d): right for other checkpoints, wrong for Qwen3."""
    half = x.shape[-1] // 2
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Planted(qwen3.Qwen3):
    """The model, with the first bug while it runs."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """Logits (b, t, vocab), as they should not be."""
        with mock.patch.object(qwen3, "rotate", rotate_interleaved):
            return super().forward(*arguments, **options)


def load(model_dir: str | Path, dtype: torch.dtype, device: str) -> qwen3.Qwen3:
    """The factory that `parity diff --candidate` calls; it plants the second bug in layer 14."""
    model = qwen3.load(model_dir, dtype, device)
    model.__class__ = Planted
    model.model.layers[14].mlp.act_fn = nn.GELU()  # type: ignore[union-attr, assignment]
    return model
