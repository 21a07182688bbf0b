"""Every kind of decoder: the reference in pieces is what `from_pretrained` gives; its truth has the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import parity
from parity.record.tap import quiet_torch
from parity.reference.checkpoint import find
from parity.reference.pieces import EMBED, HEAD, PiecewiseModel
from parity.reference.replay import Reference
from tests.architectures import ARCHITECTURES, make
from tests.builders import LONG_IDS
from tests.conftest import in_turn, slow_but

# Each has something that the others lack: layers that return tuples, masks of another kind, buffers with learned
# numbers, weights kept in float32, an attention without registry, operations in place, sizes that do not fit.
ODD = ["bamba", "deepseek_v3", "ernie4_5_moe", "falcon", "gemma4", "glm4_moe", "gpt2", "llama4", "mamba"]
ODD += ["mixtral_odd", "mpt", "olmo", "opt", "phi3", "qwen3_5", "youtu"]
pytestmark = pytest.mark.usefixtures("one_piece_at_a_time")


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of an architecture, written once."""
    folder = tmp_path_factory.mktemp("architectures")
    return lambda name: folder / name if (folder / name).exists() else make(name, folder / name)


def stock(path: Path, dtype: torch.dtype, model: PiecewiseModel, **more: Any) -> Tensor:
    """The logits (b, t, vocab) of the model that a user would load."""
    from transformers import AutoModelForCausalLM

    experts = getattr(model.config, "_experts_implementation", None)
    more |= {"experts_implementation": experts} if experts else {}
    with quiet_torch():
        whole = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager", **more).eval()
        logits: Tensor = whole(input_ids=LONG_IDS, use_cache=False).logits
    return logits


def run(model: PiecewiseModel) -> tuple[dict[str, list[Tensor]], Tensor]:
    """What a tap that keeps the very tensors it gets has of each site, and the logits."""
    seen: dict[str, list[Tensor]] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        seen.setdefault(site, []).append(value)
        return value

    hidden = None
    for piece in model.pieces:
        with model.loaded(piece):
            hidden = model.run(piece, LONG_IDS, hidden, tap)
    assert hidden is not None
    return seen, hidden


@pytest.mark.parametrize(
    ("name", "dtype"),
    in_turn(ODD, ARCHITECTURES, ["bfloat16", "float32", "float16"]),
)
def test_pieces_compute_what_from_pretrained_gives(architecture: Callable[[str], Path], name: str, dtype: str) -> None:
    path = architecture(name)
    model = PiecewiseModel(find(str(path)), getattr(torch, dtype))
    seen, logits = run(model)
    assert torch.equal(logits, stock(path, getattr(torch, dtype), model))
    assert set(seen) == {site.name for site in model.sites}
    assert model.is_cut
    assert all(model.source_of(piece) for piece in [*range(1, len(model.layers)), HEAD])


def numbers(model: PiecewiseModel) -> dict[str, Tensor]:
    return {**dict(model.model.named_parameters()), **dict(model.model.named_buffers())}


