"""Reasons are data; here is what they become in words."""

from __future__ import annotations

import typing
from dataclasses import replace
from typing import Any

import pytest

from parity import words
from parity.reasons import VITAL, Gap, GapKind, Inconclusive, Invisible, NotTried, Stage, Trouble
from parity.results import Check, Comparison
from tests.report_example import ROPE, everything, in_regime, matching, measurement, on_own_weights


@pytest.mark.parametrize("kind", typing.get_args(GapKind))
def test_every_kind_of_gap_has_words_of_its_own(kind: GapKind) -> None:
    said = {other: words.gap(Gap(other, detail="something")) for other in typing.get_args(GapKind)}
    assert said[kind]
    assert list(said.values()).count(said[kind]) == 1


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (Invisible("a", "no effect"), ("no effect on this run", "")),
        (Invisible("a", "no effect", needs="two tokens"), ("no effect on this run", "needs two tokens")),
        (Invisible("a", "drowns", 0.21), ("drowns in float16", "0.2x the floor")),
        (NotTried("a", "large"), ("not tried: embedding and head are large", "")),
        (NotTried("a", "unknown"), ("not tried", "")),
        (NotTried("a", "failed", "no weight"), ("not tried: trying it failed", "no weight")),
    ],
)
def test_what_goes_unseen(item: Invisible | NotTried, said: tuple[str, str]) -> None:
    assert words.unseen(item, "float16") == said


def test_a_verdict_says_in_which_regimes_it_holds() -> None:
    run = in_regime()
    assert words.headline(run).endswith("own rounding, in the accepted regime kv-cache-fp16")
    assert "against the reference outside of regimes" in words.answer(run)
    several = replace(run, accepted=(*run.accepted, replace(run.accepted[0], fault=ROPE)))
    assert words.in_regimes(several) == ", in the accepted regimes kv-cache-fp16, rope-theta"


def test_a_verdict_says_on_whose_weights_it_holds() -> None:
    assert words.headline(on_own_weights()).endswith("own rounding, on the candidate's own weights")


def inconclusive(why: Inconclusive, **more: Any) -> Comparison:
    return replace(matching(), verdict="inconclusive", inconclusive=why, **more)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (matching(), "every operation is within the reference's own rounding"),
        (everything(), "2 wrong operations, 1 less precise than the dtype needs; the rest of what was measured is"),
        (inconclusive(Inconclusive("check failed"), checks=(Check("a", True, ""), Check("b", False, "c"))), "b: c"),
        (inconclusive(Inconclusive("no site"), sites=()), "the logits were not measured: no site"),
        (
            inconclusive(Inconclusive("logits unmeasured"), sites=(measurement("lm_head", "unmeasured", None),)),
            "the logits were not measured: not recorded by the candidate",
        ),
        (
            inconclusive(Inconclusive("logits off", ratio=4.14)),
            "every operation rounds as it should, yet the logits are 4",
        ),
        (
            inconclusive(Inconclusive("trouble"), troubles=(Trouble("power", "a"), Trouble(VITAL[-1], "E: b"))),
            "the next tokens were not compared: E: b",
        ),
        (inconclusive(Inconclusive("flips", count=2)), "2 top tokens differ by more than rounding explains"),
        (
            inconclusive(Inconclusive("unexamined", count=1)),
            "logits agree; 1 operation not examined: record more sites, or accept it with --allow-unexamined",
        ),
        (
            inconclusive(Inconclusive("unexamined", count=3)),
            "logits agree; 3 operations not examined: record more sites, or accept it with --allow-unexamined",
        ),
    ],
)
def test_headlines(run: Comparison, said: str) -> None:
    assert words.headline(run).startswith(said)
    assert words.spoken(run).headline == words.headline(run)


def test_logits_that_say_nothing_are_no_answer() -> None:
    sound = measurement("lm_head", "rounding", 1.0)
    run = replace(matching(), sites=(sound,))
    assert "rounding explains all of it" in words.answer(run)
    assert words.answer(replace(run, sites=())) == "the logits were not measured"
    lost = measurement("lm_head", "unmeasured", None, gap=Gap("inputs not finite"), mse=float("inf"), total_ratio=0.0)
    assert words.answer(replace(run, verdict="diverged", sites=(sound, lost))) == "the logits were not measured"


def test_a_bug_that_the_logits_do_not_show_is_not_explained_away() -> None:
    run = replace(everything(), sites=(measurement("lm_head", "rounding", 1.0),))
    said = words.answer(run)
    assert "explains" not in said
    assert "as large as rounding makes, although not all of it is rounding" in said
    same = replace(run, sites=(measurement("lm_head", "exact", 1.0, max_abs=0.0, mse=0.0),))
    assert words.answer(same).endswith("although not every operation is right: see the findings")
    assert words.answer(replace(same, verdict="match")).endswith("the same values as in the reference's own run")


def test_every_stage_that_can_fail_has_words_of_its_own() -> None:
    said = {words.trouble(Trouble(stage, "")) for stage in typing.get_args(Stage)}
    assert len(said) == len(typing.get_args(Stage))
    assert words.trouble(Trouble("causes", "E: no", "a.b")) == "the cause was not looked for at a.b: E: no"


def test_diverged_never_stands_beside_rounding_alone() -> None:
    run = matching()
    assert words.answer(run).endswith("rounding explains all of it")
    asked_for_bits = words.answer(replace(run, verdict="diverged"))
    assert asked_for_bits.endswith("rounding explains all of it, but the same bits were asked for")
    wrong = words.answer(replace(run, verdict="diverged", findings=everything().findings))
    assert "rounding explains" not in wrong
    assert "see the findings" in wrong
