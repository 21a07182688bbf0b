"""Quantized weights are read back, and what is worse than a format allows is told from what is rounded to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity.errors import ModelError
from parity.quantization import WeightError
from parity.reference.checkpoint import find
from tests import checkpoints
from tests.gguf_file import Damage, write_gguf

pytest.importorskip("gguf", reason="gguf is not installed")

from parity.reference.gguf_weights import GgufWeights
from parity.reference.weight_error import weight_errors

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32}
    path = tmp_path_factory.mktemp("weights") / "model"
    return checkpoints.qwen3(path, layers=2, dtype="float32", num_key_value_heads=1, **sizes)


def errors(model: Path, folder: Path, kind: str, damage: dict[str, Damage] | None = None) -> dict[str, WeightError]:
    file = write_gguf(model, folder / "model.gguf", kind, damage)
    return {e.tensor: e for e in weight_errors(replace(find(str(model)), weights=GgufWeights(file)))}


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_right_file_is_as_its_format_allows(kind: str, model: Path, tmp_path: Path) -> None:
    found = errors(model, tmp_path, kind)
    assert len(found) == 25
    assert found[GATE].format == kind
    assert all(e.ratio is not None and e.ratio <= 1 and not e.how for e in found.values())
    assert (found[GATE].relative > 0) is (kind != "F32")


def doubled(blocks: np.ndarray[Any, Any]) -> None:
    blocks[3, 1, :2].view(np.float16)[:] *= 2


def unscaled(blocks: np.ndarray[Any, Any]) -> None:
    blocks[3, :, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)


def exchanged(blocks: np.ndarray[Any, Any]) -> None:
    blocks[3] = blocks[3, ::-1].copy()


def another_row(blocks: np.ndarray[Any, Any]) -> None:
    blocks[3] = blocks[7]


def interleaved(blocks: np.ndarray[Any, Any]) -> None:
    low, high = blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4
    numbers = np.stack([low, high], -1).reshape(*blocks.shape[:2], 32)
    blocks[:, :, 2:] = numbers[..., :16] | numbers[..., 16:] << 4


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [
        ("Q8_0", doubled, "the scale of block 1 of row 3 is 2 times too large; wrong are 1 of 192 blocks, in 1 of 96"),
        ("Q4_0", doubled, "the scale of block 1 of row 3 is 2 times too large; wrong are 1 of 192 blocks, in 1 of 96"),
        ("Q8_0", unscaled, " times too large; wrong are 2 of 192 blocks, in 1 of 96 rows, first in row 3"),
        ("Q8_0", exchanged, "block 0 of row 3 holds block 1; wrong are 2 of 192 blocks"),
        ("Q4_0", exchanged, "block 0 of row 3 holds block 1; wrong are 2 of 192 blocks"),
        ("Q8_0", another_row, "row 3 holds row 7; wrong are 2 of 192 blocks"),
        ("Q4_0", interleaved, "block 0 of row 0 has its halves interleaved; wrong are "),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_was_done_to_a_tensor_is_told(
    kind: str, damage: Callable[..., None], said: str, model: Path, tmp_path: Path
) -> None:
    found = errors(model, tmp_path, kind, {"blk.1.ffn_gate.weight": damage})
    bad = {name: e.how for name, e in found.items() if e.ratio is None or e.ratio > 1}
    assert list(bad) == [GATE]
    assert said in bad[GATE]


def test_another_tensor_is_told(model: Path, tmp_path: Path) -> None:
    from tests.gguf_file import quantized

    other = find(str(model)).tensor("model.layers.0.mlp.gate_proj.weight").float().numpy()

    def put(blocks: np.ndarray[Any, Any]) -> None:
        blocks[:] = quantized(other, "Q8_0")

    found = errors(model, tmp_path, "Q8_0", {"blk.1.ffn_gate.weight": put})
    assert found[GATE].how == "it holds model.layers.0.mlp.gate_proj.weight"


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no GGUF")
    with pytest.raises(ModelError, match="not readable as GGUF"):
        GgufWeights(tmp_path / "x.gguf")
