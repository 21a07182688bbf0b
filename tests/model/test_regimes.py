"""Precision regimes: accepted where the candidate is proved to compute in one, and only there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import parity
from impl.qwen3 import load
from parity.errors import UsageError
from parity.results import Comparison
from tests import checkpoints
from tests.conftest import slow_but
from tests.planted import BUGS, build
from tests.planted.attention import attending, grouped, in_fp16, plain_scores
from tests.planted.base import rebind

TOKENS = "5 17 80 3 44 201 9 9 130 77 62 250 11"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.qwen3(tmp_path_factory.mktemp("regimes") / "model", layers=2, dtype="float32")


def planted(id: str, model: Path, layers: Sequence[int] = (0, 1), also: str = "") -> Any:
    bugs = {bug.id: bug for bug in BUGS}
    port = build(bugs[id], model, "float32", list(layers))
    if also:
        bugs[also].apply(port, list(layers))
    return port


def diff(port: Any, model: Path, accept: str | None = None) -> Comparison:
    return parity.diff(port, model=str(model), tokens=TOKENS, dtype="float32", power=False, accept=accept)


def named(found: Comparison) -> list[str]:
    return [finding.fault.id if finding.fault else "unknown" for finding in found.findings]


@pytest.mark.parametrize("regime", slow_but(["attention-operands-fp16"], ["attention-operands-fp16", "kv-cache-fp16"]))
def test_an_accepted_regime_is_a_match_in_it(regime: str, model: Path) -> None:
    plain = diff(planted(regime, model), model)
    assert (plain.verdict, named(plain)) == ("diverged", [regime])
    found = diff(planted(regime, model), model, regime)
    assert (found.verdict, found.findings) == ("match", ())
    assert [f.fault.id for f in found.accepted if f.fault] == [regime]
    assert {m.site for m in found.sites if m.regime} == set(plain.findings[0].sites)
    assert found.headline.endswith(f", in the accepted regime {regime}")
    assert found.sites[-1].mse == plain.sites[-1].mse  # against the reference itself


# -- regimes of llama.cpp, for whole blocks ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
    return checkpoints.qwen3(tmp_path_factory.mktemp("blocks") / "model", layers=1, dtype="float32", **sizes)


def q8_0(heads: torch.Tensor) -> torch.Tensor:
    """32 numbers at a time: integers by a step that float16 holds, made with the step before it was rounded."""
    parts = []
    for part in heads.split(32, -1):
        largest = part.abs().amax(-1, keepdim=True)
        parts.append(torch.round(part * (127 / largest.clamp_min(1e-30))) * (largest / 127).half().float())
    return torch.cat(parts, -1)


def q8_k(row: torch.Tensor) -> torch.Tensor:
    """256 numbers at a time: that with the largest magnitude becomes -127, whatever its sign."""
    parts = []
    for part in row.split(256, -1):
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        inverse = -127 / torch.where(high > -low, high, low)
        parts.append(torch.round(inverse * part).clamp_max(127) * (1 / inverse))
    return torch.cat(parts, -1)


def cached_in_blocks(port: Any, rounded: Callable[[torch.Tensor], torch.Tensor] = q8_0) -> None:
    attending(
        scores=lambda self, q, k, mask: plain_scores(self, rounded(q), k, mask),
        group_k=lambda self, heads: grouped(self, rounded(heads)),
        group_v=lambda self, heads: grouped(self, rounded(heads)),
    )(port, [0])


def multiplied_in_blocks(port: Any) -> None:
    for name, module in port.named_modules():
        if name.endswith("_proj"):
            rebind(module, lambda self, x: functional.linear(q8_k(x), self.weight, self.bias))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("regime", "plant"), [("kv-cache-q8-0", cached_in_blocks), ("products-q8-k-inputs", multiplied_in_blocks)]
)
def test_blocks_of_llama_cpp_are_a_match_in_their_regime(regime: str, plant: Any, in_blocks: Path) -> None:
    port = load(in_blocks, "float32")
    plant(port)
    for accept, verdict in ((None, "diverged"), (regime, "match")):
        found = diff(port, in_blocks, accept)
        named = {f.fault.id for f in (*found.findings, *found.accepted) if f.fault}
        assert (found.verdict, named) == (verdict, {regime})


@pytest.mark.slow
def test_a_cache_in_coarser_blocks_is_not_accepted(in_blocks: Path) -> None:
    port = load(in_blocks, "float32")
    cached_in_blocks(port, lambda heads: q8_0(heads) * 1.01)
    found = diff(port, in_blocks, "kv-cache-q8-0")
    assert (found.verdict, found.accepted) == ("diverged", ())


@pytest.mark.slow
def test_another_regime_is_not_accepted(model: Path) -> None:
    found = diff(planted("kv-cache-int8", model), model, "kv-cache-fp16,attention-operands-fp16")
    assert (found.verdict, found.accepted, named(found)) == ("diverged", (), ["kv-cache-int8"])


def test_a_right_port_is_in_no_regime(model: Path) -> None:
    found = diff(load(model, "float32"), model, "kv-cache-fp16,products-bf16-inputs")
    assert (found.verdict, found.accepted) == ("match", ())
    assert not any(m.regime for m in found.sites)
    assert found.headline == "every operation is within the reference's own rounding"


@pytest.mark.slow
def test_a_regime_of_one_layer_is_accepted_there_alone(model: Path) -> None:
    found = diff(planted("attention-operands-fp16", model, [1]), model, "attention-operands-fp16")
    assert (found.verdict, [f.layers for f in found.accepted]) == ("match", [(1,)])
    assert {m.site for m in found.sites if m.regime} == {"model.layers.1.self_attn.context"}


@pytest.mark.slow
def test_a_bug_elsewhere_stays_a_finding(model: Path) -> None:
    found = diff(planted("kv-cache-fp16", model, also="act-gelu-tanh"), model, "kv-cache-fp16")
    assert (found.verdict, named(found)) == ("diverged", ["act-gelu-tanh"])
    assert [f.fault.id for f in found.accepted if f.fault] == ["kv-cache-fp16"]


@pytest.mark.slow
def test_a_bug_of_the_same_operation_is_named_on_top_of_the_regime(model: Path) -> None:
    port = load(model, "float32")
    attending(group_k=in_fp16, group_v=lambda self, heads: in_fp16(self, heads.roll(-1, 1)))(port, [0, 1])
    found = diff(port, model, "kv-cache-fp16")
    assert (found.verdict, found.accepted, named(found)) == ("diverged", (), ["v-head-shifted"])
    assert "on top of the accepted regime kv-cache-fp16" in found.findings[0].evidence


def test_what_one_token_shows_is_read_as_no_bias(model: Path) -> None:
    port = load(model, "float32")
    own = port.model.layers[0].self_attn.q_proj
    rebind(own, lambda self, x: functional.linear(x, self.weight).mul(7).tanh())
    found = parity.diff(port, model=str(model), tokens="5 " * 24, dtype="float32", power=False)
    assert (found.verdict, [f.sites for f in found.findings]) == ("diverged", [("model.layers.0.self_attn.q_proj",)])
    assert named(found) == ["unknown"]


def test_a_bug_is_no_regime(model: Path) -> None:
    with pytest.raises(UsageError, match=r"--accept norm-eps: that is a bug, no precision regime\. Regimes are "):
        diff(load(model, "float32"), model, "norm-eps")
