"""Mixtures of another form: weights before the experts (Llama 4), two maxima in turn (Phi-MoE), the choice first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parity.candidates.torch_module import TorchModule
from parity.compare.pipeline import diff
from parity.options import RunOptions
from parity.record.tap import quiet_torch, tapping
from parity.reference.checkpoint import find
from parity.results import Comparison
from parity.run_spec import RunSpec
from tests.architectures import make
from tests.conftest import slow_but

IDS = tuple((torch.arange(1, 121) * 37 % 199 + 3).tolist())
BLOCKS = {"llama4": "model.layers.1.feed_forward", "phimoe": "model.layers.1.mlp"}


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of an architecture, written once."""
    folder = tmp_path_factory.mktemp("mixtures")
    return lambda name: folder / name if (folder / name).exists() else make(name, folder / name)


def run_of(path: Path, dtype: str = "float32") -> RunSpec:
    return RunSpec(find(str(path)), (IDS,), dtype, RunOptions(power=False))


def stock(path: Path, dtype: str = "float32") -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_torch():
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()


def compared(path: Path, dtype: str, model: Any) -> Comparison:
    return diff(run_of(path, dtype), TorchModule.of(model, {}))


def inside(path: Path, block: str) -> dict[str, str]:
    """Sites of the mixture by their name inside the block, with their last axis."""
    sites = run_of(path).model().sites
    return {s.name.removeprefix(f"{block}."): s.dims[-1] for s in sites if s.name.startswith(f"{block}.")}


def test_a_router_that_weighs_before_the_experts_has_its_sites(architecture: Callable[[str], Path]) -> None:
    found = inside(architecture("llama4"), BLOCKS["llama4"])
    assert list(found)[:3] == ["router.logits", "experts.chosen", "router"]
    assert {found[name] for name in list(found)[:3]} == {"expert"}


def test_a_router_of_two_maxima_has_its_sites(architecture: Callable[[str], Path]) -> None:
    found = inside(architecture("phimoe"), BLOCKS["phimoe"])
    assert list(found) == ["router", "experts.chosen", "experts.weights", "experts"]


def values(model: Any, sites: Any, change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        seen[site] = value.clone()
        return change(site, value)

    with quiet_torch(), tapping(model, sites, tap):
        model(torch.tensor([IDS[:20]]))
    return seen


@pytest.mark.parametrize(("name", "weights", "count"), [("llama4", "router", 1), ("phimoe", "experts.weights", 2)])
def test_a_replaced_choice_decides_whose_weights_are_used(
    architecture: Callable[[str], Path], name: str, weights: str, count: int
) -> None:
    path, block = architecture(name), BLOCKS[name]
    sites = [site for site in run_of(path).model().sites if site.name.startswith(f"{block}.")]
    model = stock(path)
    plain = values(model, sites, lambda _site, value: value)
    chosen = f"{block}.experts.chosen"
    assert torch.equal(plain[chosen].sum(-1), torch.full((20,), float(count)))
    assert torch.equal(plain[f"{block}.{weights}"] != 0, plain[chosen] != 0)
    other = torch.zeros_like(plain[chosen])
    other[:, [3, 0][:count]] = 1

    seen = values(model, sites, lambda site, value: other if site == chosen else value)
    assert torch.equal(seen[f"{block}.{weights}"] != 0, other != 0)
    same = values(model, sites, lambda _site, value: value.clone())
    assert all(torch.equal(same[site], value) for site, value in plain.items())


@pytest.mark.parametrize("name", ["llama4", "phimoe"])
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["bfloat16", "float16"]))
def test_transformers_itself_matches(architecture: Callable[[str], Path], name: str, dtype: str) -> None:
    """Equally good experts of Phi-MoE among them, whose order decides on their weights."""
    path = architecture(name)
    found = compared(path, dtype, stock(path, dtype))
    assert found.verdict == "match", found.headline
    assert not [site for site in found.sites if site.verdict == "unmeasured"]


def second_best(model: Any) -> None:
    """The expert that a token of Llama 4 goes to is the one after the best."""
    router = model.model.layers[1].feed_forward.router

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.linear(x, router.weight)
        values, index = logits.topk(2, dim=1)
        scores = torch.full_like(logits, -torch.inf).scatter(1, index[:, 1:], values[:, 1:])
        return scores.float().sigmoid().to(logits.dtype), logits

    router.forward = forward


