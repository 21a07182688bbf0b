"""The command line from end to end: answers, exit codes, and one line for everything that can go wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from parity.dump import open_dump, write_safetensors
from parity.errors import CandidateError, ParityError
from parity.reasons import Gap
from parity.report import json as report_json
from tests.checkpoints import OTHER
from tests.conftest import Ran, environment, in_turn, slow_but

Cli = Callable[..., Ran]

TOKENS = "5 17 3 120 44 9 61 2 33"

# A candidate in a file of its own: a fresh copy of the worked example, changed by `{change}`.
PORT = """
import importlib.util, sys
import torch
from torch import nn
import impl.qwen3

spec = importlib.util.spec_from_file_location("changed_qwen3", impl.qwen3.__file__)
port = importlib.util.module_from_spec(spec)
sys.modules["changed_qwen3"] = port
spec.loader.exec_module(port)

def interleaved(x, cos, sin):
    half = x.shape[-1] // 2
    cos, sin = (table[:, :half].repeat_interleave(2, dim=-1) for table in (cos, sin))
    return x * cos + torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2) * sin

class Poison(nn.Module):
    def forward(self, x):
        x = nn.functional.silu(x)
        x[0, 2, 5] = float("nan")
        return x

def load(model_dir, dtype, device):
    model = port.load(model_dir, dtype, device)
    {change}
    return model
