"""Every fault of routers and experts is named when it is planted, and no clean mixture is accused of one.

The plants are routers and experts written anew, not the catalogue's own changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from parity.candidates.torch_module import TorchModule
from parity.compare.pipeline import diff
from parity.faults import experts, router
from parity.options import RunOptions
from parity.record.tap import quiet_torch
from parity.reference.checkpoint import find
from parity.results import Comparison
from parity.run_spec import RunSpec
from tests.checkpoints import randomize
from tests.conftest import in_turn, slow_but

IDS = tuple((torch.arange(1, 201) * 37 % 199).tolist())
_SMALL = {
    "vocab_size": 211,
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
_LATENT = {"q_lora_rank": 30, "kv_lora_rank": 22, "qk_nope_head_dim": 14, "qk_rope_head_dim": 8, "v_head_dim": 12}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("qwen3_moe", {**_EXPERTS, "head_dim": 20, "norm_topk_prob": True}),
    "shared": ("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 50, "norm_topk_prob": False}),
    "grouped": (
        "deepseek_v3",
        {
            **_LATENT,
            "num_key_value_heads": 6,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "first_k_dense_replace": 0,
            "norm_topk_prob": True,
        },
    ),
    "alternating": ("gpt_oss", {"head_dim": 20, "num_local_experts": 12, "num_experts_per_tok": 3}),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("mixtures")

    def write(kind: str) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        path, (model_type, more) = root / kind, KINDS[kind]
        if not path.exists():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **_SMALL | more))
            randomize(model, seed=5)
            for name, buffer in model.named_buffers():
                if name.endswith("correction_bias"):
                    # Large beside its differences, as those of real checkpoints are: rounding it costs some.
                    buffer.copy_(2 + 0.2 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(7)))
            model.save_pretrained(path)
        return path

    return write


def stock(path: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_torch():
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()


def compared(path: Path, dtype: str, model: Any, tokens: int = len(IDS)) -> Comparison:
    run = RunSpec(find(str(path)), (IDS[:tokens],), dtype, RunOptions(power=False))
    return diff(run, TorchModule.of(model, {}))


# -- the plants ----------------------------------------------------------------------------------------------

Route = Callable[[Any, Tensor], tuple[Tensor, Tensor]]  # (router, float32 logits) → weights and index


def routing(route: Route) -> Callable[[Any], None]:
    """The router computes its logits as ever, and weights and choice so."""

    def plant(mlp: Any) -> None:
        gate = mlp.gate

        def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            flat = x.reshape(-1, gate.hidden_dim)
            wide = hasattr(gate, "e_score_correction_bias")
            logits = F.linear(flat.float(), gate.weight.float()) if wide else F.linear(flat, gate.weight)
            weights, index = route(gate, logits.float())
            return logits, weights.to(logits.dtype), index

        gate.forward = forward

    return plant


def soft(renormalize: bool, count: int = 0, score: Callable[[Tensor], Tensor] = lambda x: x.softmax(-1)) -> Any:
    def route(gate: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = score(logits).topk(count or gate.top_k, -1)
        return weights / weights.sum(-1, keepdim=True) if renormalize else weights, index

    return routing(route)


@dataclass(frozen=True)
class Grouped:
    """DeepSeek's rule with one thing changed."""

    score: Callable[[Tensor], Tensor] = torch.sigmoid
    bias: Callable[[Tensor], Tensor] = lambda b: b
    best: int = 2
    groups: bool = True
    biased_weights: bool = False
    renormalize: bool = True
    factor: float = 1.7

    def __call__(self, gate: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(logits)
        biased = scores + self.bias(gate.e_score_correction_bias.float())
        allowed = biased
        if self.groups:
            by_group = biased.view(len(biased), gate.num_group, -1)
            kept = by_group.sort(-1).values[..., -self.best :].sum(-1).argsort(-1)[:, -gate.topk_group :]
            mask = torch.full_like(by_group[..., 0], -torch.inf).scatter(1, kept, 0.0)
            allowed = (by_group + mask[..., None]).flatten(1)
        index = allowed.argsort(-1, descending=True)[:, : gate.top_k]
        weights = (biased if self.biased_weights else scores).gather(1, index)
        return (weights / weights.sum(-1, keepdim=True) if self.renormalize else weights) * self.factor, index


def adding(
    weigh: Callable[[Any, Tensor, Tensor], Tensor], order: Callable[[int], list[int]] = lambda n: list(range(n))
):
    """Experts one after another: `weigh(expert, its tokens (n, hidden), weights (n, 1))`, stacked in `order`."""

    def plant(mlp: Any) -> None:
        module = mlp.experts
        stacked = order(module.num_experts)

        def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            total = torch.zeros(x.shape, dtype=torch.float32)
            for number, place in enumerate(stacked):

                def expert(tokens: Tensor, place: int = place) -> Tensor:
                    gate, up = F.linear(tokens, module.gate_up_proj[place]).chunk(2, -1)
                    return F.linear(F.silu(gate) * up, module.down_proj[place])

                tokens, choice = torch.where(index == number)
                total.index_add_(0, tokens, weigh(expert, x[tokens], weights[tokens, choice, None]).float())
            return total.to(x.dtype)

        module.forward = forward

    return plant


def reordered(read: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """The rows of gate and up lie in another order than they are taken to."""

    def plant(mlp: Any) -> None:
        experts = mlp.experts
        if hasattr(experts, "gate_up_proj_bias"):
            experts.gate_up_proj.data = read(experts.gate_up_proj.data).contiguous()
            experts.gate_up_proj_bias.data = read(experts.gate_up_proj_bias.data).contiguous()
        else:
            experts.gate_up_proj.data = read(experts.gate_up_proj.data.mT).mT.contiguous()

    return plant


def with_shared(use: Callable[[Any, Tensor], Tensor]) -> Callable[[Any], None]:
    def plant(mlp: Any) -> None:
        def forward(x: Tensor) -> Tensor:
            flat = x.view(-1, x.shape[-1])
            _, weights, index = mlp.gate(flat)
            return (mlp.experts(flat, index, weights) + use(mlp, flat)).view(x.shape)

        mlp.forward = forward

    return plant


def ungated(mlp: Any, x: Tensor) -> Tensor:
    mlp.shared_expert_gate(x)
    return mlp.shared_expert(x)


def weighed(expert: Any, x: Tensor, w: Tensor) -> Tensor:
    return expert(x) * w


PLANTS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "moe-not-renormalized": ("softmax", soft(renormalize=False)),
    "moe-renormalized": ("shared", soft(renormalize=True)),
    "moe-sigmoid": ("softmax", soft(renormalize=True, score=torch.sigmoid)),
    "moe-top-k": ("softmax", soft(renormalize=True, count=2)),
    "moe-scaling-factor": ("grouped", routing(Grouped(factor=1.0))),
    "moe-bias-in-weights": ("grouped", routing(Grouped(biased_weights=True))),
    "moe-softmax": ("grouped", routing(Grouped(score=lambda x: x.softmax(-1)))),
    "moe-bias-ignored": ("grouped", routing(Grouped(bias=torch.zeros_like))),
    "moe-bias-rounded": ("grouped", routing(Grouped(bias=lambda b: b.bfloat16().float()))),
    "moe-groups-ignored": ("grouped", routing(Grouped(groups=False))),
    "moe-groups-by-best": ("grouped", routing(Grouped(best=1))),
    "moe-weights-ignored": ("softmax", adding(lambda expert, x, _w: expert(x))),
    "moe-weighted-twice": ("softmax", adding(lambda expert, x, w: expert(x) * w * w)),
    "moe-weighted-input": ("softmax", adding(lambda expert, x, w: expert(x * w))),
    "moe-experts-as-text": ("softmax", adding(weighed, lambda n: sorted(range(n), key=str))),
    "moe-gate-up-halves": ("alternating", reordered(lambda w: torch.stack(w.chunk(2, -1), -1).flatten(-2))),
    "moe-gate-up-alternating": ("softmax", reordered(lambda w: torch.cat((w[..., 0::2], w[..., 1::2]), -1))),
    "moe-gate-up-swapped": ("shared", reordered(lambda w: torch.cat(w.chunk(2, -1)[::-1], -1))),
    "moe-shared-ungated": ("shared", with_shared(ungated)),
    "moe-shared-missing": ("shared", with_shared(lambda _mlp, x: torch.zeros_like(x))),
}
# The same rules without a change.
CLEAN: dict[str, tuple[str, Callable[[Any], None]]] = {
    "softmax": ("softmax", soft(renormalize=True)),
    "not renormalized": ("shared", soft(renormalize=False)),
    "grouped": ("grouped", routing(Grouped())),
    "one expert after another": ("softmax", adding(weighed)),
    "shared": ("shared", with_shared(lambda mlp, x: mlp.shared_expert_gate(x).sigmoid() * mlp.shared_expert(x))),
    "alternating": ("alternating", lambda _mlp: None),
}
FAST = ["moe-bias-in-weights", "moe-groups-ignored", "moe-weighted-input"]


def planted(path: Path, dtype: str, plant: Callable[[Any], None]) -> Any:
    model = stock(path, dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            plant(layer.mlp)
    return model


def test_every_fault_has_a_plant() -> None:
    elsewhere = {
        "moe-plain-softmax",
        "moe-weighted-output",
    }  # in tests/model/test_mixtures.py: no mixture here has them
    assert set(PLANTS) | elsewhere == {fault.id for fault in (*router.FAULTS, *experts.FAULTS)}


@pytest.mark.parametrize(("fault", "dtype"), in_turn(FAST, PLANTS, ["bfloat16", "float32"]))
def test_a_planted_fault_is_named(written: Callable[[str], Path], fault: str, dtype: str) -> None:
    kind, plant = PLANTS[fault]
    found = compared(written(kind), dtype, planted(written(kind), dtype, plant), 90)
    assert found.verdict == "diverged", found.headline
    assert len(found.findings) == 1, [f.families for f in found.findings]
    match = found.findings[0].fault
    assert match is not None, found.findings[0]
    assert match.id == fault or fault in match.rivals
    if fault == "moe-scaling-factor":
        reading = match.reads["routed_scaling_factor"]
        assert reading.value == pytest.approx(1.0, abs=1e-3)
        assert reading.expected == 1.7
    if fault == "moe-top-k":
        assert match.reads["num_experts_per_tok"].value == 2


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["bfloat16", "float16", "float32"]))
@pytest.mark.parametrize("case", slow_but(["grouped"], CLEAN))
def test_the_same_rules_written_anew_match(written: Callable[[str], Path], case: str, dtype: str) -> None:
    kind, plant = CLEAN[case]
    found = compared(written(kind), dtype, planted(written(kind), dtype, plant))
    assert found.verdict == "match", (found.headline, [(f.families, f.evidence) for f in found.findings])
