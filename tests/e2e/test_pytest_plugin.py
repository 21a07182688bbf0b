"""The pytest plugin, seen from a test suite that uses it: pytest inside pytest."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import parity.errors
import parity.testing.items
from parity.api import recorded
from parity.candidates.base import open_candidate
from parity.options import RunOptions
from parity.reasons import Gap
from parity.report import json as report_json
from parity.results import Comparison, Measurement
from parity.settings import Settings
from parity.testing import baseline
from tests.conftest import ROOT, environment
from tests.report_example import in_regime

TOKENS = (5, 9, 200, 17, 3, 88, 41)
ITEMS = 4 + 4  # layers of the checkpoint and ends
# What looks for leaks at the end of a session walks through all objects of torch, five times.
WITHOUT = ("cacheprovider", "unraisableexception", "threadexception")
QUIET = ("-p", "parity.testing.plugin", *(part for name in WITHOUT for part in ("-p", f"no:{name}")))

Session = Callable[..., pytest.RunResult]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside, pytest has no other plugin than ours."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture(scope="session")
def four(checkpoint: Callable[..., Path]) -> Path:
    """A random Qwen3 of four layers and no tokenizer."""
    return checkpoint("qwen3", layers=4)


@pytest.fixture(scope="session")
def clean(four: Path) -> Comparison:
    """What parity really says of a correct candidate on it."""
    return parity.testing.items.compare(parity.testing.items.Run("t", ask(four), "impl.qwen3:load", None))


def ask(model: Path) -> RunOptions:
    return RunOptions(model=str(model), tokens=" ".join(map(str, TOKENS)))


def suite(folder: Path, model: Path | str, more: str = "", prompts: object = (TOKENS,), candidate: str = "") -> None:
    """Write a test file that has one port."""
    (folder / "test_x.py").write_text(
        "import parity.testing\n\n"
        f"test_port = parity.testing.cases(candidate={candidate or 'impl.qwen3:load'!r}, model={str(model)!r}, "
        f"prompts={list(prompts)!r}, {more})\n"  # type: ignore[call-overload]
    )


@pytest.fixture
def faked(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, four: Path) -> Session:
    """Run the suite of one port whose comparison is given (or one for each prompt), in this process.

    Counts comparisons in `made.txt`.
    """

    def run(
        answer: Comparison | Exception | dict[str, Comparison | Exception],
        *arguments: str,
        more: str = "",
        prompts: object = (TOKENS,),
        model: Path | str = four,
    ) -> pytest.RunResult:
        made = pytester.path / "made.txt"
        made.write_text("")

        def compare(run: parity.testing.items.Run) -> Comparison:
            c = answer[run.id] if isinstance(answer, dict) else answer
            with made.open("a") as stream:
                stream.write("x")
            (pytester.path / "accepted.txt").write_text(str(run.options.accept))
            if isinstance(c, Exception):
                raise c
            return c

        monkeypatch.setattr(parity.testing.items, "compare", compare)
        suite(pytester.path, model, more, prompts)
        return pytester.runpytest_inprocess(*QUIET, *arguments)

    return run


def made(pytester: pytest.Pytester) -> int:
    return len((pytester.path / "made.txt").read_text())


def changed(c: Comparison, site: str, **more: object) -> Comparison:
    """The Comparison with one site measured otherwise."""
    sites = tuple(replace(m, **more) if m.site == site else m for m in c.sites)  # type: ignore[arg-type]
    return replace(c, sites=sites)


def ratio_of(c: Comparison, site: str) -> float:
    found: Measurement = next(m for m in c.sites if m.site == site)
    assert found.ratio is not None
    return found.ratio


ACT = "model.layers.1.mlp.act_fn"


# -- items ---------------------------------------------------------------------------------------------------


def test_an_item_for_each_prompt_and_part(faked: Session, clean: Comparison, pytester: pytest.Pytester) -> None:
    (pytester.path / "long.txt").write_text("Ein langer Text")
    result = faked(
        clean,
        "--collect-only",
        "-q",
        prompts=[TOKENS, "The capital of France is Paris", "@long.txt", "long", "中国", TOKENS, ["a", "b"]],
    )
    parts = ["embedding", *(f"layers.{i}" for i in range(4)), "final_norm", "logits", "next_token"]
    prompts = ["7-tokens", "the-capital-of-france-is", "long", "long-2", "prompt", "7-tokens-2", "batch-of-2"]
    names = [line for line in result.outlines if "::" in line]
    assert names == [f"test_x.py::test_port[{prompt}-{part}]" for prompt in prompts for part in parts]
    assert made(pytester) == 0


def test_all_items_share_one_comparison(faked: Session, clean: Comparison, pytester: pytest.Pytester) -> None:
    result = faked(clean)
    result.assert_outcomes(passed=ITEMS)
    assert made(pytester) == 1
    summary = [line for line in result.outlines if line.startswith("parity: ")]
    assert len(summary) == 1
    assert summary[0].startswith("parity: 1 match; worst ratio ")
    page = Path(summary[0].rpartition("report: ")[2])
    assert page.name == "index.html"
    assert "<html" in page.read_text()
    assert report_json.load(page.with_name("report.json")) == clean


def test_one_layer_is_selected_by_name(faked: Session, clean: Comparison, pytester: pytest.Pytester) -> None:
    result = faked(clean, "-k", "layers.2", prompts=[TOKENS, (1, 2)])
    result.assert_outcomes(passed=2, deselected=2 * ITEMS - 2)
    assert made(pytester) == 2


def test_marks_of_pytest_apply(faked: Session, clean: Comparison, pytester: pytest.Pytester) -> None:
    result = faked(clean, more=")\nimport pytest\ntest_port = pytest.mark.skip(reason='later')(test_port")
    result.assert_outcomes(skipped=ITEMS)
    assert made(pytester) == 0


def test_a_failing_item_says_what_and_why(faked: Session, clean: Comparison) -> None:
    result = faked(replace(changed(clean, ACT, verdict="wrong", ratio=104.0, reason="too large"), verdict="diverged"))
    result.assert_outcomes(passed=ITEMS - 1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*test_port[[]7-tokens-layers.1]*",
            f"{ACT}: wrong, ratio 104 (rounding: up to 2): too large",
            "layers.1 of impl.qwen3:load: 1 failing, bfloat16, 7 tokens",
            "report: *index.html",
            "again:  parity diff --candidate impl.qwen3:load --model * --tokens '5 9 200 17 3 88 41'",
            f"parity: 1 diverged; worst ratio 104 at {ACT}; report: *index.html",
        ]
    )
    result.stdout.no_fnmatch_line("*parity_check*")


def test_properties_go_into_junit(faked: Session, clean: Comparison, pytester: pytest.Pytester) -> None:
    faked(changed(clean, ACT, verdict="wrong", ratio=104.0), "--junitxml=j.xml")
    cases = ElementTree.parse(pytester.path / "j.xml").findall(".//testcase")
    properties = {
        case.get("name"): {p.get("name"): p.get("value") for p in case.findall(".//property")} for case in cases
    }
    bad = properties["test_port[7-tokens-layers.1]"]
    assert (bad["parity_worst_ratio"], bad["parity_worst_site"]) == ("104", ACT)
    assert (bad["parity_finding"] or "").startswith(f"{ACT}: wrong")
    assert (bad["parity_run"], bad["parity_part"]) == ("test_port[7-tokens]", "layers.1")
    assert "parity_finding" not in properties["test_port[7-tokens-layers.0]"]


def test_a_port_in_a_class(faked: Session, clean: Comparison, pytester: pytest.Pytester) -> None:
    in_class = ")\nclass TestPort:\n    def test_x(self):\n        pass\n    test_port = staticmethod(test_port"
    bad = changed(clean, ACT, verdict="wrong", ratio=104.0)
    for more in (in_class, in_class.replace("staticmethod(", "(")):
        result = faked(bad, "-k", "TestPort", "--parity-record", "--parity-record-failing", more=more)
        result.assert_outcomes(passed=ITEMS, failed=1, deselected=ITEMS)
        result.stdout.fnmatch_lines(["*TestPort.test_port[[]7-tokens-layers.1]*", f"{ACT}: wrong*"])
    assert list(baseline.load(pytester.path / "test_x.baseline.txt")) == ["TestPort::test_port[7-tokens]"]


def test_a_port_in_a_test_case_of_unittest(faked: Session, clean: Comparison) -> None:
    result = faked(clean, more=")\nimport unittest\nclass TestPort(unittest.TestCase):\n    test_y = (test_port")
    result.assert_outcomes(passed=ITEMS, errors=1)
    result.stdout.fnmatch_lines(
        ["test_y: pytest gives a unittest.TestCase no parameters. Put cases() into the module *"]
    )


# -- limits --------------------------------------------------------------------------------------------------


def test_limits_of_the_file_and_of_the_call(faked: Session, clean: Comparison, pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\n[tool.parity.thresholds]\n"*.mlp.*" = { mse = 0 }')
    c = changed(changed(clean, "lm_head", mse=0.5), ACT, mse=0.1)
    result = faked(c)
    result.assert_outcomes(passed=ITEMS - 1, failed=1)
    result.stdout.fnmatch_lines([f"{ACT}: MSE 0.1 (threshold: 0)"])
    result = faked(c, more="thresholds={'*.mlp.*': {}, 'lm_head': {'mse': 0.1}}")
    result.assert_outcomes(passed=ITEMS - 1, failed=1)
    result.stdout.fnmatch_lines(["lm_head: MSE 0.5 (threshold: 0.1)"])


def test_accepted_regimes_of_file_and_call_reach_the_run_and_are_said(
    faked: Session, clean: Comparison, pytester: pytest.Pytester
) -> None:
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\n[tool.parity]\naccept = ["kv-cache-fp16"]')
    result = faked(replace(clean, accepted=in_regime().accepted), more="accept='products-tf32'")
    result.assert_outcomes(passed=ITEMS)
    result.stdout.fnmatch_lines(["parity: 1 match, in the accepted regime kv-cache-fp16; worst ratio *"])
    assert (pytester.path / "accepted.txt").read_text() == "kv-cache-fp16,products-tf32"


def test_a_glob_without_a_site_is_told_once(faked: Session, clean: Comparison) -> None:
    result = faked(clean, "-rs", more="thresholds={'*.mpl.act_fn': {'ratio': 3}}")
    result.assert_outcomes(failed=1, skipped=ITEMS - 1)
    result.stdout.fnmatch_lines(
        [
            "'[*].mpl.act_fn': matches none of the * sites. Did you mean 'model.layers.[*].mlp.act_fn'?",
            f"SKIPPED [[]{ITEMS - 1}] test_x.py:*: nothing was compared: see test_x.py::test_port[[]7-tokens-*]",
        ]
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("thresholds={'lm_head': {'rato': 3}}", "*unknown key 'rato'. Did you mean 'ratio'?*"),
        ("missing='never'", "*cases(missing='never'): not known. Give 'error' or 'skip'.*"),
    ],
)
def test_a_call_that_cannot_be_meant(faked: Session, clean: Comparison, more: str, said: str) -> None:
    result = faked(clean, more=more)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([said])


def test_what_a_batch_says_to_run(tmp_path: Path, four: Path) -> None:
    batches = [["one", "two words"], [(1, 2), (3, 4)], [(1, 2, 3), (4, 5)]]
    test = parity.testing.items.cases(candidate="x:load", prompts=batches, model=str(four), decode=1)
    items = parity.testing.items.expand(test.__dict__["parity_port"], tmp_path, Settings())
    runs = list({case.run.key: case.run for case in items}.values())
    said = [(run.id, run.options.prompt, run.options.tokens, run.options.pad) for run in runs]
    assert said == [
        ("batch-of-2", ("one", "two words"), None, None),
        ("batch-of-2-2", None, "1 2\n3 4", None),
        ("batch-of-2-3", None, "1 2 3\n4 5", "left"),
    ]
    assert {run.options.decode for run in runs} == {1}


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["@no.txt"], "test_port: prompt '@no.txt': no file *no.txt. Give its path from the folder of the test file."),
        ([()], "test_port: prompt (): neither text nor token ids. Give a string or a tuple of integers."),
        ([(3, -1)], "test_port: prompt (3, -1): neither text nor token ids.*"),
        ([""], "test_port: prompt '': no token to run. Give some text, or a tuple of token ids."),
        ([["text", (1, 2)]], "test_port: prompts: [[]'text', (1, 2)[]] is no batch. Give texts alone (no @file), or *"),
        ([["text", "@long.txt"]], "*is no batch. Give texts alone*"),
        ([], "*a list of prompts is expected, of one or more.*"),
    ],
)
def test_a_prompt_that_cannot_be_meant(faked: Session, clean: Comparison, prompts: object, said: str) -> None:
    result = faked(clean, prompts=prompts)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([said])


def test_a_wrong_key_in_the_file_is_an_error_of_the_collection(
    faked: Session, clean: Comparison, pytester: pytest.Pytester
) -> None:
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\n[tool.parity]\nthreshold = {}")
    result = faked(clean)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["test_port: pyproject.toml [[]tool.parity]: unknown key 'threshold'. Did you mean*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_site_that_was_not_measured(faked: Session, clean: Comparison) -> None:
    c = changed(clean, ACT, verdict="unmeasured", ratio=None, reason="", gap=Gap("not recorded"))
    result = faked(c)
    result.assert_outcomes(passed=ITEMS - 1, failed=1)
    result.stdout.fnmatch_lines([f"{ACT}: unmeasured: not recorded by the candidate. Accept it with allow_unmeasured."])
    faked(c, more="allow_unmeasured=['*.act_fn']").assert_outcomes(passed=ITEMS)


def test_layers_that_config_json_does_not_know(faked: Session, clean: Comparison) -> None:
    result = faked(replace(clean, sites=(*clean.sites[:-1], Measurement("model.layers.4", "exact", ""))))
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["the reference has layers.4, of which config.json says nothing."])


@pytest.mark.parametrize(
    ("more", "candidate", "said"),
    [
        ("", "no.py:load", "test_port: candidate 'no.py:load': no file *no.py. Give its path from the folder of the*"),
        ("names='no.json'", "", "test_port: names 'no.json': no file *no.json. Give its path from the folder of the *"),
    ],
)
def test_a_file_that_is_not_there(pytester: pytest.Pytester, four: Path, more: str, candidate: str, said: str) -> None:
    suite(pytester.path, four, more, candidate=candidate)
    result = pytester.runpytest_inprocess(*QUIET, "--collect-only")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([said])


# -- baselines -----------------------------------------------------------------------------------------------


def test_a_baseline_is_recorded_and_then_held(faked: Session, clean: Comparison, pytester: pytest.Pytester) -> None:
    before = changed(clean, ACT, ratio=1.6)
    result = faked(before, "--parity-record", "-k", "layers.1")
    result.stdout.fnmatch_lines(["parity: recorded test_x.baseline.txt (test_port[[]7-tokens])"])
    text = (pytester.path / "test_x.baseline.txt").read_text()
    assert text.count("\n") == 3 + len(clean.sites), "all sites of the prompt, whatever was selected"

    faked(before).assert_outcomes(passed=ITEMS)
    worse = faked(changed(clean, ACT, ratio=2.5, verdict="rounding"))
    worse.assert_outcomes(passed=ITEMS - 1, failed=1)
    worse.stdout.fnmatch_lines([f"{ACT}: ratio 2.5 (baseline: 1.6). Accept it with --parity-record."])

    better = faked(changed(clean, ACT, ratio=0.4))
    better.assert_outcomes(passed=ITEMS)
    better.stdout.fnmatch_lines(
        [
            f"parity: test_port[[]7-tokens]: 1 site better than the baseline ({ACT} 1.6 -> 0.4);"
            " keep it with --parity-record"
        ]
    )
    assert (pytester.path / "test_x.baseline.txt").read_text() == text


def test_recording_does_not_accept_what_is_wrong(faked: Session, clean: Comparison, pytester: pytest.Pytester) -> None:
    wrong = changed(clean, ACT, verdict="wrong", ratio=104.0)
    result = faked(wrong, "--parity-record")
    result.assert_outcomes(passed=ITEMS - 1, failed=1)
    result.stdout.fnmatch_lines(
        ["parity: not recorded, because it fails: test_port[[]7-tokens]; --parity-record-failing*"]
    )
    assert not (pytester.path / "test_x.baseline.txt").exists()
    faked(wrong, "--parity-record", "--parity-record-failing").stdout.fnmatch_lines(
        ["parity: recorded test_x.baseline*"]
    )
    assert (pytester.path / "test_x.baseline.txt").exists()


def test_a_broken_baseline_is_an_error_of_the_collection(
    faked: Session, clean: Comparison, pytester: pytest.Pytester
) -> None:
    (pytester.path / "test_x.baseline.txt").write_text("ratio = 3")
    result = faked(clean)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*test_x.baseline.txt:1: not a line of a baseline: 'ratio = 3'*"])


# -- trouble -------------------------------------------------------------------------------------------------


def test_a_candidate_that_fails_is_told_once(faked: Session, pytester: pytest.Pytester) -> None:
    result = faked(parity.errors.CandidateError("candidate 'x': loading m failed with KeyError: 'w' (x.py:3)"))
    result.assert_outcomes(failed=1, skipped=ITEMS - 1)
    assert made(pytester) == 1
    assert result.outlines.count("candidate 'x': loading m failed with KeyError: 'w' (x.py:3)") == 1
    result.stdout.fnmatch_lines(["parity: nothing was compared: candidate 'x': loading m failed*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_an_error_of_paritys_own_keeps_its_traceback(faked: Session) -> None:
    result = faked(ZeroDivisionError("by 0"), prompts=[TOKENS, (1, 2)])
    result.assert_outcomes(failed=2, skipped=2 * ITEMS - 2)
    result.stdout.fnmatch_lines(["parity: nothing was compared: internal error: ZeroDivisionError: * (and 1 more)"])
    line = next(line for line in result.outlines if line.startswith("internal error"))
    assert line.startswith("internal error: ZeroDivisionError: by 0. The traceback is in ")
    assert "raise c" in Path(line.rpartition(" ")[2]).read_text()


def test_a_missing_model(pytester: pytest.Pytester) -> None:
    suite(pytester.path, "./nowhere")
    result = pytester.runpytest_inprocess(*QUIET)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["test_port: model './nowhere': no such directory. Give a directory *"])
    result.stdout.no_fnmatch_line("*Traceback*")
    suite(pytester.path, "./nowhere", "missing='skip'")
    result = pytester.runpytest_inprocess(*QUIET, "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED [[]1] test_x.py: model './nowhere': no such directory.*"])


def test_a_model_that_the_hub_does_not_deliver(pytester: pytest.Pytester) -> None:
    suite(pytester.path, "nobody/nothing")
    result = pytester.runpytest_inprocess(*QUIET)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["test_port: model 'nobody/nothing': no directory, and the hub did not deliver its *"])


def test_of_a_model_on_the_hub_only_its_config_is_looked_at(
    faked: Session, clean: Comparison, four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[tuple[str, ...]] = []

    def download(*arguments: str) -> str:
        asked.append(arguments)
        return str(four / "config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    faked(clean, model="some/model").assert_outcomes(passed=ITEMS)
    assert asked == [("some/model", "config.json")]


@pytest.mark.parametrize("skips", [False, True])
def test_weights_that_are_missing_when_a_test_runs(faked: Session, skips: bool) -> None:
    result = faked(
        parity.errors.ModelError("model 'm': weights are missing"), more=f"missing={['error', 'skip'][skips]!r}"
    )
    result.assert_outcomes(failed=int(not skips), skipped=ITEMS - int(not skips))


# -- the end of a session ------------------------------------------------------------------------------------


def test_the_end_of_a_session_needs_no_terminal_and_comes_before_the_reports_are_removed(
    faked: Session, clean: Comparison, pytester: pytest.Pytester
) -> None:
    faked(clean, "--parity-record", "--no-summary").assert_outcomes(passed=ITEMS)
    assert list(baseline.load(pytester.path / "test_x.baseline.txt")) == ["test_port[7-tokens]"]
    result = faked(clean, "-o", "tmp_path_retention_policy=failed")
    result.stdout.fnmatch_lines(["parity: 1 match; *"])


def test_the_summary_of_a_step(
    faked: Session, clean: Comparison, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = pytester.path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    bad = replace(changed(clean, ACT, verdict="wrong", ratio=104.0), verdict="diverged", headline="one is wrong")
    answers = {"7-tokens": clean, "2-tokens": bad, "3-tokens": parity.errors.CandidateError("no [weight](x)")}
    result = faked(answers, prompts=[TOKENS, (1, 2), (1, 2, 3)])
    result.assert_outcomes(passed=2 * ITEMS - 1, failed=2, skipped=ITEMS - 1)
    result.stdout.fnmatch_lines(["parity: 1 match, 1 diverged, 1 not compared; worst ratio 104 at *"])
    text = summary.read_text()
    worst = max((m for m in clean.sites), key=lambda m: m.ratio or 0)
    assert text.startswith(
        "\n### parity\n\n"
        f"- ✅ `test_x.py::test_port[7-tokens]`: match, worst ratio {worst.ratio:.3g} at `{worst.site}`\n"
        f"- ❌ `test_x.py::test_port[2-tokens]`: diverged, worst ratio 104 at `{ACT}`; failed: layers.1\n"
        "- ❌ `test_x.py::test_port[3-tokens]`: nothing was compared: no \\[weight\\](x)\n"
    )
    assert text.count("\n## ") == 1, "the report of the comparison that failed, and no other"
    assert "\n## ❌ DIVERGED: one is wrong\n" in text
    faked(bad, "-k", "layers.0")
    assert summary.read_text().endswith(
        f"\n### parity\n\n- ⚠️ `test_x.py::test_port[7-tokens]`: diverged, worst ratio 104 at `{ACT}`\n"
    )


def test_a_summary_of_a_step_that_cannot_be_written(
    faked: Session, clean: Comparison, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "nowhere" / "summary.md"))
    result = faked(clean)
    result.assert_outcomes(passed=ITEMS)
    result.stdout.fnmatch_lines(["parity: 1 match; *", "parity: no step summary: *No such file*"])


# -- for real ------------------------------------------------------------------------------------------------

BUG = """
import impl.qwen3, torch
def load(*arguments):
    model = impl.qwen3.load(*arguments)
    model.model.layers[2].mlp.act_fn = torch.nn.GELU()
    attention = model.model.layers[1].self_attn
    del attention.q_rope
    attention.q_rope = lambda q: q
    return model
