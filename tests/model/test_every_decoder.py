"""What decoders of transformers do that a plain one does not: each kind is followed, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parity.candidates.base import open_candidate
from parity.compare.pipeline import diff
from parity.errors import ModelError
from parity.options import RunOptions
from parity.record.chain import find_layers
from parity.record.discover import discover
from parity.reference import self_check
from parity.reference.build import build
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.results import Comparison
from parity.run_spec import RunSpec
from tests.conftest import slow_but
from tests.small_decoders import make_small

TOKENS = tuple((i * 37 + 11) % 200 + 3 for i in range(21))
# Sparse attention that looks at the name of its implementation; an attention called by keywords; values asked for
# before the layers; experts sorted by how many tokens go where; one activation for all layers; layers that run in
# loops; choices and router states handed to later layers; a convolution that pads; a layer norm used twice.
KINDS = ("deepseek_v32", "afmoe", "xlm", "jetmoe", "openai-gpt", "hrm_text", "hy_v4", "zaya", "recurrent_gemma", "xmod")


def compared(model_type: str, folder: Path, dtype: str = "float32") -> Comparison:
    path = make_small(model_type, folder / model_type)
    run = RunSpec(find(str(path)), (TOKENS,), dtype, RunOptions(model=str(path), dtype=dtype, power=False))
    return diff(run, open_candidate("hf:?attn=eager"))


@pytest.mark.parametrize("model_type", slow_but(["jetmoe"], KINDS))
def test_a_decoder_of_its_own_kind_matches_itself(model_type: str, tmp_path: Path) -> None:
    found = compared(model_type, tmp_path)
    assert found.verdict == "match", found.headline
    assert {site.verdict for site in found.sites} <= {"exact", "rounding"}


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("cpmant", "adds tokens of its own to the prompt"),
        ("big_bird", "changes its own modules while it runs"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(model_type: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        compared(model_type, tmp_path)
    assert "\n" not in str(caught.value)


def sites(model_type: str, folder: Path) -> set[str]:
    model = build(find(str(make_small(model_type, folder / model_type))), torch.float32, "eager")
    return {site.name for site in discover(model, find_layers(model)).sites}


def test_layers_that_run_again_have_sites_for_each_run(tmp_path: Path) -> None:
    found = sites("hrm_text", tmp_path)
    ends = {name.partition("#")[2] for name in found if name.startswith("model.L_module.layers.1.self_attn.q_rope")}
    assert ends == {"", "1", "2", "3", "4", "5"}


def test_a_padded_convolution_and_a_shared_activation_are_no_sites(tmp_path: Path) -> None:
    assert not any(name.endswith("conv_1d") for name in sites("recurrent_gemma", tmp_path))
    assert not any(name.endswith("mlp.act") for name in sites("openai-gpt", tmp_path))


def test_a_self_check_that_fails_leaves_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(self_check, "checked", failing)
    monkeypatch.setattr(self_check, "_done", {})
    found = compared("cwm", tmp_path)
    assert found.verdict == "inconclusive"
    assert [c.detail for c in found.checks if not c.ok] == ["it fails with ZeroDivisionError: planted"]


def test_the_probe_of_a_model_that_asks_for_values_leaves_no_weights(tmp_path: Path) -> None:
    path = make_small("jetmoe", tmp_path / "jetmoe")
    model = build(find(str(path)), torch.float32, "eager")
    discover(model, find_layers(model))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert isinstance(Reference(RunSpec(find(str(path)), (TOKENS,), "float32", RunOptions()).model()), Reference)
