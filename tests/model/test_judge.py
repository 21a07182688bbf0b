"""From ratios to verdicts: each branch, and what must never be said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parity import words
from parity.compare.conclude import TOTAL, covered, judge_run, total_limit
from parity.compare.explain import behind_padding
from parity.compare.findings import evidence, findings, placed, spanning
from parity.compare.judge import IMPRECISE, RoundingMode, judge_site, luck, rounding_mode, structure_of
from parity.predictions import NextToken, Token
from parity.reasons import Gap
from parity.reference.batch import Batch
from parity.reference.floor import Local
from parity.results import EXIT_CODES, ROUNDING, Check, Comparison, Measurement, Structure
from tests.builders import draw, linear, silu
from tests.report_example import matching

NOISE = Structure(0.0, 0.0, (1.0, 1.1, 0.9, 1.0), (), 0, 0.1, None, 4000)
PLAIN = RoundingMode(fused=False, truncates=False)
FUSED = RoundingMode(fused=True, truncates=False)
TRUNCATES = RoundingMode(fused=False, truncates=True)
BF16 = 2.0**-8


def local(ratio: float = 1.0, structure: Structure = NOISE, **more: Any) -> Local:
    """A site of an ordinary operation with this ratio."""
    values: dict[str, Any] = {
        "ratio_fused": ratio,
        "row_max": ratio,
        "row_ratio": min(ratio, 1.0),
        "worst_tokens": (),
        "tokens": 4,
        "kinds": 4,
        "width": 1000,
        "reference_rel": 0.002,
        "local_rel": ratio * 0.002,
        "floor_rel": 0.002,
        "inherited_rel": 0.0,
        "total_ratio": 1.0,
        "bit_equal": False,
        "must_be_exact": False,
        "all_zero": False,
        "nonfinite": 0,
        "nonfinite_inputs": False,
        "reference_nonfinite": 0,
    }
    return Local(ratio=ratio, structure=structure, **(values | more))


def noise(**more: Any) -> Structure:
    return replace(NOISE, **more)


# -- sites ---------------------------------------------------------------------------------------------------

GAIN = noise(gain=0.01, cosine=0.8)
BRANCHES = [
    # what, site, mode, lucky, verdict, a word of the reason
    ("bit equal", local(1.0, bit_equal=True), PLAIN, 1, "exact", "bit-equal"),
    ("clean", local(1.0), PLAIN, 1, "rounding", "own rounding"),
    ("at the limit", local(ROUNDING), PLAIN, 1, "rounding", "own rounding"),
    ("better than the floor", local(0.01), PLAIN, 1, "rounding", "own rounding"),
    ("more noise than needed", local(3.5), PLAIN, 1, "imprecise", "noise"),
    ("as much noise as can be", local(IMPRECISE), PLAIN, 1, "imprecise", "noise"),
    ("too much for noise", local(IMPRECISE * 1.01), PLAIN, 1, "wrong", "too large"),
    ("a gain", local(3.5, GAIN), PLAIN, 1, "wrong", "gain 1.01"),
    ("a gain within rounding", local(1.9, GAIN), PLAIN, 1, "rounding", "own rounding"),
    ("one head", local(3.5, noise(by_head=(1, 1, 9, 1))), PLAIN, 1, "wrong", "head 2"),
    ("one token", local(3.5, noise(by_token=(1, 1, 1, 1, 9))), PLAIN, 1, "wrong", "token 4"),
    ("one channel", local(3.5, noise(channel=7, channel_share=0.9)), PLAIN, 1, "wrong", "channel 7"),
    ("all zero", local(400.0, all_zero=True), PLAIN, 1, "wrong", "all zero"),
    ("exact, equal", local(0.0, must_be_exact=True, bit_equal=True, floor_rel=0.0), PLAIN, 1, "exact", "bit-equal"),
    ("exact, equal but for a sign of zero", local(0.0, must_be_exact=True, floor_rel=0.0), PLAIN, 1, "exact", "equal"),
    ("exact, off", local(float("inf"), must_be_exact=True, floor_rel=0.0), PLAIN, 1, "wrong", "bit-equal"),
    ("nan", local(1.0, nonfinite=3), PLAIN, 1, "nonfinite", "3 values"),
    ("nan, else bit equal", local(1.0, nonfinite=3, bit_equal=True), PLAIN, 1, "nonfinite", "3 values"),
    (
        "overflow of both",
        local(1.0, nonfinite=3, reference_nonfinite=3),
        PLAIN,
        1,
        "unmeasured",
        "so does the reference",
    ),
    ("nan came in everywhere", local(0.0, nonfinite_inputs=True), PLAIN, 1, "unmeasured", "inputs are not finite"),
    ("nan came in somewhere", local(1.0, nonfinite_inputs=True), PLAIN, 1, "rounding", "own rounding"),
    ("nan came in, wrong beside it", local(99.0, nonfinite_inputs=True), PLAIN, 1, "wrong", "too large"),
    ("nothing can be said", local(1.5, floor_rel=0.7), PLAIN, 1, "unmeasured", "70% of the value"),
    ("fused run", local(3.0, ratio_fused=1.1), FUSED, 1, "rounding", "own rounding"),
    ("fused here only", local(3.0, ratio_fused=1.1), PLAIN, 1, "rounding", "fused"),
    ("a gain that fusion would cover", local(3.0, GAIN, ratio_fused=1.1), PLAIN, 1, "wrong", "gain 1.01"),
    ("too much for fusion", local(90.0, ratio_fused=40.0), FUSED, 1, "wrong", "too large"),
    ("truncation", local(3.0, noise(gain=-0.003, cosine=-0.8)), TRUNCATES, 1, "imprecise", "truncates"),
    ("truncation, once", local(3.0, noise(gain=-0.003, cosine=-0.8)), PLAIN, 1, "wrong", "gain 0.997"),
    ("a gain in a truncating run", local(3.0, GAIN), TRUNCATES, 1, "wrong", "gain 1.01"),
    ("a bug in a truncating run", local(30.0, noise(gain=-0.003)), TRUNCATES, 1, "wrong", "too large"),
    ("a lucky floor", local(3.5), PLAIN, 2.0, "rounding", "own rounding"),
    ("a lucky floor does not save a bug", local(90.0), PLAIN, 4.0, "wrong", "too large"),
    ("one row", local(1.0, row_ratio=9.0, worst_tokens=(1,)), PLAIN, 1, "wrong", "token 1 is far off"),
    ("the last row", local(1.0, row_ratio=9.0, worst_tokens=(3,)), PLAIN, 1, "wrong", "the last, which makes the next"),
    ("two rows", local(1.0, row_ratio=9.0, worst_tokens=(1, 2)), PLAIN, 1, "wrong", "tokens 1, 2 are far off"),
    ("a few heads", local(1.0, row_ratio=9.0, tokens=0), PLAIN, 1, "wrong", "a few rows are far off"),
    ("one row, else fused", local(3.0, ratio_fused=1.1, row_ratio=9.0), PLAIN, 1, "wrong", "far off"),
    ("no row", local(1.0, row_ratio=ROUNDING), PLAIN, 1, "rounding", "own rounding"),
    ("a row that is not a number", local(1.0, row_ratio=float("nan")), PLAIN, 1, "wrong", "far off"),
    ("another legal way", local(1.0, way="sums in 8 lanes"), PLAIN, 1, "rounding", "sums in 8 lanes"),
    ("not a number", local(float("nan")), PLAIN, 1, "wrong", "too large"),
]


@pytest.mark.parametrize(
    ("site", "mode", "lucky", "verdict", "reason"), [b[1:] for b in BRANCHES], ids=[b[0] for b in BRANCHES]
)
def test_sites(site: Local, mode: RoundingMode, lucky: float, verdict: str, reason: str) -> None:
    found, _, why = judge_site(site, mode, lucky)
    said = words.gap(why) if isinstance(why, Gap) else why
    assert (found, reason in said) == (verdict, True), said
    assert isinstance(why, Gap) == (verdict == "unmeasured")


def test_the_ratio_that_is_told_is_the_one_that_was_judged() -> None:
    assert judge_site(local(3.0, ratio_fused=1.2), FUSED)[1] == 1.2
    assert judge_site(local(1.5, ratio_fused=1.2), PLAIN)[1] == 1.5
    assert judge_site(local(3.0), PLAIN, 2.0)[1] == 1.5


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1, 4))
def test_a_larger_error_is_never_a_better_verdict(one: float, other: float, lucky: float) -> None:
    order = ["exact", "rounding", "imprecise", "wrong"]
    small, large = sorted((one, other))
    verdicts = [judge_site(local(r), PLAIN, lucky)[0] for r in (small, large)]
    assert order.index(verdicts[0]) <= order.index(verdicts[1])


def test_luck_is_the_shortfall_from_the_family() -> None:
    sites = {f"model.layers.{i}.mlp.act_fn": local(floor_rel=f) for i, f in enumerate((0.002, 0.002, 0.001, 0.0001))}
    sites |= {"model.norm": local(floor_rel=0.5), "model.layers.0.x": local(floor_rel=0.0)}
    found = luck(sites)
    assert found["model.layers.0.mlp.act_fn"] == 1.0, "a floor above the usual is not held against anybody"
    assert found["model.layers.2.mlp.act_fn"] == pytest.approx(1.5)
    assert found["model.layers.3.mlp.act_fn"] == 4.0, "no more than this is put down to chance"
    assert found["model.norm"] == found["model.layers.0.x"] == 1.0, "one of its kind has nothing to go by"
    assert luck({}) == {}


# -- structure -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "word"),
    [
        (NOISE, ""),
        (noise(cosine=0.3, gain=0.02), "gain 1.02"),
        (noise(cosine=-0.3, gain=-0.02), "gain 0.98"),
        (noise(cosine=0.04), ""),
        (noise(by_head=(1.0, 9.0)), ""),  # two values cannot tell
        (noise(by_head=(0.0, 0.0, 5.0)), "head 2"),
        (noise(by_head=(2.0, 1.0, 2.5)), ""),
        (noise(by_token=(1.0, 1.0, 30.0)), "token 2"),
        (noise(channel=3, channel_share=0.51), "channel 3"),
        (noise(channel=3, channel_share=0.4), ""),
    ],
)
def test_structure_of(structure: Structure, word: str) -> None:
    said = structure_of(local(3.0, structure))
    assert word in said
    assert bool(said) == bool(word)


@pytest.mark.parametrize(("kinds", "width"), [(1, 100), (10, 10), (0, 0)])
def test_few_numbers_or_rows_of_one_kind_follow_the_value_by_chance(kinds: int, width: int) -> None:
    assert structure_of(local(3.0, noise(cosine=0.3, gain=0.02), kinds=kinds, width=width)) == ""


def measurement(site: str, verdict: str = "rounding", **more: Any) -> Measurement:
    values: dict[str, Any] = {"reason": "", "ratio": 1.0}
    if verdict == "unmeasured":
        values = {"reason": "", "ratio": None, "gap": Gap("not recorded")}
    return Measurement(site, verdict, **(values | more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("structure", "expected", "absent"),
    [
        (noise(by_token=(0, 9, 9, 9, 9, 9)), ["token 0 is right, later tokens are not"], ["grows", "first 1"]),
        (noise(by_token=(0, 3, 6, 9, 12, 15, 18, 21, 24)), ["token 0 is right", "grows"], ["falls"]),
        (noise(by_token=(90, 60, 30, 9, 8, 7, 6, 5, 4)), ["falls"], ["token 0", "grows"]),
        (noise(by_token=(1, 1, 1, 1, 1, 1, 50, 50, 50)), ["the first 6 tokens are right"], ["token 0"]),
        (noise(by_token=(1, 1, 1, 1, 1, 50, 50, 50), pooled=2), ["the first 10 tokens are right"], ["token 0"]),
        (noise(by_token=(1, 50, 50, 50), pooled=2), [], ["token 0"]),
        (noise(by_token=(9, 9, 9, 9, 9)), [], ["token", "grows", "falls"]),
        (noise(by_token=(1, 1, 1, 1, 1)), [], ["token", "grows", "falls"]),
        (noise(by_token=(9,)), [], ["token"]),
        (noise(by_head=(1, 1, 9, 9)), ["heads 2, 3 only"], []),
        (noise(by_head=(9, 9, 9)), [], ["heads"]),
        (noise(by_head=(1, *[9] * 11)), ["heads 1, 2, 3, 4, 5, 6, 7, 8 … only"], []),
        (noise(channel=5, channel_share=0.7), ["70% of the error in channel 5"], []),
        (noise(cosine=0.99, gain=0.0625), ["mostly a gain of 1.062"], []),
        (noise(cosine=-0.99, gain=-1.0), ["mostly a gain of 0"], []),
    ],
)
def test_evidence(structure: Structure, expected: list[str], absent: list[str]) -> None:
    lines = evidence(measurement("x", "wrong", reason="because", structure=structure))
    assert lines[0] == "because"
    assert len(lines) == len(set(lines))
    for text in expected:
        assert any(text in line for line in lines[1:]), lines
    for text in absent:
        assert not any(text in line for line in lines[1:]), lines


def test_evidence_without_structure() -> None:
    assert evidence(measurement("x", "wrong", reason="because")) == ["because"]
    assert evidence(measurement("x", "wrong", structure=NOISE)) == []


# -- the run's rounding mode ---------------------------------------------------------------------------------


def truncated(wide: Tensor) -> Tensor:
    bits = wide.float().contiguous().view(torch.int32)
    return (bits & -65536).view(torch.float32).bfloat16()


def stochastic(wide: Tensor) -> Tensor:
    """Up or down with a probability that makes the mean right."""
    bits = wide.float().contiguous().view(torch.int32)
    noise = torch.randint(0, 65536, bits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    return ((bits + noise) & -65536).view(torch.float32).bfloat16()


def sites_stored(store: Callable[[Tensor], Tensor]) -> list[Local]:
    """Many operations, each computed right and stored by `store`."""
    cases = [linear(t) for t in (8, 16, 24)] + [silu(1, t, 40) for t in (8, 16, 24, 32)]
    cases += [replace(silu(1, 16, 40), op=op) for op in (torch.tanh, torch.sigmoid, torch.exp)]
    cases = [replace(c, inputs=(draw(*c.inputs[0].shape, seed=i),)) for i, c in enumerate(cases)]
    return [c.measure(store(c.at(torch.float32))) for c in cases]


def test_truncation_is_recognised() -> None:
    sites = sites_stored(truncated)
    assert rounding_mode(sites, BF16) == TRUNCATES
    assert {judge_site(s, TRUNCATES)[0] for s in sites} <= {"imprecise", "rounding"}
    assert all(s.structure.gain < 0 for s in sites)


def test_stochastic_rounding_is_neither_truncation_nor_a_bug() -> None:
    sites = sites_stored(stochastic)
    mode = rounding_mode(sites, BF16)
    assert not mode.truncates
    assert {judge_site(s, mode)[0] for s in sites} == {"rounding"}


def test_rounding_to_nearest_is_neither() -> None:
    assert rounding_mode(sites_stored(lambda wide: wide.bfloat16()), BF16) == PLAIN


def test_a_wider_candidate_is_neither() -> None:
    assert rounding_mode(sites_stored(lambda wide: wide), BF16) == PLAIN


def test_one_operation_with_a_loss_is_no_rounding_mode() -> None:
    sites = sites_stored(lambda wide: wide.bfloat16())
    lossy = [replace(s, structure=noise(gain=-BF16, cosine=-0.5), ratio=3.0, bit_equal=False) for s in sites[:3]]
    clean = [replace(s, bit_equal=False) for s in sites[3:]]
    assert not rounding_mode([*lossy, *clean], BF16).truncates


@pytest.mark.parametrize("count", [1, 4, 7])
def test_a_few_sites_are_no_rounding_mode(count: int) -> None:
    sites = (sites_stored(truncated) * 2)[:count]
    assert not rounding_mode(sites, BF16).truncates


def test_float32_is_never_truncated() -> None:
    sites = sites_stored(truncated)
    assert rounding_mode(sites, BF16).truncates
    assert not rounding_mode(sites, 2.0**-24).truncates


def test_sites_that_lose_a_little_in_the_mean_are_not_truncated() -> None:
    lossy = [local(1.5, noise(gain=-0.5 * BF16, cosine=-0.2)) for _ in range(20)]
    assert not rounding_mode(lossy, BF16).truncates
    assert rounding_mode([replace(s, structure=noise(gain=-0.5 * BF16, cosine=-0.8)) for s in lossy], BF16).truncates


def test_what_says_nothing_is_not_asked() -> None:
    told = [
        local(1.0, bit_equal=True),
        local(0.0),
        local(float("inf"), must_be_exact=True),
        local(900.0, noise(gain=-0.5, cosine=-0.9)),
    ]
    assert rounding_mode(told, BF16) == rounding_mode([], BF16) == PLAIN


def test_a_fused_run() -> None:
    assert rounding_mode([local(1.4)] * 5 + [local(1.0)] * 2, BF16) == FUSED
    assert rounding_mode([local(1.4)] * 2 + [local(1.0)] * 5, BF16) == PLAIN


# -- findings ------------------------------------------------------------------------------------------------


def layer(number: int, **verdicts: str) -> list[Measurement]:
    names = ("input_layernorm", "q", "context", "act_fn", "")
    return [
        measurement(f"model.layers.{number}.{n}".rstrip("."), verdicts.get(n or "output", "rounding")) for n in names
    ]


def run_of(*layers: list[Measurement], head: str = "rounding", **more: Any) -> list[Measurement]:
    sites = [m for one in layers for m in one]
    return [measurement("model.embed_tokens", "exact"), *sites, measurement("lm_head", head, **more)]


def test_findings_group_layers_and_keep_the_order_of_execution() -> None:
    sites = run_of(layer(0, act_fn="wrong"), layer(1, q="imprecise", act_fn="wrong"), layer(2, q="imprecise"))
    found = findings(sites)
    assert [f.families for f in found] == [("model.layers.*.act_fn",), ("model.layers.*.q",)]
    assert [f.layers for f in found] == [(0, 1), (1, 2)]
    assert [f.verdict for f in found] == ["wrong", "imprecise"]
    assert found[0].sites == ("model.layers.0.act_fn", "model.layers.1.act_fn")
    assert all(f.span == () and f.fault is None for f in found)


def test_a_finding_is_as_bad_as_its_worst_site() -> None:
    sites = run_of(layer(0, q="imprecise"), layer(1, q="nonfinite"), layer(2, q="wrong"))
    places = [i for i, m in enumerate(sites) if m.site.endswith(".q")]
    for place, ratio, first in zip(places, (3.0, 1.0, 80.0), (6, 4, None), strict=True):
        sites[place] = replace(sites[place], ratio=ratio, reason=f"r{ratio:.0f}", structure=noise(first_token=first))
    (found,) = findings(sites)
    assert (found.verdict, found.ratio, found.first_token) == ("nonfinite", 80.0, 4)
    assert found.evidence[0] == "r80"


@pytest.mark.parametrize(
    ("firsts", "said"),
    [
        ((48, 48), "it begins at token 48, a multiple of 16: where a block or chunk of so many tokens does"),
        ((256, 256), "it begins at token 256, a multiple of 128: where a block or chunk of so many tokens does"),
        ((40, 40), "it begins at the edge of the window of 40 tokens"),
        ((39, 39), "it begins at the edge of the window of 40 tokens"),
        ((32, 32), "it begins at token 32, the first behind the padding of rows 1, 2"),
        ((48, 50), None),
        ((43, 43), None),
        ((0, 0), None),
        ((None, None), None),
    ],
)
def test_a_first_token_that_is_special_is_said_so(firsts: tuple[int | None, ...], said: str | None) -> None:
    sites = run_of(layer(0, q="wrong"), layer(1, q="wrong"))
    for place, first in zip([i for i, m in enumerate(sites) if m.site.endswith(".q")], firsts, strict=True):
        sites[place] = replace(sites[place], reason="far off", structure=noise(first_token=first))
    (found,) = findings(sites)
    assert placed(found, sites, {40}, {32: [1, 2], 9: [3]}).evidence == (*found.evidence, *([said] if said else []))


def test_the_first_token_behind_padding_is_known_of_rows_that_begin_with_it() -> None:
    text = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
    assert behind_padding(Batch(torch.zeros(5, 4, dtype=torch.long), text)) == {2: [1, 3], 1: [4]}
    assert behind_padding(Batch(torch.zeros(5, 4, dtype=torch.long))) == {}


def test_the_span_is_what_was_unmeasured_right_before() -> None:
    blind = {"q": "unmeasured", "context": "unmeasured"}
    sites = run_of(layer(0, input_layernorm="unmeasured"), layer(1, **blind, act_fn="wrong"))
    (found,) = findings(sites)
    assert found.span == ("model.layers.1.q", "model.layers.1.context")
    (first,) = findings(run_of(layer(0, act_fn="wrong"), layer(1, **blind, act_fn="wrong")))
    assert first.span == (), "of the first layer where it shows"


def test_bad_sites_that_speak_for_others_too() -> None:
    blind = {"q": "unmeasured", "context": "unmeasured"}
    sites = run_of(layer(0, q="wrong"), layer(1, **blind, act_fn="imprecise"), layer(2, context="unmeasured"))
    assert spanning(sites) == {"model.layers.1.act_fn"}


def test_the_span_ends_at_the_beginning_of_the_run() -> None:
    sites = [measurement("model.embed_tokens", "unmeasured"), measurement("lm_head", "wrong")]
    assert findings(sites)[0].span == ("model.embed_tokens",)


def test_what_is_right_or_unmeasured_is_no_finding() -> None:
    assert findings(run_of(layer(0, q="unmeasured", context="exact"))) == ()


# -- the run -------------------------------------------------------------------------------------------------

TOP = (Token(1, "a", 2.0),)
FINE = Check("candidate weights", True, "equal")
BROKEN = Check("candidate weights", False, "one is transposed")


def judged(sites: list[Measurement], checks: Sequence[Check] = (), token: NextToken | None = None) -> Comparison:
    """A run of these sites, judged and put into words."""
    found = findings(sites)
    verdict, why = judge_run(sites, found, checks, token)
    run = replace(matching(), verdict=verdict, findings=found, sites=tuple(sites), next_token=token)
    return words.spoken(replace(run, coverage=covered(sites), checks=tuple(checks), inconclusive=why))


def next_token(unexplained: int = 0) -> NextToken:
    return NextToken(TOP, TOP, unexplained, unexplained, 24, 0.0, 1.0)


@pytest.mark.parametrize(
    ("sites", "checks", "token", "verdict", "said"),
    [
        (run_of(layer(0)), [FINE], next_token(), "match", ["every operation is within"]),
        (run_of(layer(0)), [], None, "match", []),
        (run_of(layer(0, q="unmeasured")), [], None, "match", ["1 sites unmeasured"]),
        (run_of(layer(0, q="wrong")), [FINE], None, "diverged", ["1 wrong operation;", "everything else is rounding"]),
        (run_of(layer(0, q="wrong", act_fn="wrong")), [], None, "diverged", ["2 wrong operations;"]),
        (run_of(layer(0, q="imprecise")), [], None, "diverged", ["1 less precise"]),
        (run_of(layer(0, q="nonfinite")), [], None, "diverged", ["1 wrong operation"]),
        (run_of(layer(0, q="nonfinite", act_fn="imprecise")), [], None, "diverged", ["1 wrong", "1 less precise"]),
        (run_of(layer(0, q="wrong", context="unmeasured")), [], None, "diverged", ["the rest of what was measured"]),
        (run_of(layer(0, q="wrong"), head="unmeasured"), [BROKEN], None, "diverged", ["1 wrong operation"]),
        (run_of(layer(0)), [FINE, BROKEN], None, "inconclusive", ["candidate weights", "transposed"]),
        (
            run_of(layer(0), head="unmeasured", reason="", gap=Gap("not recorded")),
            [],
            None,
            "inconclusive",
            ["logits", "not recorded"],
        ),
        ([], [], None, "inconclusive", ["no site"]),
        (run_of(layer(0), total_ratio=4.1), [], None, "inconclusive", ["4.1x"]),
        (run_of(layer(0), total_ratio=float("inf")), [], None, "inconclusive", ["logits"]),
        (run_of(layer(0), total_ratio=3.9), [], None, "match", []),
        (run_of(layer(0)), [], next_token(2), "inconclusive", ["2 top tokens"]),
    ],
)
def test_runs(
    sites: list[Measurement], checks: list[Check], token: NextToken | None, verdict: str, said: list[str]
) -> None:
    run = judged(sites, checks, token)
    assert run.verdict == verdict, run.headline
    assert (run.inconclusive is not None) == (verdict == "inconclusive")
    for word in said:
        assert word in run.headline


def test_a_reference_at_fault_has_the_last_word() -> None:
    broken = Check("truth agrees with reference", False, "model.norm: further apart", vital=True)
    run = judged(run_of(layer(0, q="wrong")), [FINE, broken])
    assert run.verdict == "inconclusive"
    assert run.headline == "truth agrees with reference: model.norm: further apart"


def test_where_the_reference_is_too_rough_there_is_no_match() -> None:
    sites = run_of(layer(0))
    sites[1] = replace(sites[1], verdict="unmeasured", gap=Gap("too rough", share=0.7))
    run = judged(sites)
    assert run.verdict == "inconclusive"
    assert sites[1].site in run.headline
    assert "70%" in run.headline
    assert judged([*sites[:1], *run_of(layer(1, q="wrong"))[1:]]).verdict == "diverged"


def test_a_total_that_cannot_be_computed_is_no_match() -> None:
    assert judge_run(run_of(layer(0), total_ratio=float("nan")), [], [], None)[0] == "inconclusive"


def test_exit_codes_are_those_of_diff() -> None:
    assert EXIT_CODES == {"match": 0, "diverged": 1, "inconclusive": 2}


@given(st.lists(st.sampled_from(["exact", "rounding", "imprecise", "wrong", "nonfinite", "unmeasured"]), max_size=12))
def test_unmeasured_never_counts_as_passed(verdicts: list[str]) -> None:
    sites = [measurement(f"model.layers.{i}.x", v) for i, v in enumerate(verdicts)]
    coverage = covered(sites)
    assert (coverage.measured, coverage.known) == (len(sites) - verdicts.count("unmeasured"), len(sites))
    run = judged(sites)
    verdict = run.verdict
    if {"wrong", "nonfinite", "imprecise"} & set(verdicts):
        assert verdict == "diverged"
    elif not verdicts or verdicts[-1] == "unmeasured":
        assert verdict == "inconclusive"
    elif coverage.unexamined:
        assert verdict == "inconclusive"
        assert "not examined" in run.headline
    else:
        assert verdict == "match"
        assert ("unmeasured" in run.headline) == ("unmeasured" in verdicts)


def test_noisy_operations_and_few_tokens_excuse_the_logits() -> None:
    sites = run_of(layer(0), total_ratio=6.0)
    plain = {m.site: local(local_rel=0.002) for m in sites}
    assert total_limit(sites, plain) == TOTAL
    assert judge_run(sites, [], [], None, TOTAL)[0] == "inconclusive"
    loops = {m.site: local(local_rel=0.004) for m in sites}
    assert total_limit(sites, loops) == pytest.approx(2 * TOTAL)
    assert judge_run(sites, [], [], None, total_limit(sites, loops))[0] == "match"
    few = plain | {"lm_head": local(kinds=1, width=100)}
    assert 1.5 * TOTAL < total_limit(sites, few) < 8 * TOTAL
    better = {m.site: local(local_rel=1e-6) for m in sites}
    assert total_limit(sites, better) == TOTAL, "a port that is better than the reference is held to the same"
