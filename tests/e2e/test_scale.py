"""One comparison by many processes: parts make the report of a single one, and without one of them it is no match."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parity.sites import layer_of
from tests.conftest import ROOT, Ran, environment

Cli = Callable[..., Ran]
TOKENS = "5 17 3 120 44 9 61 2 33"
# The worked example with the wrong activation in its third layer.
PORT = """
from torch import nn
import impl.qwen3

def load(model_dir, dtype, device):
    model = impl.qwen3.load(model_dir, dtype, device)
    model.model.layers[2].mlp.act_fn = nn.GELU()
    return model
"""


@pytest.fixture
def dump(checkpoint: Callable[..., Path], cli: Cli, tmp_path: Path) -> Callable[[str, str], Path]:
    """`dump(family, candidate)`: what a candidate recorded of a model of four layers."""

    def recorded(family: str, candidate: str = "") -> Path:
        model = str(checkpoint(family))
        candidate = candidate or f"hf:{model}?attn=sdpa"
        (tmp_path / "port.py").write_text(PORT)
        done = cli("record", "-m", model, "--tokens", TOKENS, "-c", candidate, "-o", "recorded.h5")
        assert done.code == 0, done.err
        return Path("recorded.h5")

    return recorded


def timeless(text: str) -> dict[str, Any]:
    """A report without its times, and the command line, which says who computed it."""
    report: dict[str, Any] = json.loads(text)
    for key in ("created", "seconds", "command"):
        del report["environment"][key]
    return report


def parts_of(cli: Cli, dump: Path, count: int) -> list[str]:
    paths = [f"{number}.part" for number in range(1, count + 1)]
    for number, path in enumerate(paths, 1):
        done = cli("diff", dump, "--shard", f"{number}/{count}", "-o", path)
        assert done.code == 0, done.err
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_all_parts_make_the_report_of_one_process(cli: Cli, dump: Callable[..., Path], family: str) -> None:
    recorded = dump(family)
    whole = timeless(cli("diff", recorded, "--json").out)
    assert whole["verdict"] == "match"
    parts = parts_of(cli, recorded, 3)
    merged = cli("merge", *reversed(parts), parts[0], "--json")
    assert merged.code == 0, merged.err
    assert timeless(merged.out) == whole
    missing = cli("merge", parts[0], parts[2], "--json")
    report = timeless(missing.out)
    assert (missing.code, report["verdict"], report["inconclusive"]["kind"]) == (2, "inconclusive", "left out")
    assert {site["gap"]["detail"] for site in report["sites"] if site["gap"]} == {"part 2/3 is missing"}
    assert report["inconclusive"]["count"] == sum(site["verdict"] == "unmeasured" for site in report["sites"]) > 0
    assert "part 2/3 is missing" in report["headline"]


@pytest.mark.slow
def test_what_is_wrong_is_found_by_the_part_that_has_it(cli: Cli, dump: Callable[..., Path]) -> None:
    recorded = dump("qwen3", "port.py:load")
    whole = timeless(cli("diff", recorded, "--json").out)
    assert whole["verdict"] == "diverged"
    parts = parts_of(cli, recorded, 3)
    assert timeless(cli("merge", *parts, "--json").out) == whole
    verdicts = {part: cli("merge", *(p for p in parts if p != part), "--json") for part in parts}
    codes = sorted(done.code for done in verdicts.values())
    assert codes == [1, 1, 2], "without the part that has it nothing is wrong, and still it is no match"


def test_layers_that_were_not_asked_for_are_left_out(cli: Cli, dump: Callable[..., Path]) -> None:
    recorded = dump("qwen3", "port.py:load")
    right = cli("diff", recorded, "--layers", "0,1", "--json", "--allow-unexamined")
    report = timeless(right.out)
    assert (right.code, report["inconclusive"]["kind"]) == (2, "left out")
    measured = {layer_of(site["site"]) for site in report["sites"] if site["verdict"] != "unmeasured"}
    assert measured == {0, 1, None}, "the ends are measured too"
    assert cli("diff", recorded, "--layers", "2").code == 1
    assert "has no layer 4" in cli("diff", recorded, "--layers", "4").err
    assert "no list of layers" in cli("diff", recorded, "--layers", "1-2").err


def test_a_part_is_computed_once_and_stays_with_its_own(cli: Cli, dump: Callable[..., Path]) -> None:
    recorded = dump("qwen3")
    again = ("diff", recorded, "--shard", "2/2", "-o", "2.part")
    parts = parts_of(cli, recorded, 2)
    before = Path("2.part").stat().st_mtime_ns
    assert cli(*again).code == 0
    assert Path("2.part").stat().st_mtime_ns == before, "what is there is not computed again"
    assert "holds another part" in cli("diff", recorded, "--shard", "1/2", "-o", "2.part").err
    cli("diff", recorded, "--shard", "1/3", "-o", "3.part")
    assert "different comparisons" in cli("merge", "2.part", "3.part").err
    Path("torn.part").write_bytes(Path("1.part").read_bytes()[:-40000])
    for name in ("torn.part", "port.py", "none.part"):
        assert f"{name}: no part of a report" in cli("merge", parts[0], name).err
    dump("qwen3", "port.py:load")  # under the same name
    assert "computed from another dump" in cli("merge", *parts).err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a", "--shard", "1/2", "-o", "x"], "--shard needs what was recorded"),
        (["--prompt", "a", "--engine", "ray"], "--engine needs what was recorded"),
        (["recorded.h5", "--shard", "1/2"], "say with --out"),
        (["recorded.h5", "--shard", "3/2", "-o", "x"], "no part of a whole"),
        (["recorded.h5", "--shard", "1/2", "--engine", "ray"], "Give one of the two"),
        (["recorded.h5", "--engine", "spark"], "not known. Give ray"),
        (["recorded.h5", "--engine", "ray", "--workers", "0"], "1 or more"),
        (["recorded.h5", "--engine", "ray", "--device", "cuda:1"], "Give --device cuda"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(
    cli: Cli, dump: Callable[..., Path], arguments: list[str], said: str
) -> None:
    if arguments[0] == "recorded.h5":
        dump("qwen3")
    done = cli("diff", *arguments)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_without_ray_it_is_said_how_to_get_it(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, dump: Callable[..., Path]
) -> None:
    recorded = dump("qwen3")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'parity[ray]'" in cli("diff", recorded, "--engine", "ray").err


def scripts_of(page: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_scripts_of_the_page_run(cli: Cli, dump: Callable[..., Path], tmp_path: Path) -> None:
    whole = timeless(cli("diff", dump("qwen3").rename("port.h5"), "--json").out)
    by_hand, _, array, merge = scripts_of((ROOT / "dumps" / "SCALE.md").read_text())
    (tmp_path / "parity").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m parity.cli "$@"\n')
    (tmp_path / "parity").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(script: str, **more: str) -> None:
        env = environment(**path, **more)
        subprocess.run(["sh", "-e", "-c", script], env=env, check=True, capture_output=True)

    run(by_hand.partition("\n")[2])  # all but the recording
    assert timeless(Path("report/report.json").read_text()) == whole
    for done in (*Path().glob("*.part"), Path("report/report.json")):
        done.unlink()
    assert "--array=1-4" in array
    run(array.replace("THREADS=4", "THREADS=1"), SLURM_ARRAY_TASK_ID="3")
    for number in (1, 2, 4):  # in this process, for the time
        cli("diff", "port.h5", "--shard", f"{number}/4", "-o", f"{number}.part")
    run(merge.replace("THREADS=4", "THREADS=1"))
    assert timeless(Path("report/report.json").read_text()) == whole


def workers_in(folder: Path) -> list[int]:
    """The processes of Ray that measure, of a command that was told of this folder in its environment."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and b"_part_of" in (process / "cmdline").read_bytes():
                ours = str(folder).encode() in (process / "environ").read_bytes()
                found += [int(process.name)] * ours
    return found


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed")
@pytest.mark.parametrize("killed", [False, True], ids=["none killed", "one killed"])
def test_workers_of_ray_make_the_same_report(cli: Cli, dump: Callable[..., Path], tmp_path: Path, killed: bool) -> None:
    recorded = dump("qwen3")
    whole = timeless(cli("diff", recorded, "--json").out)
    command = [sys.executable, "-m", "parity.cli", "diff", str(recorded), "--engine", "ray", "--workers", "2", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(OF_TEST=str(tmp_path)), **pipes) as process:
        deadline = time.monotonic() + 100
        while killed and not (workers := workers_in(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if killed:
            os.kill(workers[0], signal.SIGKILL)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert timeless(out) == whole
