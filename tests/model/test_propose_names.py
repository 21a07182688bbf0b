"""Tensors of a dump with foreign names find their sites by their values; what is not sure is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from parity.compare.propose_names import Proposal, propose_names
from parity.compare.recording import run_reference
from parity.dump import open_dump, write_safetensors
from parity.observer import Observer
from parity.options import RunOptions
from parity.reference.pieces import PiecewiseModel
from parity.run_spec import RunSpec, run_spec
from tests.conftest import Ran

IDS = [[i * 17 % 200 + 3 for i in range(14)]]
IDS_TEXT = " ".join(map(str, IDS[0]))
SELF = "model.layers.*.self_attn."
FOREIGN = {
    "tok_embd": "model.embed_tokens",
    "blk.*.attn_norm_1": "model.layers.*.input_layernorm",
    "blk.*.q2_rot": SELF + "q_rope",
    "blk.*.ctx": SELF + "context",
    "blk.*.after_attn": "model.layers.*.resid_mid",
    "blk.*.silu": "model.layers.*.mlp.act_fn",
    "blk.*.out": "model.layers.*",
    "result": "lm_head",
}
QKV = [f"{SELF}{name}_proj" for name in "qkv"]
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def run(checkpoint: Callable[..., Path]) -> RunSpec:
    return run_spec(RunOptions(model=str(checkpoint("qwen3", layers=3, dtype="float32")), tokens=IDS_TEXT))


@pytest.fixture(scope="module")
def model(run: RunSpec) -> PiecewiseModel:
    return run.model()


@pytest.fixture(scope="module")
def theirs(run: RunSpec, model: PiecewiseModel) -> Arrays:
    """The reference's own run under foreign names: a fused projection, heads behind tokens, no batch."""
    own: Arrays = {}
    run_reference(run, model, Observer(), lambda site, value, _dims: own.update({site: value}))
    found = {}
    for name, site in FOREIGN.items():
        for layer in range(3) if "*" in name else [0]:
            found[name.replace("*", str(layer))] = own[site.replace("*", str(layer))][0]
    for layer in range(3):
        found[f"blk.{layer}.q2_rot"] = np.ascontiguousarray(found[f"blk.{layer}.q2_rot"].transpose(1, 0, 2))
        found[f"blk.{layer}.qkv"] = np.concatenate([own[name.replace("*", str(layer))][0] for name in QKV], -1)
    return found


@pytest.fixture
def proposed(run: RunSpec, model: PiecewiseModel, tmp_path: Path) -> Callable[[Arrays], Proposal]:
    def propose(arrays: Arrays) -> Proposal:
        path = tmp_path / "port.safetensors"
        write_safetensors(path, arrays, {"parity.token_ids": json.dumps(IDS)})
        with open_dump(path) as dump:
            return propose_names(dump, model, run, Observer())

    return propose


Proposed = Callable[[Arrays], Proposal]


def test_every_tensor_finds_its_site(proposed: Proposed, theirs: Arrays) -> None:
    found = proposed(theirs)
    assert found.doubts == {}
    assert found.names == FOREIGN | {"blk.*.qkv": {"split": QKV, "sizes": [120, 40, 40]}}
    assert "model.layers.1.mlp.product" in found.unheld
    assert "model.layers.1.self_attn.q_rope" not in found.unheld


def test_rounding_and_small_bugs_hide_nothing(proposed: Proposed, theirs: Arrays) -> None:
    noise = np.random.default_rng(0)
    rough = {name: a * (1 + 0.01 * noise.standard_normal(a.shape, np.float32)) for name, a in theirs.items()}
    found = proposed(rough)
    assert found.doubts == {}
    assert found.names["blk.*.after_attn"] == "model.layers.*.resid_mid"


def test_what_is_not_sure_is_said(proposed: Proposed, theirs: Arrays) -> None:
    odd = {
        "noise": np.random.default_rng(1).standard_normal((14, 80), np.float32),
        "doubled": 2 * theirs["blk.1.out"],
        "again": theirs["result"],
        "lengths": np.ones((14, 3), np.float32),
    }
    kept = {name: array for name, array in theirs.items() if name != "blk.1.out"}
    found = proposed(kept | odd)
    assert found.doubts.keys() == odd.keys()
    assert found.doubts["noise"].startswith("no site has its values: the nearest, ")
    assert found.doubts["doubled"] == "is model.layers.1 times 2"
    assert found.doubts["again"] == "has the values of lm_head, as result has"
    assert found.doubts["lengths"] == "no site of the reference can have its shape (14, 3)"
    assert not found.names.keys() & odd.keys()


