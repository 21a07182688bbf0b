"""What each quantized tensor alone does to the logits is what it does when it is put into the model by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import parity
from impl.qwen3 import load
from parity.reference.batch import Batch
from parity.reference.checkpoint import find
from parity.reference.module_weights import ModuleWeights
from parity.reference.weight_cost import weight_costs
from tests import checkpoints
from tests.quantized_tensor import Int8

IDS = torch.tensor([[5, 17, 80, 3, 44, 201, 9, 9, 130, 77, 62, 250, 11]])


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.qwen3(tmp_path_factory.mktemp("cost") / "model", layers=2, dtype="float32", tied=True)


def quantized(path: Path, coarser: float = 4.0, every: int = 1) -> dict[str, Tensor]:
    """Matrices in int8; those of layer 1 in coarser steps, so that they do not all cost the same."""
    named = _stock(path, torch.float32).named_parameters()
    matrices = {name: parameter.detach() for name, parameter in named if parameter.dim() == 2}
    return {
        name: Int8.of(matrices[name], coarser=coarser if "layers.1." in name else 1) for name in list(matrices)[::every]
    }


def _stock(path: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


@torch.no_grad()
def by_hand(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    model = _stock(path, dtype)
    plain, costs = model(IDS).logits.double(), {}
    for name, tensor in tensors.items():
        parameter = model.get_parameter(name)
        before = parameter.data.clone()
        parameter.data.copy_(tensor.dequantize())
        costs[name] = float((model(IDS).logits.double() - plain).norm() / plain.norm())
        parameter.data.copy_(before)
    return costs


@torch.no_grad()
def rounding(path: Path) -> float:
    """How far logits in float32 are off those in float64."""
    exact, rounded = _stock(path, torch.float64)(IDS).logits, _stock(path, torch.float32)(IDS).logits
    return float((rounded.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("which", [pytest.param("tiny", marks=pytest.mark.slow), "tied"])
def test_costs_and_ranks_are_those_of_one_at_a_time(which: str, tiny: Path, tied: Path) -> None:
    path = tiny if which == "tiny" else tied
    tensors = quantized(path, every=3 if which == "tiny" else 1)
    checkpoint = replace(find(str(path)), weights=ModuleWeights("test", tensors))
    costs = weight_costs(checkpoint, Batch.of(IDS), "cpu", "eager")
    expected = by_hand(path, tensors, torch.float64)
    assert costs.keys() == expected.keys()
    # Both logits of a difference are rounded, in an order of their own: twice the rounding of one.
    off = 2 * rounding(path)
    assert all(abs(costs[name] - expected[name]) <= off for name in costs)
    ranked = sorted(costs, key=costs.__getitem__, reverse=True)
    right = sorted(expected, key=expected.__getitem__, reverse=True)
    # Places differ only among costs that rounding cannot tell apart.
    assert all(abs(expected[a] - expected[b]) <= 2 * off for a, b in zip(ranked, right, strict=True))
    assert min(costs.values()) > 10 * off  # so that a cost of nothing would be seen


@pytest.mark.slow
def test_a_large_checkpoint_costs_the_same_piece_by_piece(tied: Path, one_piece_at_a_time: None) -> None:
    tensors = quantized(tied)
    checkpoint = replace(find(str(tied)), weights=ModuleWeights("test", tensors))
    costs = weight_costs(checkpoint, Batch.of(IDS), "cpu", "eager")
    expected, off = by_hand(tied, tensors, torch.float64), 2 * rounding(tied)
    assert all(abs(costs[name] - expected[name]) <= off for name in expected)


@pytest.mark.slow
def test_padding_does_not_count(tied: Path) -> None:
    checkpoint = replace(find(str(tied)), weights=ModuleWeights("test", quantized(tied)))
    alone = weight_costs(checkpoint, Batch.of(IDS), "cpu", "eager")
    row = IDS[0].tolist()
    padded = Batch.of_rows(((0, 0, 0, *row),), ((0, 0, 0, *[1] * len(row)),), None)
    costs = weight_costs(checkpoint, padded, "cpu", "eager")
    off = 4 * rounding(tied)
    assert all(abs(costs[name] - alone[name]) <= off for name in alone)


def test_they_are_ranked_in_the_report_where_that_is_asked_for(tied: Path) -> None:
    port = load(tied, "float32")
    tensors = quantized(tied, coarser=1.0)
    for name, tensor in tensors.items():
        module, _, own = name.rpartition(".")
        if "_proj" in name:
            port.get_submodule(module)._parameters[own] = tensor
    ids = " ".join(map(str, IDS[0].tolist()))
    found = parity.diff(port, model=str(tied), tokens=ids, power=False, rank_weights=True)
    costs = [error.cost for error in found.weights]
    assert found.verdict == "match"
    assert len(costs) == 14
    assert costs == sorted(costs, key=lambda cost: -(cost or 0.0))
    assert min(cost or 0.0 for cost in costs) > 0