"""


def test_a_bug_in_one_layer_fails_that_layer_alone(pytester: pytest.Pytester, four: Path, clean: Comparison) -> None:
    assert clean.verdict == "match", "everything is imported: pytester forgets what is imported inside"
    (pytester.path / "port.py").write_text(BUG)
    suite(pytester.path, four, "dtype='float32', allow_unmeasured=['*.1.self_attn.q_rope']", candidate="port.py:load")
    result = pytester.runpytest_inprocess(*QUIET, "-rf")
    failed = {line.partition(" - ")[0].removeprefix("FAILED ") for line in result.outlines if line[:6] == "FAILED"}
    assert failed - {"test_x.py::test_port[7-tokens-next_token]"} == {"test_x.py::test_port[7-tokens-layers.2]"}
    result.stdout.fnmatch_lines(["model.layers.2.mlp.act_fn: wrong, ratio *", "  cause: *GELU*", "  fix: *"])


def test_a_dump_beside_the_test_is_a_candidate(pytester: pytest.Pytester, four: Path, clean: Comparison) -> None:
    assert clean.sites, "everything is imported"
    recorded(pytester.path / "port.h5", open_candidate("impl.qwen3:load"), ask(four))
    suite(pytester.path, four, candidate="port.h5")
    pytester.runpytest_inprocess(*QUIET).assert_outcomes(passed=ITEMS)
    suite(pytester.path, four, candidate="port.h5", prompts=[(1, 2)])
    result = pytester.runpytest_inprocess(*QUIET)
    result.assert_outcomes(failed=1, skipped=ITEMS - 1)
    result.stdout.fnmatch_lines(["*port.h5: holds a run on token ids [[]5, 9, 200, *the reference was asked [[]1, 2]*"])


# -- the example of the README -------------------------------------------------------------------------------


PLANTED = """

