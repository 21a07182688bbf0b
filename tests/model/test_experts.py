"""Mixtures of experts: the choice, its weights and its ties, on clean candidates and on planted bugs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.candidates.torch_module import TorchModule
from parity.compare.pipeline import diff
from parity.dump import Dump
from parity.options import RunOptions
from parity.record.experts import chosen, indices
from parity.record.tap import quiet_torch, tapping
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.reference.routing import LIMIT
from parity.results import Comparison
from parity.run_spec import RunSpec
from parity.sites import Site
from tests.conftest import in_turn, slow_but

MANY = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "norm_topk_prob": True}
IDS = tuple((torch.arange(1, 201) * 37 % 199).tolist())
MIXTURE = (".gate", ".chosen", ".weights", ".experts")


def spec(path: Path, dtype: str) -> RunSpec:
    return RunSpec(find(str(path)), (IDS,), dtype, RunOptions(power=False))


def stock(path: Path, dtype: str, experts: str = "eager") -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_torch():
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="sdpa", experts_implementation=experts
        ).eval()


class Sparing(TorchModule):
    """A candidate that records all but the sites whose names end in one of these."""

    without: tuple[str, ...] = ()

    def record(self, run: RunSpec, sites: Sequence[Site], path: Path) -> Dump:
        return super().record(run, [site for site in sites if not site.name.endswith(self.without)], path)


def compared(path: Path, dtype: str, model: nn.Module, without: Sequence[str] = ()) -> tuple[Comparison, Reference]:
    asked = spec(path, dtype)
    reference = Reference(asked.model())
    candidate = Sparing.of(model, {})
    candidate.without = tuple(without)
    return diff(asked, candidate, reference=reference), reference


def rerouted(model: Any, route: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Any:
    """Every router of a model computes `route(router, hidden states)`."""
    for layer in model.model.layers:
        gate = layer.mlp.gate
        gate.forward = lambda x, gate=gate: route(gate, x.reshape(-1, gate.hidden_dim))
    return model


def logits_of(gate: Any, x: Tensor) -> Tensor:
    return F.linear(x, gate.weight)


def weighed(probs: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    weights = probs.gather(-1, index)
    return (weights / weights.sum(-1, keepdim=True)).to(dtype)


# -- the sites -----------------------------------------------------------------------------------------------


def test_a_mixture_has_its_own_sites(checkpoint: Callable[..., Path]) -> None:
    model = spec(checkpoint("qwen3_moe"), "float32").model()
    names = [site.name for site in model.sites if ".0.mlp" in site.name]
    assert names == [f"model.layers.0.mlp{end}" for end in (".gate", ".experts.chosen", ".experts.weights", ".experts")]
    shapes = {site.name.rsplit(".", 1)[-1]: site.shape[-1] for site in model.sites if ".0.mlp" in site.name}
    assert shapes["gate"] == shapes["chosen"] == shapes["weights"] == 5


def values(model: Any, sites: Sequence[Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        seen[site] = value.clone()
        return change(site, value)

    with quiet_torch(), tapping(model, sites, tap):
        model(torch.tensor([IDS[:20]]))
    return seen


def test_a_replaced_choice_changes_whose_weights_the_router_computes(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3_moe", **MANY)
    model = stock(path, "float32")
    sites = [s for s in spec(path, "float32").model().sites if ".0.mlp" in s.name]
    plain = values(model, sites, lambda _site, value: value)
    wanted = torch.zeros_like(plain["model.layers.0.mlp.experts.chosen"])
    wanted[:, [2, 5, 11, 14]] = 1

    seen = values(model, sites, lambda site, value: wanted if site.endswith("chosen") else value)
    assert torch.equal(seen["model.layers.0.mlp.gate"], plain["model.layers.0.mlp.gate"])
    weights = seen["model.layers.0.mlp.experts.weights"]
    expected = weighed(plain["model.layers.0.mlp.gate"].softmax(-1), torch.tensor([[2, 5, 11, 14]] * 20), torch.float32)
    torch.testing.assert_close(weights[:, [2, 5, 11, 14]], expected)
    assert torch.equal(weights != 0, wanted != 0)


def test_replaced_logits_change_the_choice(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3_moe", **MANY)
    sites = [s for s in spec(path, "float32").model().sites if ".0.mlp" in s.name]
    high = torch.zeros(20, 16)
    high[:, [0, 3, 7, 9]] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    seen = values(stock(path, "float32"), sites, lambda site, value: high if site.endswith("gate") else value)
    assert torch.equal(seen["model.layers.0.mlp.experts.chosen"], (high > 0).float())


def test_a_choice_is_filled_up_with_the_best_of_the_others() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.2], [0.9, 0.1, 0.2, 0.4]])
    choice = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    assert indices(choice, scores).tolist() == [[3, 0], [1, 0]]
    assert torch.equal(chosen(torch.tensor([[3, 0]]), 4, torch.float32), choice[:1])


# -- clean candidates ----------------------------------------------------------------------------------------

CLEAN = [
    (without, dtype, seed)
    for without in ((), (".gate",), MIXTURE, (*MIXTURE, ".mlp", "norm", "_proj", "resid_mid"))
    for dtype in ("bfloat16", "float16", "float32")
    for seed in (0, 1)
]


@pytest.mark.parametrize("case", slow_but([CLEAN[6], CLEAN[18]], CLEAN[::2]), ids=str)
def test_ties_are_no_alarm(checkpoint: Callable[..., Path], case: tuple[tuple[str, ...], str, int]) -> None:
    """Whatever of its router a correct candidate records, and however it adds up its experts."""
    without, dtype, seed = case
    path = checkpoint("qwen3_moe", dtype="float32", **MANY, num_hidden_layers=3 + seed)
    found, reference = compared(path, dtype, stock(path, dtype, ("eager", "batched_mm")[seed]), without)
    assert found.verdict == "match", found.headline
    assert not found.findings
    if without == (".gate",) and dtype == "bfloat16":
        ties = [m for m in found.sites if m.site.endswith("chosen") and m.verdict == "rounding"]
        assert ties, "a run of so many tokens has a near-tie"
        assert all("at a tie" in m.reason and m.ratio is not None and m.ratio <= 2 for m in ties)
        assert all(route.margin.max() <= LIMIT for route in reference.routes.values())


def test_a_router_in_float32_is_right(checkpoint: Callable[..., Path]) -> None:
    """More precise than the reference: where two experts are nearly tied, it may well choose otherwise."""
    path = checkpoint("qwen3_moe", dtype="float32", **MANY)

    def route(gate: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.float(), gate.weight.float())
        index = logits.topk(gate.top_k, -1)[1]
        return logits, weighed(logits.softmax(-1), index, torch.float32), index

    found, _ = compared(path, "bfloat16", rerouted(stock(path, "bfloat16"), route))
    assert found.verdict == "match", found.headline


# -- wrong choices -------------------------------------------------------------------------------------------


def one_less(gate: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits_of(gate, x)
    index = logits.topk(gate.top_k - 1, -1)[1]
    return logits, weighed(logits.softmax(-1, torch.float32), index, logits.dtype), index


def shifted(gate: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A bias that the reference does not have decides with the logits."""
    logits = logits_of(gate, x)
    biased = logits + 0.1 * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    index = biased.topk(gate.top_k, -1)[1]
    return logits, weighed(logits.softmax(-1, torch.float32), index, logits.dtype), index