@pytest.mark.parametrize(
    ("name", "dtype"),
    in_turn(
        ["deepseek_v3", "gemma4", "ernie4_5_moe", "phi3", "mamba2"], ARCHITECTURES, [torch.float32, torch.bfloat16]
    ),
)
def test_the_truth_has_every_number_of_the_reference(
    architecture: Callable[[str], Path], name: str, dtype: torch.dtype
) -> None:
    reference = Reference(PiecewiseModel(find(str(architecture(name))), dtype))
    working, precise = reference.working, reference.precise
    compared = 0
    for piece in working.pieces:
        with working.loaded(piece), precise.loaded(piece):
            mine, theirs = (
                {**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (precise.model, working.model)
            )
            for key, value in theirs.items():
                if not value.is_meta and value.is_floating_point():
                    compared += 1
                    assert mine[key].dtype is precise.dtype, key
                    assert torch.equal(mine[key], value.to(precise.dtype)), key
    assert compared


def test_weights_that_transformers_keeps_in_float32_stay_so(architecture: Callable[[str], Path]) -> None:
    model = PiecewiseModel(find(str(architecture("deepseek_v3"))), torch.bfloat16)
    with model.loaded(2):
        bias = model.layers[2].mlp.gate.e_score_correction_bias
        assert bias.dtype is torch.float32
        assert not torch.equal(bias, bias.bfloat16().float())


def test_a_kept_value_is_what_it_was_when_it_was_tapped(architecture: Callable[[str], Path]) -> None:
    model = PiecewiseModel(find(str(architecture("olmo"))), torch.float32)
    seen, _ = run(model)
    limit = model.config.clip_qkv
    for letter in "qkv":
        name = f"model.layers.1.self_attn.{letter}_proj"
        with model.loaded(1):
            weight = model.model.get_submodule(name).weight
            product = seen["model.layers.1.input_layernorm"][0] @ weight.detach().T
        assert float(product.abs().max()) > limit
        assert torch.allclose(seen[name][0], product, atol=1e-5), "the product before it is clipped"


def test_what_the_candidate_recorded_is_not_written_into(architecture: Callable[[str], Path]) -> None:
    reference = Reference(PiecewiseModel(find(str(architecture("olmo"))), torch.float32))
    recorded = {name: values[0].clone() for name, values in run(reference.working)[0].items()}
    before = {name: value.clone() for name, value in recorded.items()}
    for _piece, sites in reference.replay(LONG_IDS, lambda site: recorded[site.name]):
        for site in sites:
            assert torch.equal(site.floor, before[site.site.name]), site.site.name
    assert all(torch.equal(recorded[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["qwen3_5", "gemma4", "gpt2"])
def test_the_site_that_goes_into_the_first_layer(architecture: Callable[[str], Path], name: str) -> None:
    model = PiecewiseModel(find(str(architecture(name))), torch.float32)
    seen, _ = run(model)
    source = model.source_of(0)
    assert source in {site.name for site in model.sites_of(EMBED)}
    with model.loaded(EMBED):
        assert torch.equal(model.embed(LONG_IDS, lambda _site, value: value), seen[str(source)][0])


def test_an_attention_of_its_own_has_keys_beside_tokens(architecture: Callable[[str], Path]) -> None:
    sites = {site.name: site for site in PiecewiseModel(find(str(architecture("gptj"))), torch.float32).sites}
    assert sites["transformer.h.0.attn.attn_dropout.input"].dims == ("batch", "feature", "token", "key")
    assert all(len(set(site.dims)) == len(site.dims) for site in sites.values())


def test_the_probe_leaves_no_tables_behind(architecture: Callable[[str], Path]) -> None:
    model = PiecewiseModel(find(str(architecture("phi3"))), torch.float32)
    rotary = model.model.model.rotary_emb
    assert not [name for name, value in vars(rotary).items() if isinstance(value, Tensor)]
    assert set(rotary._buffers) == {"inv_freq", "original_inv_freq"}


def test_inputs_of_parts_side_by_side_are_sites_of_their_own(architecture: Callable[[str], Path]) -> None:
    model = PiecewiseModel(find(str(architecture("falcon_h1"))), torch.float32)
    entering = {site.name: site.module for site in model.sites_of(1) if site.where == "input"}
    assert entering["model.layers.1.resid_mid"] == "model.layers.1.pre_ff_layernorm"
    assert "model.layers.1.self_attn.input" in entering


def test_a_buffer_of_a_layer_that_the_model_around_it_fills(architecture: Callable[[str], Path]) -> None:
    model = PiecewiseModel(find(str(architecture("falcon_h1"))), torch.float32)
    with model.loaded(1):
        assert torch.equal(model.layers[1].mamba.mup_vector, torch.ones_like(model.layers[1].mamba.mup_vector))


@pytest.mark.parametrize(
    "name", slow_but(["gemma3n", "youtu", "diffllama"], ["gemma3n", "youtu", "diffllama", "biogpt", "mixtral_odd"])
)
def test_transformers_itself_matches_whatever_is_odd_about_it(architecture: Callable[[str], Path], name: str) -> None:
    """It takes a value again, leaves the padding empty, attends twice, takes a mask as input, has sizes that no
    grouped product of experts takes."""
    tokens = " ".join(map(str, LONG_IDS[0].tolist()))
    compared = parity.diff("hf:", model=str(architecture(name)), tokens=tokens, dtype="float32", power=False)
    assert compared.verdict == "match", compared.headline