"""
INTERLEAVED = "port.rotate = interleaved"
NAN = "model.model.layers[1].mlp.act_fn = Poison()"


@pytest.fixture
def port(tmp_path: Path) -> Callable[[str], str]:
    """`port(change)`: the SPEC of a candidate that is the worked example with one change."""

    def write(change: str) -> str:
        (tmp_path / "my_port.py").write_text(PORT.replace("{change}", change))
        return "my_port.py:load"

    return write


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], str]:
    """`written(source)`: the SPEC of a candidate whose file holds this source."""

    def write(source: str) -> str:
        (tmp_path / "candidate_file.py").write_text(source)
        return "candidate_file.py:load"

    return write


def report_in(folder: Path) -> Any:
    return report_json.load(folder / "report.json")


def bad_sites(report: Any) -> list[str]:
    """Bad sites in order of execution."""
    return [m.site for m in report.sites if m.verdict in ("wrong", "nonfinite", "imprecise")]


# -- the main job --------------------------------------------------------------------------------------------

PROMPTS = {"Hello": "!", "The capital of France is": " Paris", "What is 2+2?": " 4"}


@pytest.mark.parametrize(("prompt", "dtype"), in_turn([], PROMPTS, ["float32", "bfloat16"]))
def test_the_worked_example_matches_the_reference(cli: Cli, tmp_path: Path, prompt: str, dtype: str) -> None:
    ran = cli("diff", "--prompt", prompt, "--dtype", dtype, "--out", tmp_path / "report")
    assert ran.code == 0, ran.out + ran.err
    assert ran.out.startswith("MATCH")
    assert "507/507" in ran.out
    report = report_in(tmp_path / "report")
    assert report.verdict == "match"
    assert (report.coverage.measured, report.coverage.known) == (507, 507)
    assert report.findings == ()
    assert report.environment.working_dtype == report.environment.candidate_dtype == dtype
    assert report.environment.prompt == prompt
    next_token = report.next_token
    assert next_token.reference[0].text == next_token.candidate[0].text == PROMPTS[prompt]
    assert next_token.unexplained_flips == 0


@pytest.mark.slow
def test_interleaved_rope_is_found_where_it_happens(cli: Cli, tmp_path: Path, port: Callable[[str], str]) -> None:
    ran = cli("diff", "-p", "The capital of France is", "-c", port(INTERLEAVED), "--out", tmp_path / "report")
    assert ran.code == 1, ran.out + ran.err
    assert ran.out.startswith("DIVERGED")
    bad = bad_sites(report_in(tmp_path / "report"))
    assert bad[0] == "model.layers.0.self_attn.q_rope"
    expected = {f"model.layers.{i}.self_attn.{n}" for i in range(28) for n in ("q_rope", "k_rope")}
    assert set(bad) == expected, "and nowhere else"


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["float32", "bfloat16", "float16"]))
def test_a_right_candidate_matches(cli: Cli, small: Path, tmp_path: Path, dtype: str) -> None:
    ran = cli("diff", "--tokens", TOKENS, "--model", small, "--dtype", dtype, "--out", tmp_path / "report")
    assert ran.code == 0, ran.out + ran.err
    report = report_in(tmp_path / "report")
    assert report.verdict == "match"
    assert report.coverage.measured == report.coverage.known == 39
    assert all(check.ok for check in report.checks)


@pytest.mark.parametrize("dtype", slow_but(["float32"], ["float32", "bfloat16"]))
def test_a_wrong_operation_is_found_first(
    cli: Cli, small: Path, tmp_path: Path, port: Callable[[str], str], dtype: str
) -> None:
    out = tmp_path / "report"
    ran = cli("diff", "--tokens", TOKENS, "-m", small, "-c", port(INTERLEAVED), "--dtype", dtype, "-o", out)
    assert ran.code == 1, ran.out + ran.err
    report = report_in(out)
    assert report.verdict == "diverged"
    bad = bad_sites(report)
    assert bad[0] == "model.layers.0.self_attn.q_rope"
    assert set(bad) == {f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ("q_rope", "k_rope")}
    (found,) = report.findings
    assert found.families == ("model.layers.*.self_attn.q_rope", "model.layers.*.self_attn.k_rope")
    assert found.fault is not None
    assert found.fault.id == "rope-interleaved"
    assert report.findings[0].layers == (0, 1)
    assert report.findings[0].first_token == 1


def test_a_candidate_that_makes_nan_is_found_there(
    cli: Cli, small: Path, tmp_path: Path, port: Callable[[str], str]
) -> None:
    ran = cli("diff", "--tokens", TOKENS, "-m", small, "-c", port(NAN), "-o", tmp_path / "report")
    assert ran.code == 1, ran.out + ran.err
    report = report_in(tmp_path / "report")
    assert report.verdict == "diverged"
    verdicts = {m.site: m.verdict for m in report.sites}
    assert bad_sites(report) == ["model.layers.1.mlp.act_fn"]
    assert verdicts["model.layers.1.mlp.act_fn"] == "nonfinite"
    assert verdicts["model.layers.1.mlp.up_proj"] in ("exact", "rounding")
    assert report.next_token is None


@pytest.mark.parametrize("count", slow_but([6], [1, 2, 6, 20]))
def test_token_counts_that_equal_another_size_are_no_trouble(cli: Cli, small: Path, count: int) -> None:
    """One token; as many as key heads; as query heads; as a head is wide."""
    assert cli("diff", "--tokens", " ".join(map(str, range(count))), "--model", small).code == 0


def test_logits_are_what_the_candidate_returns(
    cli: Cli, small: Path, tmp_path: Path, port: Callable[[str], str]
) -> None:
    change = "head = model.lm_head; del model.lm_head; model.lm_head = lambda x: x @ head.weight.T"
    ran = cli("diff", "--tokens", TOKENS, "-m", small, "-c", port(change), "-o", tmp_path / "report")
    assert ran.code == 0, ran.out + ran.err
    assert report_in(tmp_path / "report").coverage.measured == 39


def test_a_batch_is_compared_row_by_row(cli: Cli, small: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("1 2 3\n\n4, 5, 6\n")
    ran = cli("diff", "--tokens", "ids.txt", "--model", small, "-o", tmp_path / "report")
    assert ran.code == 0, ran.err
    env = report_in(tmp_path / "report").environment
    assert (env.batch, env.tokens) == (2, 3)


def test_sdpa_as_the_reference_raises_no_alarm(cli: Cli, small: Path) -> None:
    assert cli("diff", "--tokens", TOKENS, "--model", small, "--attention", "sdpa").code == 0


def test_scores_and_probs_are_compared_when_asked_for(cli: Cli, small: Path, tmp_path: Path) -> None:
    ran = cli("diff", "--tokens", TOKENS, "--model", small, "--inner", "-o", tmp_path / "report")
    assert ran.code == 0, ran.out + ran.err
    assert report_in(tmp_path / "report").coverage.measured == 43


@pytest.mark.parametrize(("model_type", "dtype"), in_turn(["qwen3_moe", "gemma3_text"], OTHER, ["bfloat16", "float32"]))
def test_a_model_matches_its_own_recording(
    cli: Cli, checkpoint: Callable[..., Path], tmp_path: Path, model_type: str, dtype: str
) -> None:
    model = checkpoint(model_type)
    ran = cli("record", "--tokens", TOKENS, "--model", model, "--dtype", dtype, "-o", "self.h5")
    assert ran.code == 0, ran.err
    ran = cli("diff", "self.h5", "-o", tmp_path / "report")
    assert ran.code == 0, ran.out + ran.err
    report = report_in(tmp_path / "report")
    assert report.coverage.measured == report.coverage.known
    assert {m.verdict for m in report.sites} == {"exact"}
    # A truth that is something else entirely hides behind a floor that is as large.
    rounding = {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    assert {m.site: m.floor_rel for m in report.sites if m.floor_rel > rounding} == {}


# -- what comes out ------------------------------------------------------------------------------------------


def test_json_alone_on_stdout(cli: Cli, small: Path, tmp_path: Path) -> None:
    ran = cli("diff", "--tokens", TOKENS, "--model", small, "--json", "--out", tmp_path / "report")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["schema"] == 2
    assert json.loads(ran.out)["verdict"] == "match"
    assert (tmp_path / "report" / "report.json").read_text() == ran.out
    assert ran.err == ""


def test_json_writes_no_report_unless_asked(cli: Cli, small: Path, tmp_path: Path) -> None:
    assert cli("diff", "--tokens", TOKENS, "--model", small, "--json").code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_candidate_that_prints_does_not_spoil_the_json(cli: Cli, small: Path, port: Callable[[str], str]) -> None:
    ran = cli("diff", "--tokens", TOKENS, "-m", small, "-c", port("print('loaded')"), "--json")
    assert json.loads(ran.out)["verdict"] == "match"


def test_json_of_an_error_is_nothing_at_all(cli: Cli, small: Path) -> None:
    ran = cli("diff", "--tokens", "9999", "--model", small, "--json")
    assert (ran.code, ran.out) == (2, "")


def test_a_report_lands_in_reports_by_default(cli: Cli, small: Path, tmp_path: Path) -> None:
    ran = cli("diff", "--tokens", TOKENS, "--model", small)
    found = list(tmp_path.glob("reports/*/report.json"))
    assert len(found) == 1
    assert str(found[0].with_name("index.html").relative_to(tmp_path)) in ran.out.replace("\n", "")
    assert found[0].with_name("index.html").is_file()


@pytest.mark.slow
def test_verbose_names_every_site(cli: Cli, small: Path) -> None:
    brief, full = (cli("diff", "--tokens", TOKENS, "-m", small, *more).out for more in ([], ["--verbose"]))
    assert "layers.1.mlp.up_proj" not in brief
    assert "layers.1.mlp.up_proj" in full.replace("\n", "")


def test_sites_are_listed(cli: Cli, small: Path) -> None:
    folded = cli("sites", "--model", small).out.splitlines()
    assert len(folded) == 3 + 18
    assert "model.layers.*.self_attn.q_rope" in folded[7]
    assert folded[7].endswith("layers 0-1")
    ran = cli("sites", "--model", small, "-v")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert len(lines) == 39
    assert lines[0].split() == ["model.embed_tokens", "batch", "token", "feature=80", "bfloat16"]
    found = json.loads(cli("sites", "--model", small, "--json").out)
    assert [s["site"] for s in found] == [line.split()[0] for line in lines]
    assert found[-1] == {
        "site": "lm_head",
        "dims": ["batch", "token", "feature"],
        "shape": [0, 0, 301],
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    ("line", "word", "offered"), [("parity in", 1, "invariance"), ("parity show d --ag", 3, "--against")]
)
def test_a_shell_is_told_what_may_come_next(run_cli: Cli, line: str, word: int, offered: str) -> None:
    asking = {"_PARITY_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(word)}
    ran = run_cli(env=asking)
    assert ran.out.split() == [offered], ran.err


def test_version_is_one_word(cli: Cli) -> None:
    ran = cli("--version")
    assert ran.code == 0, ran.err
    assert ran.out.strip().replace(".", "").isalnum()


# -- dumps ---------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(cli: Cli, small: Path, tmp_path: Path) -> Path:
    """The reference's run in float32, in ref.h5."""
    ran = cli("record", "--tokens", TOKENS, "--model", small, "--dtype", "float32", "-o", "ref.h5")
    assert ran.code == 0, ran.err
    return tmp_path / "ref.h5"


