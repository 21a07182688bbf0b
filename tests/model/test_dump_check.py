"""Is a dump well-formed and complete, and what does each missing site cost?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import parity
from parity.compare.dump_check import check
from parity.dump import open_dump, write_safetensors
from parity.dump_coverage import DumpCheck, FamilyCheck
from parity.record.discover import with_sizes
from parity.reference.checkpoint import find
from parity.reference.pieces import PiecewiseModel
from tests.conftest import Ran

TOKEN = 11
IDS = [[i * 17 % 200 for i in range(TOKEN)]]
L = "model.layers.*."
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> PiecewiseModel:
    return PiecewiseModel(find(str(checkpoint("qwen3", layers=3))), torch.float32)


@pytest.fixture
def arrays(model: PiecewiseModel) -> Arrays:
    """A complete dump, its numbers beside the point."""
    return {s.name: np.zeros(s.shape, np.float32) for s in with_sizes(model.sites, 1, TOKEN)}


@pytest.fixture
def write(tmp_path: Path, model: PiecewiseModel) -> Callable[..., Path]:
    """`write(arrays, dims=…)`: a dump of a port, with token ids unless it is told otherwise."""

    def make(arrays: Arrays, **metadata: Any) -> Path:
        said = {"token_ids": IDS, "model": str(model.checkpoint.path)} | metadata
        text = {f"parity.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in said.items() if v is not None}
        write_safetensors(tmp_path / "port.safetensors", arrays, text)
        return tmp_path / "port.safetensors"

    return make


@pytest.fixture
def checked(write: Callable[..., Path], model: PiecewiseModel) -> Callable[..., DumpCheck]:
    def run(arrays: Arrays, **metadata: Any) -> DumpCheck:
        with open_dump(write(arrays, **metadata)) as dump:
            return check(dump, model, 1, TOKEN)

    return run


def bad(found: DumpCheck) -> list[FamilyCheck]:
    return [f for f in found.families if f.state != "present"]


Checked = Callable[..., DumpCheck]


def test_a_complete_dump(checked: Checked, arrays: Arrays) -> None:
    found = checked(arrays)
    assert found.is_complete
    assert bad(found) == []
    assert found.unknown == ()
    assert sum(f.sites for f in found.families) == len(arrays)
    (norms,) = [f for f in found.families if f.family == L + "input_layernorm"]
    assert (norms.layers, norms.sites, norms.detail) == ((0, 1, 2), 3, "")


def test_a_missing_family_and_what_it_costs(checked: Checked, arrays: Arrays) -> None:
    kept = {name: a for name, a in arrays.items() if not name.endswith("q_rope")}
    (lost,) = bad(checked(kept))
    assert (lost.family, lost.state, lost.layers) == (L + "self_attn.q_rope", "missing", (0, 1, 2))
    assert lost.detail == f"its operation is judged only through {L}self_attn.context", "k_rope does not read it"


def test_a_site_missing_in_one_layer(checked: Checked, arrays: Arrays) -> None:
    del arrays["model.layers.1.mlp.act_fn"]
    found = checked(arrays)
    (lost,) = bad(found)
    assert (lost.family, lost.layers, lost.sites) == (L + "mlp.act_fn", (1,), 1)
    assert [f.layers for f in found.families if f.family == lost.family and f.state == "present"] == [(0, 2)]


def test_layer_outputs_alone(checked: Checked, arrays: Arrays) -> None:
    coarse = {n: a for n, a in arrays.items() if n.rsplit(".", 1)[-1].isdigit() or n == "lm_head"}
    lost = {f.family: f.detail for f in bad(checked(coarse))}
    assert lost[L + "self_attn.context"] == "its operation is judged only through model.layers.*"
    assert lost["model.norm"] == "its operation is judged only through lm_head"
    assert "model.layers.*" not in lost


def test_what_nothing_comes_after_is_not_judged_at_all(checked: Checked, arrays: Arrays) -> None:
    kept = {n: a for n, a in arrays.items() if n not in ("model.norm", "lm_head")}
    details = {f.family: f.detail for f in bad(checked(kept))}
    assert details == dict.fromkeys(
        ("model.norm", "lm_head"), "nothing after it is recorded, so its operation is not judged at all"
    )


def test_a_misshapen_site_covers_for_nothing(checked: Checked, arrays: Arrays) -> None:
    arrays["model.layers.2.mlp.act_fn"] = np.zeros((1, TOKEN, 111), np.float32)
    del arrays["model.layers.2.mlp.gate_proj"]
    wrong = {f.family: f for f in bad(checked(arrays))}
    assert wrong[L + "mlp.act_fn"].state == "misshapen"
    assert f"(1, {TOKEN}, 111)" in wrong[L + "mlp.act_fn"].detail
    assert "112" in wrong[L + "mlp.act_fn"].detail
    assert wrong[L + "mlp.gate_proj"].detail == f"its operation is judged only through {L}mlp.product"


def test_dims_that_contradict_the_shape_are_misshapen(checked: Checked, arrays: Arrays) -> None:
    found = checked(arrays, dims={"lm_head": "token batch vocab"})
    (wrong,) = bad(found)
    assert (wrong.family, wrong.state) == ("lm_head", "misshapen")
    assert "token batch vocab" in wrong.detail


@pytest.fixture
def square(model: PiecewiseModel) -> tuple[Arrays, int]:
    """As many tokens as heads: the sizes no longer tell which axis is which."""
    return {s.name: np.zeros(s.shape, np.float32) for s in with_sizes(model.sites, 1, 6)}, 6


def test_sizes_that_leave_two_readings(
    write: Callable[..., Path], model: PiecewiseModel, square: tuple[Arrays, int]
) -> None:
    arrays, token = square
    with open_dump(write(arrays)) as dump:
        found = {f.family: f for f in bad(check(dump, model, 1, token))}
    assert set(found) == {L + f"self_attn.{n}" for n in ("q_norm", "q_rope", "context")}
    rope = found[L + "self_attn.q_rope"]
    assert rope.state == "ambiguous"
    assert "parity.dims" in rope.detail
    assert rope.layers == (0, 1, 2), "one line for all layers"
    assert "model.layers.0" not in rope.detail


def test_declared_axes_leave_one(write: Callable[..., Path], model: PiecewiseModel, square: tuple[Arrays, int]) -> None:
    arrays, token = square
    dims = {
        L + "self_attn.q_norm": "batch token head head_dim",
        L + "self_attn.q_rope": "batch head token head_dim",
        L + "self_attn.context": "batch token head head_dim",
    }
    with open_dump(write(arrays, dims=dims)) as dump:
        assert check(dump, model, 1, token).is_complete


def test_another_layout_is_told(checked: Checked, arrays: Arrays) -> None:
    name = "model.layers.0.self_attn.q_rope"
    arrays[name] = np.zeros((TOKEN, 120), np.float32)
    found = checked(arrays)
    assert found.is_complete
    (flat,) = [f for f in found.families if f.family == L + "self_attn.q_rope" and f.detail]
    assert (flat.state, flat.layers) == ("present", (0,))
    assert "→ batch head token head_dim" in flat.detail


def test_unknown_names(checked: Checked, arrays: Arrays) -> None:
    found = checked(arrays | {"blk.0.ffn": np.zeros(3, np.float32), "model.layers.3": arrays["model.layers.2"]})
    assert found.unknown == ("blk.0.ffn", "model.layers.3")
    assert found.is_complete, "more than is asked for is no fault"


def test_unknown_names_are_said_with_the_nearest_that_is_missing(checked: Checked, arrays: Arrays) -> None:
    renamed = {name.replace("self_attn.q_proj", "attn.query_proj"): array for name, array in arrays.items()}
    found = checked(renamed)
    assert found.near == {f"model.layers.{n}.attn.query_proj": f"model.layers.{n}.self_attn.q_proj" for n in range(3)}
    assert checked(arrays | {"mine": arrays["lm_head"]}).near == {}, "nothing is missing"


HIDDEN = {"model.embed_tokens": 0, "model.layers.0": 1, "model.layers.1": 2, "model.norm": 3}


@pytest.mark.parametrize("spelt", ["hidden_states.{}", "hidden_states[{}]", "hidden_states_{}"])
def test_hidden_states_of_transformers_are_understood(checked: Checked, arrays: Arrays, spelt: str) -> None:
    renamed = {spelt.format(HIDDEN[name]) if name in HIDDEN else name: array for name, array in arrays.items()}
    found = checked(renamed)
    assert found.is_complete, bad(found)
    assert found.unknown == ()


def test_hidden_states_beside_sites_and_beyond_the_last_are_left_alone(checked: Checked, arrays: Arrays) -> None:
    more = {"hidden_states.1": arrays["model.layers.0"], "hidden_states.4": arrays["model.norm"]}
    found = checked(arrays | more)
    assert found.is_complete
    assert found.unknown == tuple(more)


@pytest.mark.slow
def test_the_hidden_states_that_transformers_returns_are_those(
    model: PiecewiseModel, write: Callable[..., Path]
) -> None:
    """So the last is after the norm: before it, the norm would be called wrong."""
    path, ids = model.checkpoint.path, torch.tensor(IDS)
    module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        out = module(ids, output_hidden_states=True)
    arrays = {f"hidden_states.{n}": value.numpy() for n, value in enumerate(out.hidden_states)}
    file = write(arrays | {"lm_head": out.logits.numpy()}, model=None)
    found = parity.diff(str(file), model=str(path), power=False)
    measured = {site.site for site in found.sites if site.verdict != "unmeasured"}
    assert (found.verdict, found.findings) == ("match", ())
    assert measured == {*HIDDEN, "lm_head"}


FUSED = {
    "blk.*.qkv": {"split": [L + f"self_attn.{n}_proj" for n in "qkv"], "sizes": [120, 40, 40]},
    "blk.*.gate_up": {"split": [L + "mlp.gate_proj", L + "mlp.up_proj"]},
    "output": "lm_head",
}


def fused(arrays: Arrays) -> Arrays:
    parts = {"qkv": [f"self_attn.{n}_proj" for n in "qkv"], "gate_up": ["mlp.gate_proj", "mlp.up_proj"]}
    kept = dict(arrays)
    kept["output"] = kept.pop("lm_head")
    for i in range(3):
        for name, ends in parts.items():
            kept[f"blk.{i}.{name}"] = np.concatenate([kept.pop(f"model.layers.{i}.{end}") for end in ends], -1)
    return kept


def test_a_name_map_with_fused_projections(checked: Checked, arrays: Arrays) -> None:
    without = checked(fused(arrays))
    assert len(without.unknown) == 7
    assert {f.state for f in bad(without)} == {"missing"}
    found = checked(fused(arrays), names=FUSED)
    assert found.is_complete, bad(found)
    assert found.unknown == ()


def test_a_split_of_the_wrong_sizes_is_misshapen(checked: Checked, arrays: Arrays) -> None:
    names = FUSED | {"blk.*.qkv": FUSED["blk.*.qkv"] | {"sizes": [100, 60, 40]}}  # type: ignore[operator]
    wrong = {f.family: f.state for f in bad(checked(fused(arrays), names=names))}
    assert wrong == {L + f"self_attn.{n}_proj": "misshapen" for n in "qk"}


# -- the command ---------------------------------------------------------------------------------------------


def test_exit_code_0(cli: Callable[..., Ran], write: Callable[..., Path], arrays: Arrays) -> None:
    ran = cli("check", write(arrays))
    assert (ran.code, ran.err) == (0, ""), ran.out + ran.err
    assert ran.out.splitlines() == [f"{len(arrays)} present"]


def test_exit_code_1(cli: Callable[..., Ran], write: Callable[..., Path], arrays: Arrays) -> None:
    del arrays["model.layers.1.resid_mid"]
    arrays["mine"] = np.zeros(2, np.float32)
    ran = cli("check", write(arrays))
    assert ran.code == 1, ran.out + ran.err
    text = " ".join(ran.out.split())
    assert text.startswith(f"{len(arrays) - 1} present, 1 missing ")
    assert "missing model.layers.*.resid_mid (layers 1): its operation is judged only through model.layers.*." in text
    assert text.endswith("not a site of the reference: mine")


@pytest.mark.parametrize(
    ("metadata", "options", "message"),
    [
        ({"token_ids": None}, (), "does not say its token ids"),
        ({"model": "/no/such/model"}, (), "no such directory"),
        ({"dims": "{"}, (), "not JSON"),
        ({"tokens": "1"}, (), "unknown metadata"),
        ({}, ("--tokens", "1 2 999999"), "outside the vocabulary"),
        ({}, ("--names", "gone.json"), "gone.json"),
    ],
)
def test_exit_code_2(
    cli: Callable[..., Ran],
    write: Callable[..., Path],
    arrays: Arrays,
    metadata: dict[str, Any],
    options: tuple[str, ...],
    message: str,
) -> None:
    ran = cli("check", write(arrays, **metadata), *options)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("parity: ")
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1


def test_tokens_and_names_may_be_given(
    cli: Callable[..., Ran], write: Callable[..., Path], arrays: Arrays, tmp_path: Path, model: PiecewiseModel
) -> None:
    (tmp_path / "names.json").write_text(json.dumps(FUSED))
    path = write(fused(arrays), token_ids=None, model=None)
    options = ("--tokens", " ".join(map(str, IDS[0])), "--model", model.checkpoint.path, "--names", "names.json")
    ran = cli("check", path, *options)
    assert ran.code in (0, 1), ran.err
    assert f"{len(arrays)} present" in ran.out
    assert "missing" not in ran.out


def test_token_ids_that_were_given_count(cli: Callable[..., Ran], write: Callable[..., Path], arrays: Arrays) -> None:
    """They say what the dump does not, so the dump can be measured."""
    assert cli("check", write(arrays, token_ids=None), "--tokens", " ".join(map(str, IDS[0]))).code == 0
