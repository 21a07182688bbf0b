"""MLX as the candidate: checkpoints match, what is wrong in its config is named, trouble is one line."""

from __future__ import annotations

import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import parity
from parity.errors import CandidateError
from parity.results import Comparison
from tests.conftest import slow_but

engine = pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed")


def diff(candidate: Path, model: Path, tokens: int = 24, rows: int = 1) -> Comparison:
    draw, path = random.Random(tokens), model.parent / f"mlx-ids-{rows}-{tokens}.txt"
    path.write_text("".join(" ".join(str(draw.randrange(211)) for _ in range(tokens)) + "\n" for _ in range(rows)))
    return parity.diff(f"mlx:{candidate}", model=str(model), tokens=str(path), power=False)


def changed(model: Path, out: Path, **keys: Any) -> Path:
    """The same weights under another config.json."""
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | keys))
    return out


def for_mlx(model: Path) -> Path:
    """A Llama whose config says theta where mlx-lm reads it as well: it knows `rope_parameters` for Qwen3 alone."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": config["rope_parameters"]["rope_theta"]}))
    return model


# The first and the ninth are tried wherever MLX is.
RUNS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "qwen3, 1 token": ("qwen3", {"layers": 2, "dtype": "float32"}, 1, 1),
    "qwen3, 2 tokens, bfloat16": ("qwen3", {"layers": 2}, 1, 2),
    "qwen3, 7 tokens, 3 rows": ("qwen3", {"layers": 2, "dtype": "float32"}, 3, 7),
    "qwen3, 20 tokens, as many as a head has numbers": ("qwen3", {"layers": 2, "dtype": "float32"}, 1, 20),
    "qwen3, 48 tokens, bfloat16": ("qwen3", {"layers": 2}, 1, 48),
    "qwen3, 130 tokens": ("qwen3", {"layers": 2, "dtype": "float32"}, 1, 130),
    "qwen3, 130 tokens, float16": ("qwen3", {"layers": 2, "dtype": "float16"}, 1, 130),
    "qwen3, 33 tokens, tied head": ("qwen3", {"layers": 2, "dtype": "float32", "tied": True}, 1, 33),
    "llama, 130 tokens, bfloat16": ("llama", {"num_hidden_layers": 2}, 1, 130),
    "llama, 24 tokens": ("llama", {"num_hidden_layers": 2, "dtype": "float32"}, 1, 24),
    "llama, 40 tokens, 2 rows, float16": ("llama", {"num_hidden_layers": 2, "dtype": "float16"}, 2, 40),
    "qwen3, 3 tokens, float16": ("qwen3", {"layers": 2, "dtype": "float16"}, 1, 3),
    "qwen3, 200 tokens, bfloat16": ("qwen3", {"layers": 2}, 1, 200),
}


@engine
@pytest.mark.parametrize("run", slow_but([], RUNS))
def test_a_checkpoint_matches(run: str, checkpoint: Any) -> None:
    model_type, settings, rows, tokens = RUNS[run]
    model = checkpoint(model_type, **settings)
    model = for_mlx(model) if model_type == "llama" else model
    found = diff(model, model, tokens, rows)
    assert (found.verdict, found.findings) == ("match", ())
    assert {check.name: check.detail for check in found.checks}["run without taps"].endswith("bit-equal")
    gaps = {site.site: site.gap.kind for site in found.sites if site.gap is not None}
    assert gaps == {f"model.layers.{n}.mlp.act_fn": "not observable" for n in range(2)}


@engine
@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_a_wrong_rope_base_is_named(model_type: str, checkpoint: Any, tmp_path: Path) -> None:
    settings = {"layers": 2} if model_type == "qwen3" else {"num_hidden_layers": 2}
    model = checkpoint(model_type, dtype="float32", **settings)
    other = changed(model, tmp_path / "theta", rope_theta=10000.0, rope_parameters=None)
    found = diff(other, model)
    bad = {site.site.rpartition(".")[2] for site in found.sites if site.verdict == "wrong"}
    (fault,) = {finding.fault and finding.fault.id for finding in found.findings}
    assert (found.verdict, bad, fault) == ("diverged", {"q_rope", "k_rope"}, "rope-theta")


@engine
@pytest.mark.slow
def test_a_wrong_eps_is_named(checkpoint: Any, tmp_path: Path) -> None:
    model = checkpoint("qwen3", layers=2, dtype="float32")
    found = diff(changed(model, tmp_path / "eps", rms_norm_eps=1e-5), model)
    assert found.verdict == "diverged"
    assert {finding.fault.id for finding in found.findings if finding.fault} == {"norm-eps"}


@engine
@pytest.mark.slow
def test_modules_that_are_not_known_are_refused(checkpoint: Any) -> None:
    model = checkpoint("gemma3_text")
    with pytest.raises(
        CandidateError, match=r"the modules of 'gemma3_text' are not known here, only those of qwen3, llama"
    ):
        diff(model, model)


def test_a_missing_directory_is_said(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CandidateError, match="no such file"):
        diff(tmp_path / "none", small)