def test_a_recording_can_be_read(recorded: Path, small: Path) -> None:
    with open_dump(recorded) as dump:
        assert dump.info.token_ids == (tuple(map(int, TOKENS.split())),)
        assert (dump.info.model, dump.info.dtype) == (str(small), "float32")
        assert len(dump.entries) == 39
        assert dump.entries["lm_head"].dims == ("batch", "token", "feature")
        assert dump.read("model.layers.1.self_attn.q_rope").shape == (1, 6, 9, 20)
    assert recorded.with_suffix(".tokens.txt").read_text() == TOKENS + "\n"
    assert sorted(p.name for p in recorded.parent.iterdir()) == ["ref.h5", "ref.tokens.txt"]


def test_the_token_file_is_read_by_tokens(cli: Cli, recorded: Path, small: Path) -> None:
    cli("record", "--tokens", "ref.tokens.txt", "--model", small, "-o", "again.h5")
    assert (recorded.parent / "again.tokens.txt").read_text() == TOKENS + "\n"


def test_a_recorded_candidate_says_what_it_lacks(cli: Cli, small: Path, port: Callable[[str], str]) -> None:
    spec = port("del model.model.layers[0].mlp.product; model.model.layers[0].mlp.product = lambda x: x")
    ran = cli("record", "--tokens", TOKENS, "--model", small, "-c", spec, "-o", "port.h5")
    assert ran.code == 0, ran.err
    assert ran.out.count("not recorded") == 1
    assert "model.layers.0.mlp.product" in ran.out


