"""What benches on real models say of runs: whether a place is right, whether a gate passes, what the page counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.gate_list import BITS, BY_ID, CLOSE, DIFF, GATES, Figures, passed, relative_difference
from tests.bench.outcomes import Examined, append, read
from tests.bench.real_page import page

FIGURES = {"mse": 0.02, "cosine": 0.9998, "error_ratio": 1.5}


def run(what: str, bug: str = "", verdict: str = "match", **more: object) -> Examined:
    return Examined("real", "a model", "bfloat16", what, bug, verdict, "why", figures=FIGURES, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flagged", "guilty", "right"),
    [
        (("q_rope", "k_rope"), ("q_rope", "k_rope"), True),
        (("q_rope",), ("q_rope", "k_rope"), True),
        ((), ("q_rope",), False),
        (("context",), ("q_rope",), False),
        (("q_rope", "context"), ("q_rope",), False),
    ],
)
def test_a_place_is_right_where_the_bug_is_and_nowhere_else(
    flagged: tuple[str, ...], guilty: tuple[str, ...], right: bool
) -> None:
    assert run("x", "x", flagged=flagged, guilty=guilty).is_placed == right


def test_only_a_clean_run_can_be_an_alarm() -> None:
    assert run("sdpa", verdict="diverged").is_alarm
    assert not run("sdpa").is_alarm
    assert not run("x", "x", verdict="diverged").is_alarm


def test_runs_come_back_from_their_file_and_the_last_of_each_counts(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "real.jsonl"
    first = run("sdpa", verdict="diverged", flagged=("a",), points={"bits": "a"})
    again, other = run("sdpa"), run("eager")
    append(file, [first, other])
    assert read(file) == [first, other]
    append(file, [again])
    assert read(file) == [again, other]
    assert read(tmp_path / "none") == []


def test_the_page_counts_alarms_places_and_names_and_leaves_out_what_has_no_effect() -> None:
    runs = [
        run("eager", largest=1.0),
        run("sdpa", verdict="diverged"),
        replace(run("llama.cpp", verdict="not run"), headline="candidate '/home/me/x.gguf': its runtime failed: why"),
        run("a", "a", "diverged", flagged=("s",), guilty=("s",), first="s", named=("right",), naming="named"),
        run("b", "b", "diverged", flagged=("t",), guilty=("s",), first="s", named=("odd",), naming="wrong"),
        run("c", "c", first="s", guilty=("s",), naming="unnamed"),
        run("d", "d", naming="unnamed"),
    ]
    assert "a part of the bench: 4 of 5 bugs" in page(runs, 317, 5)
    text = page(runs, 317, 4)
    assert "a part of the bench" not in text
    assert "2 clean runs: 1 match, 1 alarms" in text
    assert "3 planted bugs: 1 flagged where they are and nowhere else, 1 not seen; 1 named, 0 as one" in text
    assert "1 wrongly" in text
    assert "| llama.cpp | bfloat16 | not run: why |" in text
    assert "| b | s | 1 sites | odd (wrong) |" in text
    assert "dequantized" in text


def figures(**more: object) -> Figures:
    same = {"cosine": 1.0, "pcc": 1.0, "mse": 0.0, "nmse": 0.0, "max_kl": 0.0, "token_ratio": 1.0, "error_ratio": 1.0}
    first = dict.fromkeys((BITS, DIFF, CLOSE), "")
    return Figures(**(same | {"close": True, "close_share": 1.0, "same_token": True, "first": first} | more))  # type: ignore[arg-type]


def test_equal_logits_pass_every_gate_and_nan_passes_none() -> None:
    assert all(passed(gate, figures()) for gate in GATES)
    names = ("cosine", "pcc", "mse", "nmse", "max_kl", "token_ratio", "error_ratio", "close_share")
    nothing = figures(
        **dict.fromkeys(names, math.nan),
        close=False,
        same_token=False,
        first=dict.fromkeys((BITS, DIFF, CLOSE), "lm_head"),
    )
    assert not any(passed(gate, nothing) for gate in GATES)


@pytest.mark.parametrize(
    ("gate", "name", "good", "bad"),
    [
        ("cosine 0.99", "cosine", 0.9901, 0.9899),
        ("cosine 0.999", "cosine", 0.9991, 0.9989),
        ("PCC 0.99", "pcc", 0.9901, 0.9899),
        ("NMSE 1e-2", "nmse", 9e-3, 1.1e-2),
        ("MSE 1e-3", "mse", 9e-4, 1.1e-3),
        ("max KL 0.015", "max_kl", 0.014, 0.016),
        ("exp Δlogp 1.05", "token_ratio", 1.04, 1.06),
        ("2x error", "error_ratio", 1.9, 2.1),
        ("allclose 0.01", "close_share", 1.0, 0.99),
        ("assert_close", "close", True, False),
        ("next token", "same_token", True, False),
        ("first tensor, bits", "first", {BITS: "", DIFF: "a", CLOSE: "a"}, {BITS: "a", DIFF: "", CLOSE: ""}),
        ("first tensor, 1e-3", "first", {BITS: "a", DIFF: "", CLOSE: "a"}, {BITS: "", DIFF: "a", CLOSE: ""}),
        ("first tensor, close", "first", {BITS: "a", DIFF: "a", CLOSE: ""}, {BITS: "", DIFF: "", CLOSE: "a"}),
    ],
)
def test_a_gate_looks_at_its_own_figure(gate: str, name: str, good: object, bad: object) -> None:
    assert passed(BY_ID[gate], figures(**{name: good}))
    assert not passed(BY_ID[gate], figures(**{name: bad}))


def test_the_relative_difference_is_that_of_sglang() -> None:
    c, r = (1.0, 2.0), (1.0, 2.2)
    cc, rr, cr = (sum(a * b for a, b in zip(x, y, strict=True)) for x, y in ((c, c), (r, r), (c, r)))
    assert relative_difference(cc, rr, cr) == pytest.approx(0.04 / (5.0 + 5.84))
    assert relative_difference(0.0, 0.0, 0.0) == 0.0
    assert relative_difference(math.nan, 1.0, 1.0) == math.inf
