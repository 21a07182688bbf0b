"""The ports of impl/ that are not torch: they have every site, and the same numbers there as the one that is."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from impl.qwen3 import load
from parity.dump import open_dump, write_tokens
from parity.reference.known_sites import known_sites
from tests.conftest import slow_but
from tests.planted import observe
from tests.ports import PORTS, RUST, command_of

ODD: dict[str, Any] = {"hidden_size": 77, "intermediate_size": 131, "num_attention_heads": 7, "head_dim": 18}
KINDS: dict[str, dict[str, Any]] = {
    "untied": {"layers": 2},
    "tied": {"layers": 2, "tied": True, "dtype": "float32"},
    "bias": {"layers": 2, "bias": True, "dtype": "float16"},
    "sharded": {"layers": 2, "shards": 3},
    "one-key-head": {"layers": 2, "num_key_value_heads": 1, **ODD},
    "no-groups": {"layers": 2, "num_key_value_heads": 7, **ODD},
}
IDS = ((3, 250, 17, 17, 0, 99, 211, 5, 42), (8, 1, 1, 200, 31, 7, 130, 66, 2))


def run(port: str, model_dir: Path, folder: Path, ids: Any = IDS) -> subprocess.CompletedProcess[str]:
    write_tokens(folder / "ref.tokens.txt", ids)
    words = [*command_of(port), str(model_dir), str(folder / "ref.tokens.txt"), str(folder / "port.safetensors")]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


def logits_of(port: str, model_dir: Path, folder: Path) -> Any:
    assert run(port, model_dir, folder).returncode == 0
    with open_dump(folder / "port.safetensors") as dump:
        return np.array(dump.read("lm_head"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("port", slow_but(["rust", "numpy"], PORTS))
def test_every_site_is_there_and_agrees_with_impl_qwen3(port: str, kind: str, checkpoint: Any, tmp_path: Path) -> None:
    model_dir = checkpoint("qwen3", **KINDS[kind])
    done = run(port, model_dir, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    theirs = observe(load(model_dir, "float32"), torch.tensor(IDS))
    with open_dump(tmp_path / "port.safetensors") as dump:
        assert dump.info.token_ids == IDS
        assert set(dump.entries) == {site.name for site in known_sites(str(model_dir))}
        for name in dump.entries:
            ours, wanted = dump.read(name).astype(np.float64), theirs[name].double()
            if name.endswith("_rope"):
                wanted = wanted.transpose(1, 2)
            assert ours.shape[:2] == (2, 9)
            wanted = wanted.reshape(ours.shape).numpy()
            assert np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted), name


@pytest.mark.parametrize("port", slow_but(["rust", "numpy"], PORTS))
@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model_type", "qwen2", "model_type"),
        ("hidden_act", "gelu", "hidden_act"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}, "rope_type"),
    ],
)
def test_unsupported_config_is_refused(
    port: str, key: str, value: Any, named: str, small: Path, tmp_path: Path
) -> None:
    raw = json.loads((small / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    done = run(port, tmp_path, tmp_path)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith(f"does not implement its setting of {named}")
    assert not (tmp_path / "port.safetensors").exists()


@pytest.mark.parametrize("port", slow_but(["rust", "numpy"], PORTS))
def test_config_of_older_checkpoints_is_read(port: str, small: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(small, older)
    raw = json.loads((older / "config.json").read_text())
    theta = raw.pop("rope_parameters")["rope_theta"]
    logits = []
    for settings in ({"rope_theta": theta, "rope_scaling": None}, {"rope_theta": 1e6}):
        (older / "config.json").write_text(json.dumps(raw | settings))
        logits.append(logits_of(port, older, tmp_path))
    np.testing.assert_array_equal(logits[0], logits_of(port, small, tmp_path))
    assert not np.array_equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (((1, 2, 301),), "token id 301 is outside the vocabulary of 301"),
        (((1, 2), (3,)), "needs rows of equally many token ids"),
        ((), "needs rows of equally many token ids"),
    ],
)
def test_rust_refuses_tokens_that_it_cannot_run(ids: Any, named: str, small: Path, tmp_path: Path) -> None:
    done = run("rust", small, tmp_path, ids)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{tmp_path / 'ref.tokens.txt'}: {named}\n"


def test_rust_says_which_tensor_does_not_fit(small: Path, tmp_path: Path) -> None:
    raw = json.loads((small / "config.json").read_text())
    shutil.copy(small / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"intermediate_size": 64}))
    done = run("rust", tmp_path, tmp_path)
    assert done.returncode == 2
    assert done.stderr == "model.layers.0.mlp.gate_proj.weight has shape [112, 80], expected [64, 80]\n"


def test_rust_reads_json_of_every_kind(small: Path, tmp_path: Path) -> None:
    extra = {'a "quoted" key\n': [[], {}, -1.5e-3, None, False, "ü \\ \u0000"], "": "]}"}
    raw = extra | json.loads((small / "config.json").read_text())
    shutil.copy(small / "model.safetensors", tmp_path)
    for indent in (None, 2):
        (tmp_path / "config.json").write_text(json.dumps(raw, indent=indent))
        assert run("rust", tmp_path, tmp_path).stderr == ""
    (tmp_path / "config.json").write_text(json.dumps(raw)[:-1])
    assert "config.json: JSON: expected" in run("rust", tmp_path, tmp_path).stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [["fmt", "--check"], ["clippy", "--offline", "--quiet", "--", "-Dwarnings"]])
def test_rust_is_formatted_and_clean(words: list[str]) -> None:
    command_of("rust")
    if subprocess.run(["cargo", words[0], "--version"], capture_output=True).returncode:
        pytest.skip(f"cargo {words[0]} is not installed")
    done = subprocess.run(["cargo", *words], cwd=RUST, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