def test_two_dumps_are_compared(cli: Cli, recorded: Path, small: Path) -> None:
    ran = cli("record", "--tokens", TOKENS, "-m", small, "--dtype", "float32", "-c", "impl.qwen3:load", "-o", "port.h5")
    assert ran.code == 0, ran.err
    ran = cli("diff", "ref.h5", "port.h5")
    assert ran.code == 0, ran.out + ran.err
    assert "39/39" in ran.out


@pytest.mark.parametrize("arguments", [("ref.h5",), ("ref.h5", "--model", "SMALL"), ("-c", "ref.h5")], ids=str)
def test_a_dump_alone_is_the_candidate(cli: Cli, recorded: Path, small: Path, arguments: tuple[str, ...]) -> None:
    ran = cli("diff", *(str(small) if a == "SMALL" else a for a in arguments))
    assert ran.code == 0, ran.out + ran.err
    assert "39/39" in ran.out


def test_a_dump_is_judged_in_the_dtype_of_the_candidate(cli: Cli, recorded: Path, small: Path, tmp_path: Path) -> None:
    ran = cli("record", "--tokens", TOKENS, "-m", small, "--dtype", "bfloat16", "-c", "impl.qwen3:load", "-o", "b.h5")
    assert ran.code == 0, ran.err
    ran = cli("diff", "ref.h5", "b.h5", "-o", tmp_path / "report")
    assert ran.code == 0, ran.out + ran.err
    assert report_in(tmp_path / "report").environment.working_dtype == "bfloat16"


def interchange(source: Path, target: Path, keep: Callable[[str], bool], change: dict[str, Any], **info: str) -> None:
    """Some sites of a recording as a port in another language would write them."""
    with open_dump(source) as dump:
        tensors = {site: np.array(dump.read(site)) for site in dump.entries if keep(site)}
        metadata = {"parity.token_ids": json.dumps(dump.info.token_ids)}
    for site, edit in change.items():
        tensors[site] = edit(tensors[site])
    write_safetensors(target, tensors, metadata | {f"parity.{key}": value for key, value in info.items()})


def is_coarse(site: str) -> bool:
    return site.split(".")[-1].isdigit() or "layers" not in site


