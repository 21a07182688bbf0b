"""Bugs bear their names in decoders that call nothing as Llama does; what is merely written otherwise bears none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.candidates.base import open_candidate
from parity.compare.pipeline import diff
from parity.diagnose.workbench import Workbench
from parity.faults import by_id
from parity.options import RunOptions
from parity.record.tap import quiet_torch
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.results import BAD, Comparison
from parity.run_spec import RunSpec
from tests.architectures import make
from tests.bench.architecture_bugs import activation, attention_scale, layers_of, norm_eps, other_theta, residual_branch
from tests.conftest import slow_but

IDS = tuple((i * 37 + 11) % 200 + 3 for i in range(24))
Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of an architecture, written once."""
    folder = tmp_path_factory.mktemp("names")
    return lambda name: folder / name if (folder / name).exists() else make(name, folder / name)


def compared(path: Path, change: Change) -> Comparison:
    """A model of transformers with a change, or made from a changed config, compared in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    if change is other_theta:
        change(config)
    with quiet_torch():
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    if change is not other_theta:
        change(model)
    options = RunOptions(model=str(path), dtype="float32", power=False)
    run = RunSpec(find(str(path)), (IDS,), "float32", options)
    return diff(run, open_candidate(model), None)


def last_layer(model: nn.Module) -> Any:
    return model.get_submodule(layers_of(model))[-1]


def scaled_mlp(model: nn.Module) -> None:
    mlp = last_layer(model).mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) * 0.7


@dataclass(frozen=True)
class Case:
    """A bug in an architecture, its name, its number, and what it cannot be told from."""

    architecture: str
    plant: Change
    fault: str
    number: float | None = None
    rivals: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.architecture}-{self.fault}"


CASES = [
    Case("gpt2", norm_eps, "norm-eps", 0.1),
    Case("phi", residual_branch, "parallel-attention-multiplier", 1.2),
    Case("opt", attention_scale, "attention-scale", 1.1 * 0.25),
    Case("jamba", norm_eps, "norm-eps", 0.1),
    Case("deepseek_v3", norm_eps, "norm-eps", 0.1),
    Case("opt", activation, "act-silu"),
    Case("mpt", activation, "act-silu"),
    Case("mpt", attention_scale, "attention-scale", 1.1 * 0.25),
    Case("bloom", attention_scale, "attention-scale", 1.1 * 0.25),
    Case("gptj", attention_scale, "attention-scale", 0.25 / 1.1),
    Case("phi", scaled_mlp, "parallel-mlp-multiplier", 0.7),
    Case("mamba", residual_branch, "residual-multiplier", 1.2),
    Case("minimax", residual_branch, "residual-multiplier", 1.2),
    Case("bloom", residual_branch, "residual-multiplier", 1.2),
    Case("bert", residual_branch, "residual-multiplier", 1.2),
    Case("cohere", other_theta, "rope-theta", 1.5e6),  # tables in pairs
    Case("deepseek_v2", other_theta, "rope-theta", 3e4),  # tables of complex numbers
    Case("phi3", other_theta, "rope-theta", 3e4),  # other angles for a longer prompt
    Case("falcon", other_theta, "rope-theta", 3e4),  # nothing seen before attention's output
    Case("nanochat", other_theta, "rope-theta", 3e4),  # a norm behind the rotation
    Case("qwen3_5", other_theta, "rope-theta", 3e4),  # tables that are a site
    Case("olmo2", residual_branch, "branch-multiplier-before-norm", 1.2, ("norm-eps",)),
]


@pytest.mark.parametrize("case", slow_but(CASES[:1], CASES), ids=str)
def test_a_bug_bears_its_name_whatever_the_modules_are_called(case: Case, architecture: Callable[[str], Path]) -> None:
    (finding,) = compared(architecture(case.architecture), case.plant).findings
    assert finding.fault is not None, finding.sites
    assert finding.fault.id == case.fault
    assert finding.fault.rivals == case.rivals
    if case.number is not None:
        (read,) = finding.fault.reads.values()
        assert read.value == pytest.approx(case.number, rel=0.02 if case.rivals else 1e-4)


@pytest.mark.slow
def test_keys_that_layers_share_are_the_candidates_own(architecture: Callable[[str], Path]) -> None:
    """Layers that attend to keys of an earlier layer, turned by a wrong theta there, are not wrong themselves."""
    result = compared(architecture("gemma3n"), other_theta)
    bad = [site.site for site in result.sites if site.verdict in BAD]
    assert {site.rpartition(".")[2] for site in bad} == {"q_rope", "k_rope"}
    read = {finding.fault.reads["theta"].value for finding in result.findings if finding.fault}
    assert sorted(read) == pytest.approx([3e4, 3e6], rel=1e-4), "each kind of layer has a theta of its own"


def norms_by_hand(model: nn.Module) -> None:
    """LayerNorm in double precision."""
    for norm in [m for m in model.modules() if isinstance(m, nn.LayerNorm)]:
        weight, bias = norm.weight.double(), norm.bias.double()

        def forward(x: Tensor, weight: Tensor = weight, bias: Tensor = bias, eps: float = norm.eps) -> Tensor:
            return F.layer_norm(x.double(), weight.shape, weight, bias, eps).to(x.dtype)

        norm.forward = forward  # type: ignore[method-assign]


def summed_from_the_left(model: nn.Module) -> None:
    """The stream comes first in the sum of a parallel block."""
    for layer in model.get_submodule(layers_of(model)):

        def forward(x: Tensor, *args: Any, layer: Any = layer, **kwargs: Any) -> Tensor:
            normed = layer.input_layernorm(x)
            attended: Tensor = layer.self_attn(normed, *args, **kwargs)[0]
            return x + attended + layer.mlp(normed)

        layer.forward = forward


def relu_by_sign(model: nn.Module) -> None:
    for layer in model.get_submodule(layers_of(model)):
        layer.activation_fn.forward = lambda x: (x + x.abs()) / 2


def scaled_with_its_eps(model: nn.Module) -> None:
    """Attention gives twice as much, and the norm behind it has four times the eps: nothing is changed."""
    layer = last_layer(model)
    own = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, **kwargs: (own(*args, **kwargs)[0] * 2, None)
    layer.post_attention_layernorm.variance_epsilon *= 4


def tables_in_double(model: nn.Module) -> None:
    """Angles multiplied in double precision."""
    rotary = next(m for m in model.modules() if hasattr(m, "compute_default_rope_parameters"))
    own = rotary.forward

    def forward(x: Tensor, position_ids: Tensor) -> Any:
        phases = position_ids[..., None].double() * rotary.inv_freq.double()
        if isinstance(own(x, position_ids), Tensor):
            return torch.polar(torch.ones_like(phases), phases).to(torch.complex64)
        twice = phases.repeat_interleave(2, -1)
        return twice.cos().to(x.dtype), twice.sin().to(x.dtype)

    rotary.forward = forward


LEGAL: list[tuple[str, Change]] = [
    ("cohere", tables_in_double),
    ("deepseek_v2", tables_in_double),
    ("gpt2", norms_by_hand),
    ("phi", summed_from_the_left),
    ("opt", relu_by_sign),
    ("olmo2", scaled_with_its_eps),
    ("mpt", lambda _model: None),
    ("bloom", lambda _model: None),
]


@pytest.mark.parametrize("legal", slow_but(LEGAL[2:3], LEGAL), ids=lambda legal: legal[0])
def test_what_is_written_otherwise_is_left_alone(
    legal: tuple[str, Change], architecture: Callable[[str], Path]
) -> None:
    name, change = legal
    result = compared(architecture(name), change)
    assert not result.findings
    assert result.verdict == "match", result.headline


def test_the_right_eps_is_that_of_the_norm_in_question(architecture: Callable[[str], Path]) -> None:
    path = architecture("deepseek_v3")
    options = RunOptions(model=str(path), dtype="float32", power=False)
    run = RunSpec(find(str(path)), (IDS,), "float32", options)
    reference = Reference(run.model())
    bench = Workbench(reference, run.ids, lambda _site: None)
    inner = "model.layers.1.self_attn.q_a_layernorm"
    reference.working.model.get_submodule(inner).variance_epsilon = 0.25
    reference.prepare(run.ids)
    assert bench.expected(by_id("norm-eps"), 1, inner) == 0.25
    assert bench.expected(by_id("norm-eps"), 1, "model.layers.1.input_layernorm") == pytest.approx(1e-6)
