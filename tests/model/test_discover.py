"""The sites that the probe finds on the meta device are those that a real run fires, no more and no fewer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from parity.record.discover import discover, with_sizes
from parity.reference.checkpoint import find
from parity.reference.pieces import PiecewiseModel
from parity.sites import Site
from tests.builders import BATCH, TOKEN, fired, on_meta
from tests.checkpoints import OTHER
from tests.conftest import slow_but

TYPES = ["qwen3", *OTHER]


def found(
    path: Path, implementation: str = "eager", dtype: torch.dtype = torch.float32, inner: bool = False
) -> tuple[Site, ...]:
    return PiecewiseModel(find(str(path)), dtype, attention=implementation, inner=inner).sites


@pytest.mark.parametrize("inner", [False, True], ids=["", "inner"])
@pytest.mark.parametrize("implementation", slow_but(["eager"], ["eager", "sdpa"]))
@pytest.mark.parametrize("model_type", slow_but(["qwen3", "qwen3_moe"], TYPES))
def test_what_is_found_is_what_fires(
    checkpoint: Callable[..., Path], model_type: str, implementation: str, inner: bool
) -> None:
    dtype = torch.float32 if implementation == "eager" else torch.bfloat16
    path = checkpoint(model_type)
    sites = with_sizes(found(path, implementation, dtype, inner), BATCH, TOKEN)
    assert len({s.name for s in sites}) == len(sites)
    seen = fired(path, implementation, dtype, sites)
    assert list(seen) == [s.name for s in sites], "the same names in the same order"
    for site in sites:
        values = seen[site.name]
        assert len(values) == 1, f"{site.name} fires {len(values)} times"
        assert tuple(values[0].shape) == site.shape, site.name
        assert str(values[0].dtype) == f"torch.{site.dtype}", site.name


@pytest.mark.parametrize("model_type", TYPES)
def test_axes_have_names_of_their_own(checkpoint: Callable[..., Path], model_type: str) -> None:
    for site in found(checkpoint(model_type), inner=True):
        assert len(site.dims) == len(site.shape) == len(set(site.dims)), site
        assert site.dims[0] in ("batch", "batch*token"), site


@pytest.mark.parametrize("model_type", TYPES)
def test_every_layer_has_the_same_sites(checkpoint: Callable[..., Path], model_type: str) -> None:
    from parity.sites import family, layer_of

    sites = found(checkpoint(model_type))
    layers: dict[int, list[str]] = {}
    for site in sites:
        layer = layer_of(site.name)
        if layer is not None:
            layers.setdefault(layer, []).append(family(site.name))
    assert len(layers) >= 3
    assert all(kinds == layers[0] for kinds in layers.values())


def test_the_sites_of_a_qwen3_layer(small: Path) -> None:
    sites = discover(on_meta(small, "eager", torch.float32)).sites
    names = [s.name for s in sites]
    layer = [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.q_norm",
        "self_attn.k_proj",
        "self_attn.k_norm",
        "self_attn.v_proj",
        "self_attn.q_rope",
        "self_attn.k_rope",
        "self_attn.context",
        "self_attn.o_proj",
        "resid_mid",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.act_fn",
        "mlp.up_proj",
        "mlp.product",
        "mlp.down_proj",
    ]
    expected = ["model.embed_tokens"]
    for i in range(2):
        expected += [f"model.layers.{i}.{name}" for name in layer] + [f"model.layers.{i}"]
    assert names == [*expected, "model.norm", "lm_head"]
    dims = {s.name.removeprefix("model.layers.0."): s.dims for s in sites}
    assert dims["self_attn.q_proj"] == ("batch", "token", "head*head_dim")
    assert dims["self_attn.q_norm"] == ("batch", "token", "head", "head_dim")
    assert dims["self_attn.q_rope"] == ("batch", "head", "token", "head_dim")
    assert dims["self_attn.context"] == ("batch", "token", "head", "head_dim")
    assert dims["resid_mid"] == dims["lm_head"] == ("batch", "token", "feature")


def test_inner_adds_scores_and_probs_and_nothing_else(small: Path) -> None:
    model = on_meta(small, "eager", torch.float32)
    plain, inner = ({s.name for s in discover(model, inner=inner).sites} for inner in (False, True))
    assert inner - plain == {f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ("scores", "probs")}
    assert plain <= inner


def test_a_layer_of_another_kind_is_run_itself(checkpoint: Callable[..., Path]) -> None:
    model = on_meta(checkpoint("qwen3"), "eager", torch.float32)
    layers = list(model.model.layers)
    layers[1].self_attn.q_norm = nn.Identity()
    runs = [0] * len(layers)
    for number, layer in enumerate(layers):

        def count(*_: Any, number: int = number) -> None:
            runs[number] += 1

        layer.mlp.gate_proj.register_forward_hook(count)
    sites = discover(model, layers, inner=True).sites
    assert runs == [1, 1, 0, 0]
    assert sites == discover(model, inner=True).sites
    assert "model.layers.1.self_attn.q_norm" not in {site.name for site in sites}
    assert not [layer for layer in layers if "forward" in vars(layer)]


def test_probing_leaves_no_hooks(small: Path) -> None:
    def hooks(model: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    model = on_meta(small, "eager", torch.float32)
    before = hooks(model)
    discover(model, inner=True)
    assert hooks(model) == before
    model.lm_head.forward = lambda _x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        discover(model, inner=True)
    assert hooks(model) == before


def test_a_run_puts_its_own_sizes_in_place_of_the_probe_s(small: Path) -> None:
    sites = {s.name: s for s in with_sizes(discover(on_meta(small, "eager", torch.float32), inner=True).sites, 3, 4)}
    shapes = {name.removeprefix("model.layers.1."): site.shape for name, site in sites.items()}
    assert shapes["lm_head"] == (3, 4, 301)
    assert shapes["self_attn.probs"] == (3, 6, 4, 4)
    assert shapes["self_attn.k_rope"] == (3, 2, 4, 20)
    assert shapes["self_attn.q_proj"] == (3, 4, 120)
