"""The command line as a process among others: signals, closed pipes, and outputs that are what their names say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from parity.dump import open_dump
from parity.reference.checkpoint import Checkpoint, find
from parity.reference.tokenizer import tokenize
from tests.conftest import Ran, environment

Cli = Callable[..., Ran]
TOKENS = "5 17 3 120 44 9 61 2 33"
START = [sys.executable, "-m", "parity.cli"]


@pytest.mark.slow
def test_sigterm_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("1 2 3 " * 600)
    process = subprocess.Popen(
        [*START, "record", "--tokens", "ids.txt", "-o", "out/ref.h5"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.*partial*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert list((tmp_path / "out").iterdir()) == []
    assert "Traceback" not in errors


def test_a_reader_that_stops_reading_changes_no_exit_code(tmp_path: Path) -> None:
    process = subprocess.Popen([*START, "--help"], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 0


def test_an_error_leaves_no_folder_for_a_report(cli: Cli, small: Path, tmp_path: Path) -> None:
    ran = cli("diff", "--tokens", "1", "--model", small, "-c", "impl.qwen3:laod", "--out", "a/b/report")
    assert ran.code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_recording_called_safetensors_is_one(cli: Cli, small: Path, tmp_path: Path) -> None:
    assert cli("record", "--tokens", TOKENS, "-m", small, "-o", "out/ref.h5").code == 0
    ran = cli("record", "--tokens", TOKENS, "-m", small, "-o", "out/ref.safetensors")
    assert ran.code == 0, ran.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ref.h5", "ref.safetensors", "ref.tokens.txt"]
    with safe_open(tmp_path / "out" / "ref.safetensors", framework="pt") as file:
        assert "lm_head" in file.keys()  # noqa: SIM118
    with open_dump(tmp_path / "out" / "ref.h5") as one, open_dump(tmp_path / "out" / "ref.safetensors") as two:
        assert one.entries == two.entries
        assert (one.info.token_ids, one.info.fingerprint) == (two.info.token_ids, two.info.fingerprint)
        assert all(one.read(site).tobytes() == two.read(site).tobytes() for site in one.entries)
    assert cli("diff", "out/ref.safetensors", "-m", small).code == 0
    ran = cli("record", "--tokens", TOKENS, "-m", small, "-o", "out/ref.npz")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "no .npz is written" in ran.err


@pytest.mark.slow
def test_a_chat_is_run_in_its_template(cli: Cli, chatting: Checkpoint, tmp_path: Path) -> None:
    ran = cli("record", "--prompt", "Hello", "--chat", "-m", chatting.path, "-o", "chat.h5")
    assert ran.code == 0, ran.err
    with open_dump(tmp_path / "chat.h5") as dump:
        assert dump.info.token_ids == (tokenize(find(str(chatting.path)), "Hello", chat=True).ids,)


MODEL = "from torch import nn\nclass M(nn.Module):\n    def forward(self, input_ids, position_ids):\n        return 0\n"
MISFITS = {
    "a factory of one argument": (
        "def load(model_dir):\n    return 0\n",
        "it takes (model_dir), and is called with (model_dir, dtype, device)",
    ),
    "a module that wants position_ids": (
        MODEL + "def load(*arguments):\n    return M()\n",
        "missing a required argument: 'position_ids'. Give what it wants a default, or return a wrapper",
    ),
    "an error in a library": (
        "import json\ndef load(*arguments):\n    return json.loads('{')\n",
        "(my_port.py:3)",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_a_candidate_must_take_is_said(cli: Cli, small: Path, tmp_path: Path, case: str) -> None:
    source, said = MISFITS[case]
    (tmp_path / "my_port.py").write_text(source)
    ran = cli("diff", "--tokens", "1 2 3", "-m", small, "-c", "my_port.py:load")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
    assert said in ran.err, ran
