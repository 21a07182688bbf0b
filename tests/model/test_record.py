"""Recording changes nothing: not the numbers, not the model, not even when it fails."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from parity.errors import UsageError
from parity.record import attention
from parity.record.arrays import to_numpy, to_torch
from parity.record.attention import INSIDE, attention_taps, check_attention
from parity.record.tap import first_tensor, quiet_torch, tapping
from parity.sites import Site
from tests.builders import hooks
from tests.conftest import slow_but

IDS = torch.tensor([[5, 17, 3, 120, 44, 9, 61, 2, 33], [8, 8, 100, 7, 1, 90, 30, 200, 4]])


def stock(path: Path, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_torch():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=implementation).eval()


def run(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Any:
    with quiet_torch():
        return model(input_ids=ids, use_cache=False, **kwargs)


def unchanged(_site: str, value: Tensor) -> Tensor:
    return value


def sites_of(model: Any, *, inner: bool = False) -> list[Site]:
    """A few sites of each kind in every layer of a Qwen3, written by hand."""
    found = [Site("lm_head", (), (), "", "lm_head")]
    for i in range(model.config.num_hidden_layers):
        layer, attn = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        found += [Site(f"{attn}.{n}", (), (), "", attn, "attention") for n in INSIDE]
        found.append(Site(f"{layer}.resid_mid", (), (), "", f"{layer}.post_attention_layernorm", "input"))
        found.append(Site(layer, (), (), "", layer))
    return [site for site in found if inner or site.name.rsplit(".", 1)[-1] not in ("scores", "probs")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", slow_but(["eager"], ["eager", "sdpa"]))
@pytest.mark.parametrize("inner", [False, True], ids=["", "inner"])
def test_recording_leaves_the_logits_as_they_are(
    small: Path, implementation: str, dtype: torch.dtype, inner: bool
) -> None:
    plain = run(stock(small, implementation, dtype)).logits
    model = stock(small, implementation, dtype)
    seen: dict[str, Tensor] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        seen[site] = value.clone()
        return value

    wanted = sites_of(model, inner=inner)
    with tapping(model, wanted, tap):
        assert torch.equal(run(model).logits, plain)
    inside_softmax = {s.name for s in wanted if s.name.endswith(("scores", "probs"))}
    assert set(seen) == {s.name for s in wanted} - (inside_softmax if implementation == "sdpa" else set())
    assert torch.equal(seen["lm_head"], plain)
    assert torch.equal(run(model).logits, plain)


# -- transformers' table of attention functions --------------------------------------------------------------


def test_the_table_is_as_it_was_after_a_recording(small: Path) -> None:
    from transformers import AttentionInterface

    before = AttentionInterface.get_interface
    model = stock(small, "eager")
    with tapping(model, sites_of(model, inner=False), lambda _site, value: value):
        assert AttentionInterface.get_interface is not before
    assert AttentionInterface.get_interface is before


def test_recordings_within_each_other_tap_once(small: Path) -> None:
    model = stock(small, "eager")
    places = {module: {"context": "context"} for name, module in model.named_modules() if name.endswith("self_attn")}
    seen: list[str] = []

    def tap(site: str, value: Tensor) -> Tensor:
        seen.append(site)
        return value

    with attention_taps(places, tap), attention_taps(places, tap):
        run(model)
    assert len(seen) == len(places)


def test_a_model_is_built_with_the_attention_it_was_asked_for() -> None:
    check_attention("sdpa")
    with pytest.raises(UsageError, match="attention 'sdpo' is not one that transformers has: eager"):
        check_attention("sdpo")


# -- inside attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probs_are_those_that_transformers_returns(small: Path, dtype: torch.dtype) -> None:
    expected = run(stock(small, "eager", dtype), output_attentions=True).attentions
    model = stock(small, "eager", dtype)
    seen: dict[str, Tensor] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        seen[site] = value.clone()
        return value

    with tapping(model, sites_of(model, inner=True), tap):
        run(model)
    for i, weights in enumerate(expected):
        name = f"model.layers.{i}.self_attn"
        assert torch.equal(seen[f"{name}.probs"], weights)
        probs = seen[f"{name}.scores"].softmax(-1, dtype=torch.float32).to(dtype)
        assert torch.equal(probs, weights)
        # Six query heads share two key heads.
        assert seen[f"{name}.q_rope"].shape == (2, 6, IDS.shape[1], 20)
        assert seen[f"{name}.k_rope"].shape == (2, 2, IDS.shape[1], 20)
        assert seen[f"{name}.context"].shape == (2, IDS.shape[1], 6, 20)


@pytest.mark.parametrize("kind", ["q_rope", "k_rope", "scores", "probs", "context", "resid_mid", "layer"])
def test_what_a_tap_returns_flows_on(small: Path, kind: str) -> None:
    model = stock(small, "eager")
    plain = run(model).logits
    target = (
        "model.layers.0"
        if kind == "layer"
        else "model.layers.0." + (kind if kind == "resid_mid" else f"self_attn.{kind}")
    )

    def tap(site: str, value: Tensor) -> Tensor:
        return value * 2 if site == target else value

    with tapping(model, sites_of(model, inner=True), tap):
        changed = run(model).logits
    assert not torch.allclose(changed, plain)
    assert torch.equal(run(model).logits, plain), "and nothing of it stays"


def test_a_replaced_residual_reaches_both_of_its_readers(small: Path) -> None:
    """resid_mid feeds the norm and is added again: a replacement must be seen by both."""
    model = stock(small, "eager")
    site = Site("r", (), (), "", "model.layers.1.post_attention_layernorm", "input")
    values: dict[str, Tensor] = {}
    constant = torch.randn(2, IDS.shape[1], 80, generator=torch.Generator().manual_seed(1))

    def note(name: str) -> Any:
        def hook(_m: Any, _a: Any, output: Any) -> None:
            values[name] = first_tensor(output)

        return hook

    handles = [
        model.model.layers[1].mlp.register_forward_hook(note("mlp")),
        model.model.layers[1].register_forward_hook(note("layer")),
    ]
    with tapping(model, [site], lambda _s, _v: constant):
        run(model)
    for handle in handles:
        handle.remove()
    assert torch.equal(values["layer"], constant + values["mlp"])


# -- cleaning up ---------------------------------------------------------------------------------------------


class PlantedError(Exception):
    pass


@pytest.mark.parametrize("kind", ["lm_head", "q_rope", "probs", "context", "resid_mid"])
def test_a_tap_that_raises_leaves_nothing_behind(small: Path, kind: str) -> None:
    model = stock(small, "eager")
    plain, before = run(model).logits, hooks(model)

    def tap(site: str, value: Tensor) -> Tensor:
        if site.endswith(kind):
            raise PlantedError
        return value

    with pytest.raises(PlantedError), tapping(model, sites_of(model, inner=True), tap):
        run(model)
    assert hooks(model) == before
    assert attention._active.get() is None
    assert torch.equal(run(model).logits, plain)


def test_a_block_that_raises_leaves_nothing_behind(small: Path) -> None:
    model = stock(small, "eager")
    before = hooks(model)
    with pytest.raises(PlantedError), tapping(model, sites_of(model), unchanged):
        raise PlantedError
    assert hooks(model) == before
    assert attention._active.get() is None


def test_a_site_that_does_not_exist_leaves_nothing_behind(small: Path) -> None:
    model = stock(small, "eager")
    before = hooks(model)
    sites = [*sites_of(model), Site("x", (), (), "", "model.no_such_module")]
    with pytest.raises(AttributeError), tapping(model, sites, unchanged):
        pass
    assert hooks(model) == before


def test_taps_nest_and_the_inner_one_ends_first() -> None:
    def active() -> dict[nn.Module, dict[str, str]]:
        reach = attention._active.get()
        assert reach is not None
        return reach.sites

    module = nn.Identity()
    with attention_taps({module: {"q_rope": "outer"}}, unchanged):
        with attention_taps({module: {"q_rope": "inner"}}, unchanged):
            assert active() == {module: {"q_rope": "inner"}}
        assert active() == {module: {"q_rope": "outer"}}
    assert attention._active.get() is None


def test_models_are_let_go(small: Path) -> None:
    import weakref

    model = stock(small, "eager")
    gone = weakref.ref(model)
    with tapping(model, sites_of(model), unchanged):
        run(model)
    del model
    gc.collect()
    assert gone() is None


# -- small things --------------------------------------------------------------------------------------------


def test_the_activation_is_the_first_tensor() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert first_tensor(x) is x
    assert first_tensor((x, y)) is x
    assert first_tensor([x]) is x
    for nothing in (None, (), (None, x), "text"):
        assert first_tensor(nothing) is None


def test_a_replaced_first_of_a_tuple_keeps_the_rest() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x, "kept"

    model = nn.Sequential(Pair())
    with tapping(model, [Site("0", (), (), "", "0")], lambda _site, value: value + 1):
        first, second = model(torch.zeros(2))
    assert torch.equal(first, torch.ones(2))
    assert second == "kept"


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", "bool", "bfloat16", "float8_e4m3fn"])
def test_bits_survive_the_way_to_numpy_and_back(dtype: str) -> None:
    kind = getattr(torch, dtype)
    if dtype == "bool":
        value = torch.tensor([[True, False, True]])
    else:
        width = torch.empty(0, dtype=kind).element_size()
        raw = torch.randint(0, 256, (3, 5 * width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        value = raw.view(kind)  # any bits at all: NaN payloads, negative zeros, subnormals
    array = to_numpy(value)
    assert array.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
    back = to_torch(array)
    assert back.dtype is kind
    assert torch.equal(back.view(torch.uint8), value.view(torch.uint8))
    strided = value.T
    np.testing.assert_array_equal(to_numpy(strided).view(np.uint8), to_numpy(strided.contiguous()).view(np.uint8))


def test_a_tensor_made_from_a_file_may_be_written_to() -> None:
    array = np.arange(3.0)
    array.flags.writeable = False
    to_torch(array).add_(1)
    assert array[0] == 0