def test_a_port_that_dumps_only_layers_is_judged_by_layers(
    cli: Cli, recorded: Path, small: Path, tmp_path: Path
) -> None:
    interchange(recorded, tmp_path / "port.safetensors", is_coarse, {})
    ran = cli("diff", "port.safetensors", "-m", small, "--dtype", "float32", "-o", tmp_path / "report")
    assert ran.code == 0, ran.out + ran.err
    report = report_in(tmp_path / "report")
    assert (report.coverage.measured, report.coverage.known) == (5, 39)
    assert {m.gap for m in report.sites if m.verdict == "unmeasured"} == {Gap("not recorded")}


def test_a_wrong_layer_names_the_operations_it_may_be(cli: Cli, recorded: Path, small: Path, tmp_path: Path) -> None:
    interchange(recorded, tmp_path / "port.safetensors", is_coarse, {"model.layers.1": lambda x: x * 1.01})
    ran = cli("diff", "port.safetensors", "-m", small, "--dtype", "float32", "-o", tmp_path / "report")
    assert ran.code == 1, ran.out + ran.err
    report = report_in(tmp_path / "report")
    assert bad_sites(report) == ["model.layers.1"]
    span = report.findings[0].span
    assert span[0] == "model.layers.1.input_layernorm"
    assert span[-1] == "model.layers.1.mlp.down_proj"


def test_a_port_may_lay_out_its_axes_as_it_likes(cli: Cli, recorded: Path, small: Path, tmp_path: Path) -> None:
    site = "model.layers.0.self_attn.q_rope"
    interchange(
        recorded,
        tmp_path / "port.safetensors",
        lambda _site: True,
        {site: lambda x: np.ascontiguousarray(x[0].transpose(1, 0, 2))},
        dims=json.dumps({site: "token head head_dim"}),
    )
    ran = cli("diff", "port.safetensors", "-m", small, "--dtype", "float32", "-o", tmp_path / "report")
    assert ran.code == 0, ran.out + ran.err
    steps = {m.site: m.steps for m in report_in(tmp_path / "report").sites if m.steps}
    assert steps == {site: ("token head head_dim → batch head token head_dim",)}


def test_missing_logits_are_never_a_match(cli: Cli, recorded: Path, small: Path, tmp_path: Path) -> None:
    interchange(recorded, tmp_path / "port.safetensors", lambda site: site != "lm_head", {})
    ran = cli("diff", "port.safetensors", "-m", small, "--dtype", "float32")
    assert ran.code == 2
    assert ran.out.startswith("INCONCLUSIVE")


def test_a_dump_of_nothing_but_strangers_is_never_a_match(cli: Cli, small: Path, tmp_path: Path) -> None:
    write_safetensors(
        tmp_path / "port.safetensors",
        {"blk.0.attn_q": np.zeros((1, 3, 4), np.float32)},
        {"parity.token_ids": "[[1, 2, 3]]"},
    )
    assert cli("diff", "port.safetensors", "-m", small).code == 2


def test_bits_of_a_bfloat16_recording_are_kept(cli: Cli, small: Path, tmp_path: Path) -> None:
    cli("record", "--tokens", TOKENS, "-m", small, "-o", "ref.h5")
    with open_dump(tmp_path / "ref.h5") as dump:
        assert dump.entries["lm_head"].dtype == "bfloat16"
        assert dump.read("lm_head").dtype == np.dtype(ml_dtypes.bfloat16)


# -- what can go wrong ---------------------------------------------------------------------------------------


def one_line(ran: Ran, *words: str) -> None:
    """Exit code 2 and a single line on stderr that says all of `words`."""
    assert ran.code == 2, ran
    assert ran.out == "", ran
    assert ran.err.startswith("parity: "), ran
    assert ran.err.count("\n") == 1, ran
    assert ran.err.endswith("\n"), ran
    assert "internal error" not in ran.err, ran
    for word in words:
        assert word in ran.err, ran


