"""The table of the shoot-out: false alarms, misses and wrong places are counted as its page says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench.gate_list import BITS, BY_ID, CLOSE, DIFF, GATES
from tests.bench.gate_page import Score, better, page, picture, score, score_of_parity, usable
from tests.bench.outcomes import Examined

NOWHERE = dict.fromkeys((BITS, DIFF, CLOSE), "")
PASSED = {"cosine": 1.0, "pcc": 1.0, "mse": 0.0, "nmse": 0.0, "max_kl": 0.0, "token_ratio": 1.0, "error_ratio": 1.0}
PASSED |= {"close": True, "close_share": 1.0, "same_token": True}


def run(what: str, bug: str = "", verdict: str = "match", **more: Any) -> Examined:
    given = {"figures": PASSED, "points": NOWHERE, "first": "s" if bug else "", "guilty": ("s",) if bug else ()}
    return Examined("ports", "m", "bfloat16", what, bug, verdict, "", **(given | more))


FAILS_PCC = {"figures": PASSED | {"pcc": 0.9}}


def differs_at(site: str) -> dict[str, Any]:
    return {"points": NOWHERE | {DIFF: site}}


RUNS = [
    run("clean"),
    run("another clean", verdict="diverged", **FAILS_PCC),
    run("seen", "seen", "diverged", flagged=("s",), **differs_at("s")),
    run("elsewhere", "elsewhere", "diverged", flagged=("t",), **differs_at("t")),
    run("missed", "missed", **FAILS_PCC),
    run("inconclusive", "inconclusive", "inconclusive"),
    run("no effect", "no effect", first="", guilty=()),
    run("not run", "not run", "not run"),
]


@pytest.mark.parametrize(
    ("gate", "alarms", "missed", "wrong"),
    [("PCC 0.99", 1, 3, None), ("first tensor, 1e-3", 0, 2, 1), ("next token", 0, 4, None)],
)
def test_a_gate_is_scored_on_what_it_passes_and_where_it_points(
    gate: str, alarms: int, missed: int, wrong: int | None
) -> None:
    assert score(BY_ID[gate], usable(RUNS)) == Score(gate, 2, alarms, 4, missed, wrong)


def test_parity_is_scored_by_the_same_rules() -> None:
    found = score_of_parity(usable(RUNS))
    assert found == Score("parity", 2, 1, 4, 2, 1)
    assert found.seen == 2


def test_the_page_says_where_a_gate_does_better() -> None:
    said = better(usable(RUNS))[0]
    assert said.startswith("Fewer false alarms than parity: cosine 0.99, ")
    assert "PCC" not in said, "which has as many"
    assert better([run("clean"), RUNS[2]]) == ["No gate does better than parity in any column."]
    text = page(RUNS)
    assert "| **parity** | 1 of 2 | 2 of 4 | 1 of 2 |" in text
    assert "| PCC 0.99 | 1 of 2 | 3 of 4 | names none |" in text
    assert "| gate | ports (4) |" in text
    assert "parity misses: missed in m, inconclusive in m." in text
    assert "The example" not in text
    shown = replace(RUNS[2], family="readme", what="shown", named=("its name",))
    example = page([*RUNS, shown]).partition("## The example of the README")[2]
    assert "| gate | ports (4) |" in page([*RUNS, shown]), "the example is not counted"
    assert "| next token | passes |" in example
    assert "| first tensor, 1e-3 | fails at s |" in example
    assert "| parity | diverged, its name |" in example
    assert all(gate.id in text.partition("## Sources")[2] for gate in GATES)


def test_the_picture_names_every_gate_and_is_the_same_again(tmp_path: Path) -> None:
    picture(RUNS, tmp_path / "a.svg")
    picture(RUNS, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "parity" in text
    assert "PCC 0.99" in text