right = load


def load(*arguments):
    model = right(*arguments)
    model.model.layers[14].mlp.act_fn = nn.GELU()
    return model
"""


def blocks() -> dict[str, str]:
    """The first code block of each language in the README's section about test suites."""
    section = (ROOT / "README.md").read_text().partition("\n## In your test suite\n")[2].partition("\n## ")[0]
    return dict(reversed(re.findall(r"```(\w*)\n(.*?)```", section, re.DOTALL)))


def hub(folder: Path, name: str, checkpoint: Path) -> None:
    """A home of the hub's client that holds a model as if it had been downloaded."""
    model, commit = folder / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    shutil.copytree(checkpoint, model / "snapshots" / commit, ignore=shutil.ignore_patterns("prompts", "README.md"))


def shown(text: str) -> re.Pattern[str]:
    """Lines as they are shown, but for what is left out (…) and numbers that differ from machine to machine."""
    parts = re.split(r"…|(?<=ratio )[\d.]+|(?<=gain )[\d.]+|(?<=explains )[\d.]+", text)
    return re.compile(".*".join(map(re.escape, parts)))


@pytest.fixture
def example(pytester: pytest.Pytester, tiny: Path) -> Path:
    """The README's example as a project; the model that it names is the embedded one."""
    (pytester.path / "test_my_port.py").write_text(blocks()["python"])
    (pytester.path / "my_port.py").write_text((ROOT / "impl" / "qwen3.py").read_text())
    (pytester.path / "long.txt").write_text((tiny / "prompts" / "long.txt").read_text()[:100])
    hub(pytester.path / "home", "Qwen/Qwen3-0.6B", tiny)
    return pytester.path