RUN = ("diff", "--tokens", TOKENS, "--model", "SMALL")
BAD_CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown model directory": (("diff", "--tokens", "1", "--model", "./nowhere"), ("./nowhere", "no such directory")),
    "unknown hub id": (("diff", "--tokens", "1", "--model", "nobody/nothing"), ("nobody/nothing", "HF_HUB_OFFLINE")),
    "model that is a file": (("diff", "--tokens", "1", "--model", "a_file"), ("a_file",)),
    "no model in sites": (("sites", "--model", "./nowhere"), ("./nowhere",)),
    "candidate file missing": ((*RUN, "-c", "no_file.py:load"), ("no_file.py",)),
    "candidate module missing": ((*RUN, "-c", "no_such_module:load"), ("no_such_module",)),
    "candidate function missing": ((*RUN, "-c", "impl.qwen3:laod"), ("laod", "load")),
    "candidate without function": ((*RUN, "-c", "impl.qwen3"), ("module:function",)),
    "nothing to run": (("diff", "--model", "SMALL"), ("--prompt",)),
    "empty prompt": (("diff", "--prompt", "", "--model", "tiny-qwen3"), ("empty",)),
    "empty tokens": (("diff", "--tokens", "", "--model", "SMALL"), ("empty",)),
    "tokens of blanks": (("diff", "--tokens", " \n ", "--model", "SMALL"), ("empty",)),
    "prompt file missing": (("diff", "--prompt-file", "nowhere.txt", "--model", "SMALL"), ("nowhere.txt",)),
    "prompt file not text": (("diff", "--prompt-file", "bytes", "--model", "SMALL"), ("bytes", "UTF-8")),
    "no tokenizer": (("diff", "--prompt", "Hello", "--model", "SMALL"), ("tokenizer", "--tokens")),
    "prompt too long": (("diff", "--tokens", "long.txt", "--model", "tiny-qwen3"), ("2049", "2048")),
    "token beyond the vocabulary": (("diff", "--tokens", "1 301", "--model", "SMALL"), ("301", "300")),
    "token below zero": (("diff", "--tokens", "1 -1", "--model", "SMALL"), ("-1",)),
    "token of many digits": (("diff", "--tokens", "9" * 30, "--model", "SMALL"), ("9" * 30,)),
    "tokens not numbers": (("diff", "--tokens", "one two", "--model", "SMALL"), ("one",)),
    "tokens as long as a prompt, not numbers": (("diff", "--tokens", "x " * 200, "--model", "SMALL"), ("--tokens",)),
    "tokens file not text": (("diff", "--tokens", "bytes", "--model", "SMALL"), ("bytes",)),
    "ragged tokens": (("diff", "--tokens", "ragged.txt", "--model", "SMALL"), ("3, 2",)),
    "prompt and tokens": (("diff", "--prompt", "a", "--tokens", "1"), ("--prompt", "--tokens")),
    "prompt and file": (("record", "-o", "x.h5", "--prompt", "a", "--prompt-file", "b"), ("--prompt-file",)),
    "unknown dtype": ((*RUN, "--dtype", "float12"), ("float12", "bfloat16")),
    "dtype that is not one": ((*RUN, "--dtype", "nn"), ("'nn'",)),
    "unknown device": ((*RUN, "--device", "mars"), ("mars",)),
    "device that computes nothing": ((*RUN, "--device", "meta"), ("meta",)),
    "unknown attention": ((*RUN, "--attention", "nonsense"), ("nonsense", "eager")),
    "report below a file": ((*RUN, "--out", "a_file/report"), ("a_file/report", "--out")),
    "report is a file": ((*RUN, "--out", "a_file"), ("a_file",)),
    "record below a file": (("record", *RUN[1:], "-o", "a_file/x.h5"), ("a_file",)),
    "record to a directory": (("record", *RUN[1:], "-o", "."), ("directory",)),
    "dump missing": (("diff", "nowhere.h5"), ("nowhere.h5",)),
    "dump missing as candidate": ((*RUN, "-c", "nowhere.h5"), ("nowhere.h5",)),
    "dump that is none": (("diff", "a_file", "--model", "SMALL"), ("a_file", "not a dump")),
    "dump of no bytes": (("diff", "empty.h5", "--model", "SMALL"), ("empty.h5",)),
    "three dumps": (("diff", "a", "b", "c"), ("3 dumps",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_answered_in_one_line(cli: Cli, small: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "a_file").write_text("nothing of interest\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "ragged.txt").write_text("1 2 3\n4 5\n")
    (tmp_path / "long.txt").write_text("1 " * 2049)
    (tmp_path / "empty.h5").touch()
    arguments, words = BAD_CALLS[case]
    ran = cli(*(str(small) if a == "SMALL" else a for a in arguments))
    one_line(ran, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(cli: Cli, small: Path) -> None:
    one_line(cli(*RUN[:-1], small, "--device", "cuda"), "device 'cuda'")


def answering(statement: str) -> str:
    """A candidate whose forward pass is one statement."""
    return f"""
from torch import nn
class Model(nn.Module):
    def forward(self, x):
        {statement}
def load(*arguments):
    return Model()
"""


BAD_CANDIDATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "does not parse": ("def load(:", ("SyntaxError",)),
    "fails at import": ("import nothing_of_this_name", ("nothing_of_this_name", "candidate_file.py:1")),
    "ends the program at import": ("import sys\nsys.exit(0)", ("SystemExit",)),
    "has no load": ("x = 1", ("no function 'load'",)),
    "fails in load": ("def load(*a):\n    raise ValueError('no\\nsuch weight')", ("no such", "candidate_file.py:2")),
    "ends the program in load": ("import sys\ndef load(*a):\n    sys.exit(0)", ("SystemExit",)),
    "takes other arguments": ("def load():\n    pass", ("it takes ()", "model_dir, dtype, device")),
    "returns no module": ("def load(*a):\n    return 3", ("int", "torch.nn.Module")),
    "fails in forward": (answering("raise KeyError('k')"), ("KeyError", "candidate_file.py:5")),
    "ends the program in forward": (answering("raise SystemExit(0)"), ("SystemExit",)),
    "returns no logits": (answering("return {'a': x}"), ("dict", "logits")),
    "has no module of a known name": (answering("return x[..., None].float()"), ("no submodule", "parity sites")),
}


@pytest.mark.parametrize("case", BAD_CANDIDATES)
def test_a_bad_candidate_is_answered_in_one_line(
    cli: Cli, small: Path, tmp_path: Path, written: Callable[[str], str], case: str
) -> None:
    source, words = BAD_CANDIDATES[case]
    spec = written(source)
    one_line(cli(*RUN[:-1], small, "-c", spec), *words)
    one_line(cli("record", *RUN[1:-1], small, "-c", spec, "-o", "port.h5"), *words)
    assert not list(tmp_path.glob("*port.h5*")), "and no dump is left behind"


def test_a_candidate_may_bear_the_name_of_a_module_in_use(
    cli: Cli, small: Path, tmp_path: Path, port: Callable[[str], str]
) -> None:
    before = json
    port("pass")
    (tmp_path / "my_port.py").rename(tmp_path / "json.py")
    try:
        ran = cli(*RUN[:-1], small, "-c", "json.py:load")
        assert sys.modules["json"] is before
    finally:
        sys.modules["json"] = before
    assert ran.code == 0, ran.err


def test_a_truncated_dump(cli: Cli, recorded: Path, small: Path) -> None:
    whole = recorded.read_bytes()
    for share in (0.02, 0.98):
        recorded.write_bytes(whole[: int(len(whole) * share)])
        one_line(cli("diff", "ref.h5", "--model", small), "ref.h5")


def test_a_dump_of_another_model(cli: Cli, recorded: Path, checkpoint: Callable[..., Path]) -> None:
    other = checkpoint("qwen3", layers=2, bias=True)
    one_line(cli("diff", "ref.h5", "--model", other), "ref.h5", "fingerprint")


def test_two_dumps_of_two_models(cli: Cli, recorded: Path, checkpoint: Callable[..., Path]) -> None:
    other = checkpoint("qwen3", layers=2, tied=True)
    assert cli("record", "--tokens", TOKENS, "-m", other, "--dtype", "float32", "-o", "other.h5").code == 0
    ran = cli("diff", "ref.h5", "other.h5", "--no-power")
    assert ran.code == 1
    assert ran.out.startswith("DIVERGED  the weights differ:")


def test_a_dump_of_other_tokens(cli: Cli, recorded: Path, small: Path) -> None:
    one_line(cli("diff", "ref.h5", "--tokens", "1 2 3", "--model", small), "token ids", "[5, 17, 3")


def test_two_dumps_of_other_tokens(cli: Cli, recorded: Path, small: Path) -> None:
    assert cli("record", "--tokens", "1 2 3", "-m", small, "--dtype", "float32", "-o", "other.h5").code == 0
    one_line(cli("diff", "ref.h5", "other.h5"), "token ids")


def test_a_dump_that_does_not_say_its_tokens(cli: Cli, small: Path, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "port.safetensors", {"lm_head": np.zeros((1, 3, 301), np.float32)}, {})
    one_line(cli("diff", "port.safetensors", "--model", small), "token ids", "--tokens")


def test_a_dump_whose_model_is_gone(cli: Cli, small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "model")
    assert cli("record", "--tokens", TOKENS, "--model", "model", "-o", "ref.h5").code == 0
    shutil.rmtree(tmp_path / "model")
    one_line(cli("diff", "ref.h5"), "'model'")


def test_an_ambiguous_dump_says_how_to_declare_its_axes(cli: Cli, small: Path, tmp_path: Path) -> None:
    ids = list(range(6))  # as many tokens as heads
    q_rope = np.zeros((1, 6, 6, 20), np.float32)
    write_safetensors(
        tmp_path / "port.safetensors",
        {"model.layers.0.self_attn.q_rope": q_rope},
        {"parity.token_ids": json.dumps([ids])},
    )
    one_line(cli("diff", "port.safetensors", "--model", small), "q_rope", "parity.dims")


@pytest.mark.parametrize(
    "arguments",
    [("diff", "--nonsense"), ("frobnicate",), ("record", "--tokens", "1"), ("diff", "--inner=maybe")],
    ids=str,
)
def test_what_the_parser_refuses_ends_with_two(cli: Cli, arguments: tuple[str, ...]) -> None:
    ran = cli(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert "Error: " in ran.err
    assert "Traceback" not in ran.err


def test_debug_lets_the_error_through(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Callable[[str], str]
) -> None:
    from parity.cli import main

    monkeypatch.chdir(tmp_path)
    spec = written("def load(*a):\n    raise ValueError('planted')")
    arguments = ["parity", "diff", "--tokens", "1", "--model", str(small), "-c", spec, "--debug"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(CandidateError) as caught:
        main()
    assert isinstance(caught.value.__cause__, ValueError)
    monkeypatch.setattr(sys, "argv", ["parity", "--debug", "diff", "nowhere.h5"])
    with pytest.raises(ParityError):
        main()


# -- in a process of its own ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_but_the_report_comes_out_of_a_process(run_cli: Cli, small: Path) -> None:
    ran = run_cli("diff", "--tokens", TOKENS, "--model", small, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["verdict"] == "match"
    assert ran.err == ""


@pytest.mark.slow
def test_an_error_of_a_process_is_one_line(run_cli: Cli) -> None:
    ran = run_cli("diff", "--prompt", "")
    one_line(ran, "empty")


def test_debug_shows_a_traceback(run_cli: Cli) -> None:
    ran = run_cli("--debug", "diff", "--prompt", "a", "--tokens", "1")
    assert ran.code != 0
    assert ran.err.startswith("Traceback")
    assert "UsageError" in ran.err
    plain = run_cli("diff", "--prompt", "a", "--tokens", "1")
    one_line(plain, "--prompt", "--tokens")


@pytest.mark.slow
@pytest.mark.parametrize("candidate", [(), ("-c", "impl.qwen3:load")], ids=["reference", "candidate"])
def test_ctrl_c_leaves_nothing_that_looks_whole(tmp_path: Path, candidate: tuple[str, ...]) -> None:
    tokens = tmp_path / "ids.txt"
    tokens.write_text("1 2 3 " * 600)
    command = [sys.executable, "-m", "parity.cli", "record", "--tokens", "ids.txt", *candidate, "-o", "out/ref.h5"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out = tmp_path / "out"
    deadline = time.monotonic() + 60
    while not list(out.glob(".*partial*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert list(out.iterdir()) == []
    assert "Traceback" not in errors
