"""Whatever fails behind the measurement, the verdict comes out, and what failed is said with its reason."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parity.compare.conclude import judge_run
from parity.errors import ModelError
from parity.reasons import VITAL, Stage, Trouble
from parity.report import json as report_json
from parity.results import Finding
from tests.conftest import Ran
from tests.report_example import measurement

Cli = Callable[..., Ran]

# What to break, and the stage that fails then.
STAGES: tuple[tuple[str, Stage], ...] = (
    ("parity.compare.explain.refuse_idle", "own faults"),
    ("parity.compare.explain.diagnose", "causes"),
    ("parity.diagnose.match._case", "causes"),
    ("parity.diagnose.match._fitting", "causes"),
    ("parity.diagnose.error_map.residual", "error map"),
    ("parity.compare.explain.weak_constants", "wrong constants"),
    ("parity.compare.explain.power", "power"),
    ("parity.diagnose.power._look", "power"),
    ("parity.compare.measure.ending", "next token"),
    ("parity.compare.next_token._Names.read", "token names"),
    ("parity.report.plots.write", "pictures"),
    ("parity.report.html.render", "page"),
    ("parity.report.markdown.render", "markdown"),
    ("parity.cli.console.append_step_summary", "step summary"),
)


@pytest.fixture
def asked(small: Path) -> tuple[object, ...]:
    return "--model", small, "--tokens", "5 17 3 120 8 44 9 210"


def fail(monkeypatch: pytest.MonkeyPatch, what: str, error: BaseException) -> None:
    """From now on `what` raises."""

    def broken(*_: Any, **__: Any) -> Any:
        raise error

    if what.endswith("append_step_summary"):  # imported by the function that calls it
        what = "parity.report.markdown.append_step_summary"
    owner, _, name = what.rpartition(".")
    try:
        holder: Any = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, kind = owner.rpartition(".")
        holder = getattr(importlib.import_module(module), kind)
    monkeypatch.setattr(holder, name, broken)


def pictures(stage: Stage) -> tuple[str, ...]:
    """Pictures take longer than all the rest."""
    return ("--plots",) if stage == "pictures" else ()


@pytest.mark.slow
@pytest.mark.parametrize(("what", "stage"), STAGES)
def test_a_stage_that_fails_takes_no_verdict_away(
    cli: Cli, asked: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, stage: Stage
) -> None:
    fail(monkeypatch, what, RuntimeError("a shape\nthat does not fit"))
    ran = cli("diff", *asked, "--inject", "act-gelu@1", "--out", tmp_path / "report", *pictures(stage))
    assert (ran.code, ran.err) == (1, "")
    assert ran.out.startswith("DIVERGED")
    said = "RuntimeError: a shape that does not fit"
    assert " ".join(ran.out.split()).count(said) >= 1
    run = report_json.load(tmp_path / "report" / "report.json")
    assert run.verdict == "diverged"
    assert [f.layers for f in run.findings] == [(1,)]
    if stage != "step summary":  # which is written when the report is there
        assert {t.stage for t in run.troubles} == {stage}
        assert {t.reason for t in run.troubles} == {said}
        for name, missing in (("index.html", "page"), ("report.md", "markdown")):
            path = tmp_path / "report" / name
            assert path.exists() == (stage != missing)
            assert stage == missing or said in path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("what", "stage"), [s for s in STAGES if s[1] not in ("causes", "error map", "step summary")])
def test_a_clean_run_is_a_match_unless_what_failed_could_have_accused(
    cli: Cli, asked: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, what: str, stage: Stage
) -> None:
    fail(monkeypatch, what, ValueError("no"))
    ran = cli("diff", *asked, "--inject", "norm-eps=1e-6", "--out", "report", *pictures(stage))
    sure = stage not in VITAL
    assert ran.out.startswith("MATCH" if sure else "INCONCLUSIVE"), ran
    assert ran.code == (0 if sure else 2)
    assert "ValueError: no" in ran.out


@pytest.mark.parametrize(("ratio", "verdict"), [(3.0, "inconclusive"), (256.0, "inconclusive"), (1e4, "diverged")])
def test_without_a_second_look_nobody_is_accused_who_may_be_innocent(ratio: float, verdict: str) -> None:
    site = measurement("model.layers.0.mlp.act_fn", "wrong", ratio)
    finding = Finding(("model.layers.*.mlp.act_fn",), (site.site,), (0,), "wrong", ratio, None, ())
    sites = (site, measurement("lm_head", "rounding", 1.0))
    assert judge_run(sites, [finding], (), None) == ("diverged", None)
    found, why = judge_run(sites, [finding], (), None, troubles=(Trouble("second look", "no"),))
    assert (found, why and why.kind) == (verdict, "trouble" if verdict == "inconclusive" else None)


def test_a_second_look_that_fails_is_said(cli: Cli, asked: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "parity.compare.explain.second_look", RuntimeError("no"))
    ran = cli("diff", *asked, "--inject", "norm-eps=1e-6", "--no-power")
    assert ran.code == 2
    said = "INCONCLUSIVE whether another order of summation explains the sites in doubt is not known: RuntimeError: no"
    assert " ".join(ran.out.split()).startswith(said)


def test_a_mistake_of_the_users_and_ctrl_c_still_end_the_command(
    cli: Cli, asked: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "parity.compare.explain.power", ModelError("mend this"))
    ran = cli("diff", *asked)
    assert (ran.code, ran.out, ran.err) == (2, "", "parity: mend this\n")
    fail(monkeypatch, "parity.compare.explain.power", KeyboardInterrupt())
    assert cli("diff", *asked).code in (1, 130)


def test_a_report_that_cannot_be_written_leaves_the_verdict_on_the_terminal(
    cli: Cli, asked: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "parity.report.files.whole", OSError(28, "No space left on device", "disk"))
    ran = cli("diff", *asked, "--inject", "act-gelu@1", "--no-power", "--out", "report")
    assert ran.code == 2
    assert ran.out.startswith("DIVERGED")
    assert "No space left on device" in ran.err


def test_debug_shows_where_it_failed(cli: Cli, asked: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("parity")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", log.level)
    fail(monkeypatch, "parity.compare.explain.power", RuntimeError("no"))
    assert "Traceback" in cli("diff", *asked, "--debug").err