@pytest.mark.slow
def test_the_example_of_the_readme_passes(example: Path) -> None:
    (example / "pyproject.toml").write_text(blocks()["toml"])
    out = alone(example, "--parity-record", HF_HOME=str(example / "home"))
    items = 28 + 4
    assert re.search(rf"\n=+ {2 * items} passed in ", out), out
    assert "parity: 2 match; worst ratio " in out
    assert list(baseline.load(example / "test_my_port.baseline.txt")) == [
        "test_my_port[long]",
        "test_my_port[the-capital-of-france-is]",
    ]


@pytest.mark.slow
def test_the_failure_in_the_readme_is_what_pytest_says(example: Path) -> None:
    with (example / "my_port.py").open("a") as port:
        port.write(PLANTED)
    out = alone(example, "-k", "france", HF_HOME=str(example / "home"), COLUMNS="80")
    assert shown(blocks()[""]).search(out), out
    assert re.search(r"\n=+ 1 failed, 31 passed, 32 deselected in ", out), out


def test_another_failure_than_that_in_the_readme_would_be_noticed() -> None:
    text = blocks()[""]
    assert {"test_my_port", "cause", "fix", "report", "again"} <= set(re.findall(r"\w+", text))
    assert shown(text).search(text.replace("106", "98.7"))
    for line in text.splitlines():
        assert not shown(text).search(text.replace(line, "something else"))


