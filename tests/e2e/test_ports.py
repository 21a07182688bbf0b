"""The ports of impl/ that are not torch, as their users run them: record, run the port, diff."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ran, slow_but
from tests.ports import PORTS, command_of

# A checkpoint, how many rows, how many tokens in each.
RUNS: dict[str, tuple[dict[str, Any], int, int]] = {
    "1 token": ({}, 1, 1),
    "2 tokens": ({}, 1, 2),
    "9 tokens, 2 rows": ({}, 2, 9),
    "20 tokens, as many as a head has numbers": ({}, 1, 20),
    "48 tokens": ({}, 1, 48),
    "130 tokens": ({}, 1, 130),
    "300 tokens": ({}, 1, 300),
    "tied head": ({"tied": True, "dtype": "float32"}, 1, 33),
    "bias": ({"bias": True, "dtype": "float16"}, 1, 17),
    "hidden 1024": ({"hidden_size": 1024, "head_dim": 64}, 1, 24),
    "hidden 77": ({"hidden_size": 77, "intermediate_size": 131, "num_attention_heads": 2}, 1, 64),
}
FAST = ("1 token", "48 tokens")


def diff(cli: Callable[..., Ran], port: list[str], model_dir: Path, rows: list[list[int]]) -> dict[str, Any]:
    """What `parity diff` says of the port, run on the tokens file that `parity record` wrote."""
    Path("ids.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    recorded = cli("record", "--model", model_dir, "--tokens", "ids.txt", "--dtype", "float32", "-o", "ref.h5")
    assert recorded.code == 0, recorded.err
    done = subprocess.run([*port, model_dir, "ref.tokens.txt", "port.safetensors"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    compared = cli("diff", "ref.h5", "port.safetensors", "--model", model_dir, "--json")
    report: dict[str, Any] = json.loads(compared.out)
    assert compared.code == {"match": 0, "diverged": 1}[report["verdict"]]
    return report


@pytest.mark.parametrize("run", slow_but(FAST, RUNS))
@pytest.mark.parametrize("port", slow_but(["rust", "numpy"], PORTS))
def test_a_correct_port_matches(port: str, run: str, cli: Any, checkpoint: Any) -> None:
    settings, rows, tokens = RUNS[run]
    draw = random.Random(tokens)
    ids = [[draw.randrange(301) for _ in range(tokens)] for _ in range(rows)]
    report = diff(cli, command_of(port), checkpoint("qwen3", layers=2, **settings), ids)
    assert report["findings"] == []
    assert report["verdict"] == "match"
    assert {site["verdict"] for site in report["sites"]} <= {"exact", "rounding"}
