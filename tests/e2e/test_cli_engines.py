"""`parity diff A B` of two engines: each on its own inputs, side by side, and nothing of the first passed over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from parity.api import record
from parity.dump import ArchiveWriter, open_dump
from tests.conftest import Ran

TOKENS = "5 17 99 4 150 23 8 61 77 120 31"
_PORT = """
import torch
from impl.qwen3 import load as plain

def load(model_dir, dtype, device):
    model = plain(model_dir, dtype, device)
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    return model
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def eager(small: Path, folder: Path) -> Path:
    record(folder / "eager.h5", "hf:?attn=eager", model=str(small), tokens=TOKENS)
    return folder / "eager.h5"


@pytest.fixture(scope="module")
def sdpa(small: Path, folder: Path) -> Path:
    record(folder / "sdpa.h5", "hf:?attn=sdpa", model=str(small), tokens=TOKENS)
    return folder / "sdpa.h5"


def test_two_legal_engines_match(cli: Callable[..., Ran], small: Path, eager: Path, sdpa: Path, tmp_path: Path) -> None:
    ran = cli("diff", eager, sdpa, "--model", small, "--no-power", "-o", tmp_path / "report")
    assert (ran.code, ran.out[:5]) == (0, "MATCH")
    assert "the first other bits are at model.layers.0.self_attn.context" in " ".join(ran.out.split())
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["verdict"] == "match"
    distances = {d["site"]: d for d in found["distances"]}
    # Both are as far apart as two runs that round apart: no more than a few floors anywhere.
    assert distances["model.layers.0.self_attn.q_proj"]["bit_equal"]
    assert 0 < distances["lm_head"]["distance"] < 4 * distances["lm_head"]["floor"]
    page = (tmp_path / "report" / "index.html").read_text()
    assert 'href="first/index.html"' in page
    assert (tmp_path / "report" / "second" / "index.html").is_file()
    assert "| lm_head |" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.slow
def test_the_wrong_one_is_said(cli: Callable[..., Ran], small: Path, sdpa: Path, tmp_path: Path) -> None:
    (tmp_path / "port.py").write_text(_PORT)
    record(tmp_path / "port.h5", f"{tmp_path / 'port.py'}:load", model=str(small), tokens=TOKENS)
    port = tmp_path / "port.h5"
    for dumps, wrong, right in (((sdpa, port), "second", "first"), ((port, sdpa), "first", "second")):
        ran = cli("diff", *dumps, "--model", small, "--no-power", "--json")
        found = json.loads(ran.out)
        assert (ran.code, found["verdict"]) == (1, "diverged")
        assert (found[wrong]["verdict"], found[right]["verdict"]) == ("diverged", "match")
        assert [finding["sites"] for finding in found[wrong]["findings"]] == [["model.layers.1.mlp.act_fn"]]


@pytest.fixture(scope="module")
def tuned(small: Path, folder: Path) -> Path:
    """The checkpoint after a fine-tuning: all weights a little different."""
    path = folder / "tuned"
    shutil.copytree(small, path)
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for value in weights.values():
        value.mul_(1 + 0.05 * torch.randn(value.shape, generator=generator).to(value.dtype))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.slow
def test_base_and_fine_tune_differ_in_weights(
    cli: Callable[..., Ran], small: Path, tuned: Path, tmp_path: Path
) -> None:
    for name, model in (("base", small), ("tuned", tuned)):
        record(tmp_path / f"{name}.h5", model=str(model), tokens=TOKENS)
    ran = cli("diff", tmp_path / "base.h5", tmp_path / "tuned.h5", "--no-power", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["first"]["verdict"], found["second"]["verdict"]) == (1, "match", "match")
    assert str(tuned) in found["weights"]
    ran = cli("diff", tmp_path / "base.h5", tmp_path / "tuned.h5", "--no-power")
    assert " ".join(ran.out.split()).startswith("DIVERGED the weights differ: ")