# -- processes -----------------------------------------------------------------------------------------------


def alone(folder: Path, *arguments: str, **variables: str) -> str:
    """Run the suite in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *QUIET, *arguments],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


def test_workers_share_one_comparison_and_one_record(pytester: pytest.Pytester, four: Path, clean: Comparison) -> None:
    (pytester.path / "given.json").write_text(report_json.dumps(clean))
    (pytester.path / "conftest.py").write_text(
        "import pathlib, time, parity.testing.items, parity.report.json\n"
        "here = pathlib.Path(__file__).parent\n"
        "def compare(run):\n"
        "    with (here / 'made.txt').open('a') as stream: stream.write('x')\n"
        "    time.sleep(0.3)\n"
        "    return parity.report.json.load(here / 'given.json')\n"
        "parity.testing.items.compare = compare\n"
    )
    suite(pytester.path, four)
    summary = pytester.path / "summary.md"
    more = ("-p", "xdist", "-n", "2", "--parity-record")
    out = alone(pytester.path, *more, GITHUB_STEP_SUMMARY=str(summary))
    assert f"{ITEMS} passed" in out
    assert made(pytester) == 1
    assert "parity: 1 match; worst ratio" in out
    assert "parity: recorded test_x.baseline.txt" in out
    recorded = baseline.load(pytester.path / "test_x.baseline.txt")["test_port[7-tokens]"]
    assert recorded["lm_head"] == pytest.approx(ratio_of(clean, "lm_head"), rel=0.01)
    assert summary.read_text().count("`test_x.py::test_port[7-tokens]`: match") == 1


WATCH = """
import sys
{more}
def pytest_sessionfinish():
    print("HEAVY", sorted({{"torch", "numpy", "transformers", "h5py"}} & set(sys.modules)))
