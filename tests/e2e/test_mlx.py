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


RUNS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "1 token": ("qwen3", {"layers": 2, "dtype": "float32"}, 1, 1),
    "2 tokens, bfloat16": ("qwen3", {"layers": 2}, 1, 2),
    "7 tokens, 3 rows": ("qwen3", {"layers": 2, "dtype": "float32"}, 3, 7),
    "20 tokens, as many as a head has numbers": ("qwen3", {"layers": 2, "dtype": "float32"}, 1, 20),
    "48 tokens, bfloat16": ("qwen3", {"layers": 2}, 1, 48),
    "130 tokens": ("qwen3", {"layers": 2, "dtype": "float32"}, 1, 130),
    "130 tokens, float16": ("qwen3", {"layers": 2, "dtype": "float16"}, 1, 130),
    "tied head": ("qwen3", {"layers": 2, "dtype": "float32", "tied": True}, 1, 33),
    "3 tokens, float16": ("qwen3", {"layers": 2, "dtype": "float16"}, 1, 3),
    "200 tokens, bfloat16": ("qwen3", {"layers": 2}, 1, 200),
}


@engine
@pytest.mark.parametrize("run", slow_but([], RUNS))
def test_a_checkpoint_matches(run: str, checkpoint: Any) -> None:
    model_type, settings, rows, tokens = RUNS[run]
    model = checkpoint(model_type, **settings)
    found = diff(model, model, tokens, rows)
    assert (found.verdict, found.findings) == ("match", ())
    assert {check.name: check.detail for check in found.checks}["run without taps"].endswith("bit-equal")
    gaps = {site.site: site.gap.kind for site in found.sites if site.gap is not None}
    assert gaps == {f"model.layers.{n}.mlp.act_fn": "not observable" for n in range(2)}


@engine
@pytest.mark.slow
def test_a_wrong_rope_base_is_named(checkpoint: Any, tmp_path: Path) -> None:
    model = checkpoint("qwen3", layers=2, dtype="float32")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    found = diff(changed(model, tmp_path / "theta", rope_parameters=rope), model)
    bad = {site.site.rpartition(".")[2] for site in found.sites if site.verdict == "wrong"}
    named = {finding.fault.id for finding in found.findings if finding.fault}
    assert (found.verdict, bad, named) == ("diverged", {"q_rope", "k_rope"}, {"rope-theta"})


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
    with pytest.raises(CandidateError, match=r"the modules of 'gemma3_text' are not known here, only those of qwen3"):
        diff(model, model)


def test_a_missing_directory_is_said(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CandidateError, match="no such file"):
        diff(tmp_path / "none", small)