@pytest.mark.slow
def test_two_dtypes_of_one_model(cli: Callable[..., Ran], small: Path, sdpa: Path, tmp_path: Path) -> None:
    record(tmp_path / "float32.h5", "hf:?dtype=float32", model=str(small), tokens=TOKENS, dtype="float32")
    ran = cli("diff", tmp_path / "float32.h5", sdpa, "--no-power", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["verdict"], found["weights"]) == (0, "match", "")
    assert [found[side]["environment"]["working_dtype"] for side in ("first", "second")] == ["float32", "bfloat16"]
    assert all(d["distance"] <= 8 * d["floor"] for d in found["distances"])


def test_other_tokens_cannot_be_compared(cli: Callable[..., Ran], small: Path, sdpa: Path, tmp_path: Path) -> None:
    record(tmp_path / "other.h5", "hf:", model=str(small), tokens="1 2 3")
    ran = cli("diff", tmp_path / "other.h5", sdpa, "--model", small)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "other token ids (3 and 11 tokens)" in ran.err


def test_a_recording_is_checked(cli: Callable[..., Ran], small: Path, sdpa: Path, tmp_path: Path) -> None:
    record(tmp_path / "reference.h5", model=str(small), tokens=TOKENS)
    ran = cli("diff", tmp_path / "reference.h5", sdpa, "--no-power", "--json")
    check = next(check for check in json.loads(ran.out)["checks"] if check["name"] == "first dump")
    assert (ran.code, check["ok"]) == (0, True)
    assert check["detail"].endswith("arrays are those of the reference's own run here")


@pytest.mark.slow
def test_a_recording_that_was_changed_is_no_match(
    cli: Callable[..., Ran], small: Path, sdpa: Path, tmp_path: Path
) -> None:
    record(tmp_path / "reference.h5", model=str(small), tokens=TOKENS)
    with open_dump(tmp_path / "reference.h5") as dump, ArchiveWriter(tmp_path / "edited.h5", dump.info) as writer:
        for name, entry in dump.entries.items():
            array = np.array(dump.read(name))
            if name == "model.layers.1.mlp.down_proj":
                array *= array.dtype.type(1.5)
            writer.add(name, array, entry.dims)
    ran = cli("diff", tmp_path / "edited.h5", sdpa, "--no-power", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["verdict"]) == (2, "inconclusive")
    assert "model.layers.1.mlp.down_proj" in found["headline"]


@pytest.mark.slow
def test_invariance(cli: Callable[..., Ran], small: Path, tmp_path: Path) -> None:
    ran = cli(
        "invariance", "--model", small, "--tokens", TOKENS, "--batch", "2", "--against", "hf:?attn=sdpa", "--json"
    )
    found = json.loads(ran.out)
    assert (ran.code, found["verdict"]) == (0, "match")
    assert {v["setting"] for v in found["variances"]} == {"against hf:?attn=sdpa"}
    out = tmp_path / "report"
    ran = cli("invariance", "--model", small, "--tokens", TOKENS, "--against", "hf:?attn=sdpa", "--exact", "-o", out)
    assert (ran.code, ran.out[:8]) == (1, "DIVERGED")
    assert f"report: {out / 'index.html'}" in ran.out
    assert json.loads((out / "report.json").read_text())["verdict"] == "diverged"
    assert "self_attn.context  0-1     against hf:?attn=sdpa" in ran.out
    ran = cli("invariance", "--model", small, "--tokens", TOKENS, "--batch", "x")
    assert (ran.code, ran.err) == (2, "parity: --batch 'x': no list of sizes. Give numbers such as 1,4.\n")


def test_exact_asks_for_the_same_bits(cli: Callable[..., Ran], small: Path) -> None:
    asked = ("--model", small, "--tokens", TOKENS, "--no-power", "--json")
    assert cli("diff", "-c", "hf:?attn=eager", "--exact", *asked).code == 0
    ran = cli("diff", "-c", "hf:?attn=sdpa", "--exact", *asked)
    found = json.loads(ran.out)
    assert (ran.code, found["verdict"], found["findings"]) == (1, "diverged", [])
    assert found["headline"].startswith("other bits at 2 of ")
    assert "all of it rounding; first at model.layers.0.self_attn.context" in found["headline"]
    assert "see the findings" not in found["answer"]
    assert cli("diff", "-c", "hf:?attn=sdpa", *asked).code == 0
