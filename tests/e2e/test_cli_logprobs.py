"""`parity logprobs` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.rollouts import sample, trl


@pytest.fixture(scope="module")
def rollout(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trl(tmp_path_factory.mktemp("rollout") / "rollout.jsonl", sample(small, "bfloat16", rows=2, tokens=9))


def test_a_clean_rollout(cli: Callable[..., Ran], small: Path, rollout: Path) -> None:
    ran = cli("logprobs", rollout, "--model", small)
    assert ran.code == 0
    assert ran.out.startswith("MATCH  the log-probabilities are within rounding in bfloat16")
    assert "mean exp |Δ log p|" in ran.out


@pytest.mark.slow
def test_as_json(cli: Callable[..., Ran], small: Path, rollout: Path) -> None:
    ran = cli("logprobs", rollout, "--model", small, "--json", "--temperature", "0.5")
    found = json.loads(ran.out)
    assert (ran.code, found["verdict"], found["causes"][0]["kind"]) == (1, "diverged", "temperature")


def test_errors_are_one_line(cli: Callable[..., Ran], small: Path, tmp_path: Path) -> None:
    ran = cli("logprobs", tmp_path / "none.jsonl", "--model", small)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    ran = cli("logprobs", tmp_path / "none.jsonl", "--temperature", "0")
    assert (ran.code, ran.err) == (2, "parity: --temperature 0: log-probabilities need one above 0.\n")
