"""The reference checks itself: where it is not what from_pretrained gives, or its truth another model, no verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parity
from parity.diagnose.workbench import Workbench
from parity.reference import self_check, weights
from parity.reference.checkpoint import find
from parity.reference.pieces import PiecewiseModel
from parity.reference.replay import Reference
from parity.results import Check
from tests.architectures import make
from tests.builders import LONG_IDS
from tests.conftest import slow_but

STOCK, NUMBERS, AGREE = (
    "reference is from_pretrained",
    "truth has the reference's numbers",
    "truth agrees with reference",
)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("deepseek_v3", tmp_path_factory.mktemp("self_check") / "deepseek_v3")


def reference(path: Path, dtype: torch.dtype = torch.bfloat16) -> Reference:
    return Reference(PiecewiseModel(find(str(path)), dtype))


def checks(of: Reference) -> dict[str, Check]:
    return {check.name: check for check in self_check.checked(of, LONG_IDS)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_sound_reference(deepseek: Path, dtype: torch.dtype) -> None:
    found = checks(reference(deepseek, dtype))
    assert set(found) == {STOCK, NUMBERS, AGREE}
    assert all(check.ok and check.vital for check in found.values()), found
    assert found[STOCK].detail.startswith("bit-equal at ")


def test_buffers_that_the_truth_computes_anew_are_noticed(deepseek: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cast = weights.cast

    def without_buffers(mine: nn.Module, theirs: nn.Module, *rest: Any) -> None:
        cast(mine, theirs, *rest)
        for name, buffer in mine._buffers.items():
            if name == "e_score_correction_bias" and buffer is not None:
                mine._buffers[name] = torch.zeros_like(buffer)

    monkeypatch.setattr("parity.reference.pieces.cast", without_buffers)
    found = checks(reference(deepseek))
    assert not found[NUMBERS].ok
    assert found[NUMBERS].detail.startswith("model.layers.1.mlp.gate.e_score_correction_bias: ")
    assert found[STOCK].ok


def test_a_narrow_tensor_left_in_the_truth_is_noticed(small: Path) -> None:
    of = reference(small, torch.float32)
    with of.precise.loaded(0):
        of.precise.model.model.rotary_emb.inv_freq = of.precise.model.model.rotary_emb.inv_freq.float()
        found = checks(of)
    assert not found[NUMBERS].ok
    assert found[NUMBERS].detail.startswith("model.rotary_emb.inv_freq: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_operation_that_is_not_the_stock_model_s_is_named(small: Path, dtype: torch.dtype) -> None:
    of = reference(small, dtype)
    for model in (of.working, of.precise):
        model.layers[1].mlp.act_fn = nn.Tanh()
    found = checks(of)
    assert not found[STOCK].ok
    assert found[STOCK].detail.startswith("model.layers.1.mlp.act_fn: ")
    assert found[NUMBERS].ok
    assert found[AGREE].ok


def test_an_operation_that_only_the_truth_does_otherwise_is_named(small: Path) -> None:
    of = reference(small, torch.float32)
    of.precise.layers[1].mlp.act_fn = nn.GELU()
    found = checks(of)
    assert found[STOCK].ok
    assert not found[AGREE].ok
    assert found[AGREE].detail.startswith("model.layers.1.mlp.act_fn: ")


def test_a_large_model_is_checked_by_the_first_layer_of_each_kind(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parity.reference.pieces.SMALL", 0)
    of = reference(checkpoint("gemma3_text"))
    loaded: list[object] = []
    original = PiecewiseModel._load
    monkeypatch.setattr(
        PiecewiseModel, "_load", lambda self, pieces: (loaded.extend(pieces), original(self, pieces))[1]
    )
    found = checks(of)
    assert all(check.ok for check in found.values())
    assert set(loaded) == {"embed", 0, 1}, "the third layer is like the first"
    of.working.layers[1].mlp.act_fn.forward = torch.tanh
    assert checks(of)[STOCK].detail.startswith("model.layers.1.mlp.act_fn: ")


@pytest.mark.parametrize("wrong", [False, True], ids=["right candidate", "wrong candidate"])
def test_a_reference_at_fault_gives_no_verdict(small: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    broken = [Check(STOCK, False, "model.layers.1.mlp.act_fn: not what the loaded model gives", vital=True)]
    monkeypatch.setattr("parity.compare.pipeline.self_check", lambda *_: broken)
    candidate = _stock(small)
    if wrong:
        candidate.model.layers[0].mlp.act_fn = nn.Tanh()
    found = parity.diff(candidate, model=str(small), tokens="3 1 4 1 5", dtype="bfloat16", power=False)
    assert found.verdict == "inconclusive"
    assert "model.layers.1.mlp.act_fn" in found.headline


def _stock(path: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


@pytest.mark.parametrize("method", ["applies", "expected"])
def test_no_trial_takes_the_verdict_away(small: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def fail(*_: object) -> None:
        raise AttributeError("this model has no such thing")

    monkeypatch.setattr(Workbench, method, fail)
    candidate = _stock(small, torch.float32)
    candidate.model.layers[0].mlp.act_fn = nn.Tanh()
    found = parity.diff(candidate, model=str(small), tokens="3 1 4 1 5", dtype="float32")
    assert found.verdict == "diverged"
    assert found.findings[0].sites == ("model.layers.0.mlp.act_fn",)
    assert found.power is not None
    assert "this model has no such thing" in {row.detail.partition(": ")[2] for row in found.power.not_tried}


@pytest.mark.parametrize("dtype", ["bfloat16", *slow_but([], ["float32"])])
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_a_port_without_the_correction_bias_is_no_match(
    tmp_path_factory: pytest.TempPathFactory, name: str, dtype: str
) -> None:
    path = make(name, tmp_path_factory.mktemp("bias") / name)
    tokens = " ".join(map(str, LONG_IDS[0].tolist()))
    candidate = _stock(path, getattr(torch, dtype))
    assert parity.diff(candidate, model=str(path), tokens=tokens, dtype=dtype, power=False).verdict == "match"
    for layer in candidate.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.e_score_correction_bias.zero_()
    found = parity.diff(candidate, model=str(path), tokens=tokens, dtype=dtype, power=False)
    assert found.verdict == "diverged"
    assert any(".mlp" in site for finding in found.findings for site in finding.sites)
