"""Integrity: a reference that is none, and a candidate with other weights, are noticed before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impl.qwen3 import Qwen3, load
from parity.reference.checkpoint import Checkpoint, find
from parity.reference.integrity import reference_checks, weight_check
from parity.reference.pieces import PiecewiseModel
from parity.results import Check
from tests.planted.base import set_weight

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
FREQUENCIES, DETERMINISM = "reference RoPE frequencies", "reference determinism"


def built(path: Path, dtype: torch.dtype = torch.bfloat16) -> PiecewiseModel:
    return PiecewiseModel(find(str(path)), dtype)


def checks(model: PiecewiseModel) -> dict[str, Check]:
    return {c.name: c for c in reference_checks(model, IDS)}


# -- the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "gpt_neox"])
def test_a_sound_reference(checkpoint: Callable[..., Path], model_type: str, dtype: torch.dtype) -> None:
    found = checks(built(checkpoint(model_type), dtype))
    assert set(found) == {"reference in pieces", FREQUENCIES, "reference TF32", DETERMINISM}
    assert all(c.ok for c in found.values()), found
    assert "one in memory at a time" in found["reference in pieces"].detail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_rope_frequencies_are_noticed(small: Path, dtype: torch.dtype) -> None:
    model = built(small)
    rotary = model.model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to(dtype)  # what model.to(bfloat16) does
    found = checks(model)
    assert not found[FREQUENCIES].ok
    assert found[FREQUENCIES].detail == f"model.rotary_emb.inv_freq is {dtype}"
    assert found[DETERMINISM].ok


@pytest.mark.parametrize("where", ["model.embed_tokens", "model.layers.0", "model.layers.0.mlp.act_fn"])
def test_a_reference_that_gives_other_numbers_each_time_is_noticed(small: Path, where: str) -> None:
    model = built(small, torch.float32)

    def shake(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + 1e-3 * torch.randn(output.shape)

    model.model.get_submodule(where).register_forward_hook(shake)
    found = checks(model)
    assert not found[DETERMINISM].ok
    assert found[FREQUENCIES].ok


@pytest.mark.usefixtures("one_piece_at_a_time")
def test_the_checks_leave_nothing_in_memory(small: Path) -> None:
    model = built(small)
    checks(model)
    assert all(p.is_meta for p in model.model.parameters())


# -- the candidate's weights ---------------------------------------------------------------------------------


@pytest.fixture
def candidate(small: Path) -> Qwen3:
    return load(small, "bfloat16")


@pytest.fixture
def source(small: Path) -> Checkpoint:
    return find(str(small))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_equal_weights(small: Path, source: Checkpoint, dtype: str) -> None:
    found = weight_check(load(small, dtype), source)
    assert found == Check("candidate weights", True, "25 tensors equal to the checkpoint")


def test_tied_and_sharded_weights(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3", tied=True, shards=3)
    found = weight_check(load(path, "bfloat16"), find(str(path)))
    assert found.ok
    assert "equal to the checkpoint" in found.detail


def test_a_stock_model_has_equal_weights(small: Path, source: Checkpoint) -> None:
    from transformers import AutoModelForCausalLM

    assert weight_check(AutoModelForCausalLM.from_pretrained(small), source).ok


def projection(model: Qwen3, name: str, layer: int = 1) -> nn.Linear:
    module = model.model.layers[layer].get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def test_a_changed_share_is_told(candidate: Qwen3, source: Checkpoint) -> None:
    weight = projection(candidate, "mlp.down_proj").weight.clone()
    weight[: len(weight) // 4] += 1
    set_weight(projection(candidate, "mlp.down_proj"), weight)
    found = weight_check(candidate, source)
    assert not found.ok
    assert found.detail == "model.layers.1.mlp.down_proj.weight differs from the checkpoint in 25% of its numbers"


def test_one_changed_number_is_enough(candidate: Qwen3, source: Checkpoint) -> None:
    weight = candidate.model.norm.weight.clone()
    weight[3] = torch.nextafter(weight[3], torch.tensor(torch.inf, dtype=weight.dtype))
    set_weight(candidate.model.norm, weight)
    found = weight_check(candidate, source)
    assert not found.ok
    assert "model.norm.weight differs" in found.detail


def test_another_tensor_is_named(candidate: Qwen3, source: Checkpoint) -> None:
    set_weight(projection(candidate, "mlp.gate_proj"), projection(candidate, "mlp.up_proj").weight)
    found = weight_check(candidate, source)
    assert found.detail == "model.layers.1.mlp.gate_proj.weight holds model.layers.1.mlp.up_proj.weight"


def test_the_tensor_of_another_layer_is_named(candidate: Qwen3, source: Checkpoint) -> None:
    set_weight(projection(candidate, "self_attn.v_proj"), projection(candidate, "self_attn.v_proj", 0).weight)
    found = weight_check(candidate, source)
    assert found.detail == "model.layers.1.self_attn.v_proj.weight holds model.layers.0.self_attn.v_proj.weight"


def test_exchanged_tensors_are_both_wrong(candidate: Qwen3, source: Checkpoint) -> None:
    gate, up = (projection(candidate, f"mlp.{n}_proj") for n in ("gate", "up"))
    first, second = gate.weight.clone(), up.weight.clone()
    set_weight(gate, second)
    set_weight(up, first)
    found = weight_check(candidate, source)
    assert found.detail.endswith("(and 1 more)")


def test_a_transposed_matrix_is_named(candidate: Qwen3, source: Checkpoint) -> None:
    set_weight(projection(candidate, "mlp.down_proj"), projection(candidate, "mlp.down_proj").weight.T)
    assert weight_check(candidate, source).detail == "model.layers.1.mlp.down_proj.weight is transposed"


def test_a_transposed_square_matrix_is_named(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3", layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = load(path, "bfloat16")
    query = projection(model, "self_attn.q_proj")
    assert query.weight.shape == (80, 80)
    assert weight_check(model, find(str(path))).ok
    set_weight(query, query.weight.T)
    assert weight_check(model, find(str(path))).detail == "model.layers.1.self_attn.q_proj.weight is transposed"


def test_another_shape_is_told_with_both(candidate: Qwen3, source: Checkpoint) -> None:
    set_weight(projection(candidate, "mlp.down_proj"), projection(candidate, "mlp.down_proj").weight[:, :-2])
    found = weight_check(candidate, source)
    assert found.detail == "model.layers.1.mlp.down_proj.weight has shape (80, 110), the checkpoint has (80, 112)"


def test_rounding_to_a_narrower_dtype_is_no_difference(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3", layers=2, dtype="float32")
    assert weight_check(load(path, "bfloat16"), find(str(path))).ok
    assert weight_check(load(path, "float32"), find(str(path))).ok


def test_fp32_weights_that_went_through_bf16_differ(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3", layers=2, dtype="float32")
    model = load(path, "float32").bfloat16().float()
    found = weight_check(model, find(str(path)))
    assert not found.ok
    assert "differs from the checkpoint in" in found.detail


def test_other_names_are_no_fault(candidate: Qwen3, source: Checkpoint) -> None:
    block = candidate.model.layers[0].mlp
    block.gate_up = nn.Parameter(torch.cat([block.gate_proj.weight, block.up_proj.weight]))
    del block.gate_proj, block.up_proj
    found = weight_check(candidate, source)
    assert found == Check("candidate weights", True, "23 tensors equal to the checkpoint, 1 under other names")


def test_nothing_in_common_is_said(source: Checkpoint) -> None:
    found = weight_check(nn.Linear(3, 3), source)
    assert "0 tensors equal" in found.detail
    assert "2 under other names" in found.detail


def test_a_reference_that_is_nan_twice_is_the_same_twice(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(small)
    plain = model.run
    monkeypatch.setattr(model, "run", lambda *args: plain(*args) * float("nan"))
    assert checks(model)[DETERMINISM].ok
