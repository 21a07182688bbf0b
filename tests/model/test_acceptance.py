"""What passes and what fails, on Comparisons made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parity.errors import UsageError
from parity.predictions import NextToken, Token
from parity.reasons import Gap, Inconclusive
from parity.results import Check, Comparison, Coverage, Environment, FaultMatch, Finding, Measurement, Residual
from parity.settings import Settings, parse
from parity.testing import baseline
from parity.testing.acceptance import explain, failures, split, worst

ACT, NORM, HEAD = "model.layers.1.mlp.act_fn", "model.norm", "lm_head"
SITES = ("model.embed_tokens", "model.layers.0", ACT, "model.layers.1", NORM, HEAD)


def site(name: str, **more: Any) -> Measurement:
    good = {"ratio": 0.9, "local_rel": 2e-3, "mse": 1e-6, "cosine": 0.9999, "max_abs": 0.01}
    return Measurement(name, more.pop("verdict", "rounding"), more.pop("reason", ""), **good | more)


def comparison(*changed: Measurement, **more: Any) -> Comparison:
    by_name = {m.site: m for m in changed}
    environment = Environment("m", "", "c", None, 5, 1, "float32", "", "", "cpu", "eager", {}, "parity diff", "", {})
    token = (Token(7, "x", 1.0),)
    plain = Comparison(
        verdict="match",
        headline="all is well",
        answer="",
        findings=(),
        sites=tuple(by_name.get(name, site(name)) for name in SITES),
        next_token=NextToken(token, token, 0, 0, 5, 1e-4, 0.1),
        coverage=Coverage(len(SITES), len(SITES)),
        checks=(Check("reference determinism", True, ""),),
        environment=environment,
    )
    return replace(plain, **more)


def failing(c: Comparison, baseline: dict[str, float] | None = None, **settings: Any) -> dict[str, list[str]]:
    """What fails in each part that does not hold."""
    wanted = parse(settings.get("thresholds", {}), settings.get("allow_unmeasured", ()), "") if settings else Settings()
    parts = [*split(c.sites), "next_token"]
    found = {part: failures(part, c, wanted, baseline or {}) for part in parts}
    return {part: [f"{f.site}: {f.text}" for f in each] for part, each in found.items() if each}


def test_parts_are_what_a_model_has() -> None:
    parts = {part: [m.site for m in sites] for part, sites in split(comparison().sites).items()}
    assert parts == {
        "embedding": ["model.embed_tokens"],
        "layers.0": ["model.layers.0"],
        "layers.1": [ACT, "model.layers.1"],
        "final_norm": [NORM],
        "logits": [HEAD],
    }


def test_rounding_passes() -> None:
    assert failing(comparison()) == {}


@pytest.mark.parametrize("verdict", ["wrong", "imprecise", "nonfinite"])
def test_a_bad_verdict_fails_its_part_alone(verdict: str) -> None:
    c = comparison(site(ACT, verdict=verdict, ratio=104.2, reason="too large for rounding"))
    assert failing(c) == {"layers.1": [f"{ACT}: {verdict}, ratio 104 (rounding: up to 2): too large for rounding"]}


def test_a_ratio_in_a_glob_replaces_the_verdict() -> None:
    c = comparison(site(ACT, verdict="wrong", ratio=5.0))
    assert failing(c, thresholds={"*.mlp.*": {"ratio": 6}}) == {}
    assert failing(c, thresholds={"*.mlp.*": {"ratio": 4}}) == {"layers.1": [f"{ACT}: ratio 5 (threshold: 4)"]}
    assert list(failing(c, thresholds={"*.mlp.*": {"ratio": 6}, ACT: {}})) == ["layers.1"]
    assert list(failing(comparison(), thresholds={"lm_head": {"ratio": 0.5}})) == ["logits"]


@pytest.mark.parametrize(
    ("key", "limit", "said"),
    [
        ("mse", 1e-7, "MSE 1e-06 (threshold: 1e-07)"),
        ("cosine", 0.99999, "cosine 0.9999 (threshold: 0.99999)"),
        ("max_abs", 0.001, "max abs 0.01 (threshold: 0.001)"),
    ],
)
def test_fixed_numbers(key: str, limit: float, said: str) -> None:
    assert failing(comparison(), thresholds={HEAD: {key: limit}}) == {"logits": [f"lm_head: {said}"]}
    generous = 0.9 if key == "cosine" else 1.0
    assert failing(comparison(), thresholds={"*": {key: generous}}) == {}


@pytest.mark.parametrize("key", ["mse", "cosine", "max_abs", "ratio"])
def test_nan_and_nothing_are_beyond_every_limit(key: str) -> None:
    for value in (float("nan"), None):
        assert list(failing(comparison(site(HEAD, **{key: value})), thresholds={HEAD: {key: 0.5}})) == ["logits"]


def test_what_is_not_finite_fails_whatever_the_limits() -> None:
    c = comparison(site(ACT, verdict="nonfinite", ratio=None))
    assert list(failing(c, thresholds={"*": {"ratio": 1e9}})) == ["layers.1"]


def test_an_unmeasured_site_fails_unless_it_may() -> None:
    c = comparison(site(ACT, verdict="unmeasured", ratio=None, gap=Gap("not recorded")))
    assert failing(c) == {
        "layers.1": [f"{ACT}: unmeasured: not recorded by the candidate. Accept it with allow_unmeasured."]
    }
    assert failing(c, allow_unmeasured=["*.act_fn"]) == {}


def test_the_next_token() -> None:
    token = comparison().next_token
    assert token is not None
    flipped = comparison(verdict="inconclusive", next_token=replace(token, unexplained_flips=2))
    said = "the top token differs by more than rounding at 2 of 5 positions; last: reference 'x' (1.00)"
    assert failing(flipped)["next_token"][0].startswith(f"next_token: {said}")
    assert list(failing(flipped)) == ["next_token"]
    assert failing(flipped, thresholds={"next_token": {"kl": 1e-3}}) == {}
    assert failing(flipped, thresholds={"next_token": {"kl": 1e-5}}) == {
        "next_token": ["next_token: KL divergence 0.0001 (threshold: 1e-05)"]
    }
    assert list(failing(comparison(next_token=None))) == ["next_token"]


def test_missing_logits_may_be_allowed_together_with_the_next_token() -> None:
    c = comparison(site(HEAD, verdict="unmeasured"), verdict="inconclusive", next_token=None)
    assert list(failing(c)) == ["logits", "next_token"]
    assert failing(c, allow_unmeasured=["lm_head"]) == {}


def test_an_inconclusive_run_fails_at_the_logits() -> None:
    off = Inconclusive("logits off", ratio=9.0)
    c = comparison(verdict="inconclusive", inconclusive=off, headline="the logits are 9.0x as far off")
    assert failing(c) == {"logits": ["lm_head: the logits are 9.0x as far off"]}
    c = comparison(verdict="inconclusive", checks=(Check("candidate weights", False, "lm_head.weight is transposed"),))
    assert failing(c) == {"logits": ["candidate weights: check failed: lm_head.weight is transposed"]}


def test_worse_than_the_baseline_fails_within_the_threshold() -> None:
    c = comparison(site(ACT, ratio=1.9))
    assert failing(c, {ACT: 1.0}) == {"layers.1": [f"{ACT}: ratio 1.9 (baseline: 1). Accept it with --parity-record."]}
    assert failing(c, {ACT: 1.4}) == {}
    assert failing(comparison(), {ACT: 0.0}) == {}, "a ratio of 1 is as good as exact"
    assert list(failing(comparison(site(ACT, ratio=float("nan"))), {ACT: 1.0})) == ["layers.1"]


def test_the_cause_stands_under_the_sites() -> None:
    fault = FaultMatch("gelu", "GELU in place of SiLU", "use SiLU", 0.999998, 1.0, (), {})
    finding = Finding(("model.layers.*.mlp.act_fn",), (ACT,), (1,), "wrong", 104.0, 0, ("a gain of 1.1",), (), fault)
    elsewhere = replace(finding, sites=("lm_head",))
    c = comparison(site(ACT, verdict="wrong", ratio=104.0), findings=(finding, elsewhere))
    assert explain(failures("layers.1", c, Settings(), {}), c, Path("/x/report.json")) == [
        f"{ACT}: wrong, ratio 104 (rounding: up to 2): ",
        "finding: model.layers.*.mlp.act_fn, wrong, ratio 104",
        "  cause: GELU in place of SiLU (explains 99.9998%)",
        "  fix: use SiLU",
        "  a gain of 1.1",
    ]


def test_a_finding_that_is_drawn_names_its_place_on_the_page() -> None:
    found = Finding(("a",), (ACT,), (1,), "wrong", 9.0, 0, (), residual=Residual(ACT, "channel", 1, ((9.0,),)))
    c = comparison(site(ACT, verdict="wrong", ratio=9.0), findings=(replace(found, sites=("lm_head",)), found))
    failed = failures("layers.1", c, Settings(), {})
    assert explain(failed, c, Path("/x/index.html"))[-1] == "  picture: file:///x/index.html#finding-2"
    assert "picture" not in str(explain(failed, c, Path("/x/report.json"))), "there is no page"


def test_what_a_candidate_wrote_cannot_act_on_the_terminal() -> None:
    c = comparison(checks=(Check("candidate weights", False, "\x1b[31mlm_head\u202e\n.weight"),))
    (line,) = explain(failures("logits", c, Settings(), {}), c, Path("/x/index.html"))
    assert line.isprintable()
    assert r"\x1b[31mlm_head\u202e\n.weight" in line


def test_the_worst_site_is_a_bad_one() -> None:
    c = comparison(site(ACT, verdict="imprecise", ratio=0.95), site(NORM, ratio=1.7))
    assert worst(c.sites) == c.sites[2]
    assert worst([site(ACT, verdict="unmeasured")]) is None


# -- baselines -----------------------------------------------------------------------------------------------


def test_a_baseline_is_what_was_measured(tmp_path: Path) -> None:
    path = baseline.path_for(tmp_path / "test_port.py")
    sites = [site(ACT, ratio=1.23456, local_rel=1.23456e-3), site(NORM, verdict="unmeasured"), site(HEAD, ratio=0.0)]
    baseline.save(path, {"test_b[x]": sites, "test_a[x]": [site(HEAD, ratio=float("inf"))]})
    assert path.name == "test_port.baseline.txt"
    assert path.read_text() == (
        "# Site, ratio to the floor, relative error. Written by pytest --parity-record; to be committed.\n"
        "\n[test_a[x]]\n"
        "lm_head  inf        0.002\n"
        "\n[test_b[x]]\n"
        "model.layers.1.mlp.act_fn  1.23       0.00123\n"
        "lm_head                    0          0.002\n"
    )
    assert baseline.load(path) == {"test_a[x]": {HEAD: float("inf")}, "test_b[x]": {ACT: 1.23, HEAD: 0.0}}


def test_recording_one_section_keeps_the_others_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    baseline.save(path, {"a": [site(ACT), site(HEAD)], "b": [site(HEAD)]})
    whole = path.read_bytes()
    baseline.save(path, {"b": [site(HEAD)]})
    assert path.read_bytes() == whole


def test_no_baseline_and_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    assert baseline.load(path) == {}
    for text in ("lm_head 1 2\n", "[a]\nlm_head 1\n", "[a]\nlm_head one 2\n"):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"b\.txt:\d: not a line of a baseline: 'lm_head.*--parity-record"):
            baseline.load(path)