@pytest.mark.parametrize(
    ("without", "dtype"),
    in_turn([(), (".chosen",)], [(), (".gate",), (".chosen",)], ["bfloat16", "float32"]),
    ids=str,
)
@pytest.mark.parametrize(("route", "said"), [(one_less, "1 expert fewer"), (shifted, "no tie")])
def test_a_wrong_choice_is_found_at_the_router(
    checkpoint: Callable[..., Path],
    dtype: str,
    without: tuple[str, ...],
    route: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]],
    said: str,
) -> None:
    path = checkpoint("qwen3_moe", dtype="float32", **MANY)
    found, _ = compared(path, dtype, rerouted(stock(path, dtype), route), without)
    assert found.verdict == "diverged"
    assert [f.families for f in found.findings] == [("model.layers.*.mlp.experts.chosen",)]
    assert found.findings[0].layers == (0, 1, 2)
    assert said in found.findings[0].evidence[0]


@pytest.mark.parametrize("route", [one_less, shifted])
def test_without_the_router_a_wrong_choice_is_found_behind_it(
    checkpoint: Callable[..., Path], route: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]
) -> None:
    path = checkpoint("qwen3_moe", dtype="float32", **MANY)
    found, _ = compared(path, "bfloat16", rerouted(stock(path, "bfloat16"), route), MIXTURE)
    assert found.verdict == "diverged"
    assert {f.families for f in found.findings} == {("model.layers.*",)}