def one_expert(model: Any) -> None:
    """Tokens of Phi-MoE go to the best expert alone."""
    router = model.model.layers[1].mlp.router
    own = router.forward

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = own(x)
        return logits, weights[:, :1], index[:, :1]

    router.forward = forward


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["bfloat16", "float32"]))
@pytest.mark.parametrize(("name", "plant"), [("llama4", second_best), ("phimoe", one_expert)])
def test_a_wrong_choice_is_found_at_the_router(
    architecture: Callable[[str], Path], name: str, plant: Callable[[Any], None], dtype: str
) -> None:
    path = architecture(name)
    model = stock(path, dtype)
    plant(model)
    found = compared(path, dtype, model)
    assert found.verdict == "diverged"
    wrong = {site.site for site in found.sites if site.verdict == "wrong"}
    assert f"{BLOCKS[name]}.experts.chosen" in wrong or name == "llama4"
    assert all(site.startswith(BLOCKS[name]) for site in wrong)


def weighed_by(weigh: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """The router's weights (token, choice) are made anew of its logits and choice."""

    def plant(model: Any) -> None:
        block = next(
            b
            for layer in model.model.layers
            if hasattr(b := getattr(layer, "feed_forward", None) or layer.mlp, "router")
        )
        own = block.router.forward

        def forward(x: Tensor) -> tuple[Tensor, ...]:
            returned = own(x)
            if len(returned) == 3:
                logits, weights, index = returned
                return logits, weigh(logits.float(), index).to(weights.dtype), index
            scores, logits = returned
            index = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(scores).scatter(1, index, weigh(logits.float(), index).to(scores.dtype)), logits

        block.router.forward = forward

    return plant


def weighed_behind(model: Any) -> None:
    """Llama 4 with its weights at what experts return."""
    block = model.model.layers[1].feed_forward
    experts = block.experts

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        scores, logits = block.router(flat)
        each = experts(torch.cat([flat * (weights != 0)[:, None] for weights in scores.T])).chunk(scores.shape[1])
        routed = sum(out * weights[:, None] for out, weights in zip(each, scores.T, strict=True))
        return block.shared_expert(flat) + routed, logits

    block.forward = forward


NAMED = {
    "moe-weighted-output": ("llama4", weighed_behind),
    "moe-softmax": ("llama4", weighed_by(lambda logits, index: logits.softmax(-1).gather(1, index))),
    "moe-scaling-factor": ("llama4", weighed_by(lambda logits, index: 2.5 * logits.sigmoid().gather(1, index))),
    "moe-plain-softmax": ("phimoe", weighed_by(lambda logits, index: logits.softmax(-1).gather(1, index))),
}


@pytest.mark.parametrize("fault", slow_but(["moe-softmax", "moe-plain-softmax"], NAMED))
def test_a_wrong_weight_is_named(architecture: Callable[[str], Path], fault: str) -> None:
    name, plant = NAMED[fault]
    path = architecture(name)
    model = stock(path, "bfloat16")
    plant(model)
    found = compared(path, "bfloat16", model)
    assert [finding.fault.id for finding in found.findings if finding.fault] == [fault], found.findings
    assert len(found.findings) == 1


def test_a_router_may_return_its_choice_first(
    architecture: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Granite's did: then its logits have a name of their own, and are seen all the same."""
    from transformers.models.granitemoe import modeling_granitemoe as source

    own, whole = source.GraniteMoeTopKRouter.forward, source.GraniteMoeMoE.forward
    if "_, top_k_weights, top_k_index" not in _text(whole):
        pytest.skip("this version returns the choice first by itself")
    monkeypatch.setattr(source.GraniteMoeTopKRouter, "forward", lambda self, x: own(self, x)[::-1])

    def forward(self: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        index, weights, _ = self.router(flat)
        added: Tensor = self.experts(flat, index, weights).view(x.shape)
        return added

    monkeypatch.setattr(source.GraniteMoeMoE, "forward", forward)
    path = architecture("granitemoe")
    assert list(inside(path, "model.layers.1.block_sparse_moe"))[:2] == ["router.logits", "experts.chosen"]
    found = compared(path, "float32", stock(path))
    assert found.verdict == "match", found.headline
    assert "unmeasured" not in {site.verdict for site in found.sites}


def _text(function: Any) -> str:
    import inspect

    return inspect.getsource(function)