"""


def test_collection_loads_nothing_heavy(pytester: pytest.Pytester, four: Path) -> None:
    suite(pytester.path, four)
    (pytester.path / "conftest.py").write_text(WATCH.format(more=""))
    out = alone(pytester.path, "--collect-only", "-q")
    assert f"{ITEMS} tests collected" in out
    assert "HEAVY []" in out


def test_something_heavy_would_be_noticed(pytester: pytest.Pytester, four: Path) -> None:
    suite(pytester.path, four)
    (pytester.path / "conftest.py").write_text(WATCH.format(more="import numpy"))
    assert "HEAVY ['numpy']" in alone(pytester.path, "--collect-only", "-q")


def test_a_suite_without_ports_is_left_alone(pytester: pytest.Pytester) -> None:
    (pytester.path / "test_y.py").write_text("def test_y():\n    pass\n")
    (pytester.path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n[tool.parity]\nthreshold = 3\n")
    watch = (
        "print('LOADED', sorted(n for n in sys.modules if n.startswith('parity') and 'errors' not in n and '.' in n))"
    )
    (pytester.path / "conftest.py").write_text(
        f"import sys\ndef pytest_sessionfinish():\n    {watch}\n",
    )
    out = alone(pytester.path, "-q")
    assert "1 passed" in out
    assert (
        f"LOADED {['parity.testing', *(f'parity.testing.{name}' for name in ('plugin', 'session', 'summary'))]}" in out
    )
    assert "parity:" not in out