def test_a_layer_that_is_wrong_is_named_as_the_others(proposed: Proposed, theirs: Arrays) -> None:
    wrong = np.random.default_rng(2).standard_normal((14, 112), np.float32)
    found = proposed(theirs | {"blk.2.silu": wrong})
    assert found.names["blk.*.silu"] == "model.layers.*.mlp.act_fn"
    assert found.doubts["blk.2.silu"].endswith("; named as in other layers")
    assert "model.layers.2.mlp.act_fn" not in found.unheld


def test_one_token_does_not_tell_what_rope_turns(run: RunSpec, model: PiecewiseModel, tmp_path: Path) -> None:
    """At position 0 it turns nothing."""
    one, own = RunSpec(run.checkpoint, ((5,),), "float32", run.options), Arrays()
    run_reference(one, model, Observer(), lambda site, value, _dims: own.update({site: value}))
    write_safetensors(tmp_path / "one.safetensors", {"mine": own["model.layers.0.self_attn.q_rope"]}, {})
    with open_dump(tmp_path / "one.safetensors") as dump:
        found = propose_names(dump, model, one, Observer())
    assert found.names == {}
    assert found.doubts["mine"].startswith("may be model.layers.0.self_attn.q_")


@pytest.mark.slow
def test_the_command_writes_what_diff_takes(
    run: RunSpec, theirs: Arrays, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    write_safetensors(tmp_path / "port.safetensors", theirs, {"parity.token_ids": json.dumps(IDS)})
    done = cli("names", "port.safetensors", "-m", run.checkpoint.path, "-o", "names.json")
    assert (done.code, done.err) == (0, "")
    assert "blk.*.qkv → " + " + ".join(QKV) in done.out.splitlines()
    assert "no tensor holds model.layers.*.mlp.product" in done.out.splitlines()
    assert done.out.splitlines()[-1].startswith("names.json: 23 of 23 tensors named, at most ")
    table = json.loads(Path("names.json").read_text()) | {"model.layers.*.mlp.product": None}
    Path("names.json").write_text(json.dumps(table))
    found = parity.diff("port.safetensors", model=str(run.checkpoint.path), names="names.json", power=False)
    assert (found.verdict, found.findings) == ("match", ())
    assert sum(site.verdict != "unmeasured" for site in found.sites) == 29
    declared = [site.site for site in found.sites if site.gap and site.gap.kind == "not observable"]
    assert declared == [f"model.layers.{n}.mlp.product" for n in range(3)]


PORT = """
from torch import nn

from impl.qwen3 import load


class Port(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.port = inner

    def forward(self, input_ids):
        return self.port(input_ids)


def build(model_dir, dtype, device):
    return Port(load(model_dir, dtype, device))
"""


@pytest.mark.slow
def test_submodules_of_a_port_find_their_sites(run: RunSpec, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    Path("port.py").write_text(PORT)
    model = str(run.checkpoint.path)
    done = cli("names", "port.py:build", "-m", model, "--tokens", IDS_TEXT, "-o", "map.json")
    assert done.code == 0, done.err
    names = json.loads(Path("map.json").read_text())
    assert names["port.model.layers.*.self_attn.q_norm"] == SELF + "q_norm"
    assert names["port.model.embed_tokens"] == "model.embed_tokens"
    assert "not sure  port.model.layers.0.self_attn has the values of " in done.out
    found = parity.diff("port.py:build", model=model, names="map.json", tokens=IDS_TEXT, power=False)
    assert (found.verdict, found.findings) == ("match", ())
    assert not [site for site in found.sites if site.verdict == "unmeasured"]


def test_a_runtime_that_is_known_needs_no_names(run: RunSpec, cli: Callable[..., Ran]) -> None:
    done = cli("names", f"gguf:{run.checkpoint.path / 'config.json'}", "--tokens", "1 2", "-o", "map.json")
    assert (done.code, Path("map.json").exists()) == (2, False)
    assert "its values bear the reference's names" in done.err
