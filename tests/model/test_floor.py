"""The floor: what counts as rounding. Hand-made sites, each with an error to be seen and a control without."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from parity.reference import transfer
from parity.reference.floor import Local, Yardstick, local_error
from parity.reference.replay import Replayed
from parity.sites import Dims
from tests.builders import B16, F16, F32, Case, draw, linear, silu


def moved(**more: object) -> Case:
    """An embedding: rows of a table, which no rounding of inputs can move."""
    working: torch.dtype = more.get("working", B16)  # type: ignore[assignment]
    table = draw(2, 12, 20).to(working)
    return Case(lambda x: table.to(x.dtype) + 0 * x, (torch.zeros(2, 12, 20),), **more)  # type: ignore[arg-type]


WORKING = [B16, F16, F32]


@pytest.mark.parametrize("working", WORKING, ids=str)
@pytest.mark.parametrize("make", [linear, silu])
def test_the_reference_itself_has_ratio_one(make: Callable[..., Case], working: torch.dtype) -> None:
    local = make(working=working).judged(lambda own: own)
    assert local.bit_equal
    assert not local.must_be_exact
    # In float32 a sum may be taken one product after another: a library, which adds in blocks, is better than that.
    library = working is F32 and make is linear
    assert local.ratio == pytest.approx(0.7 if library else 1, abs=0.06)
    assert local.total_ratio == pytest.approx(1)
    assert local.inherited_rel == pytest.approx(local.local_rel)
    assert local.nonfinite == local.reference_nonfinite == 0


@pytest.mark.parametrize("working", WORKING, ids=str)
def test_another_order_of_summation_is_rounding_and_half_a_percent_is_not(working: torch.dtype) -> None:
    case = linear(working=working)
    (x,) = case.recorded
    weight = draw(40, 48, seed=9).to(B16)
    parts = [F.linear(x[..., i : i + 7].float(), weight[:, i : i + 7].float()) for i in range(0, 48, 7)]
    split = torch.stack(parts).sum(0).to(working)
    assert case.measure(split).ratio < 1.6
    assert case.measure((split.float() * 1.03).to(working)).ratio > 4


@pytest.mark.parametrize("working", WORKING, ids=str)
def test_what_only_moves_data_must_be_bit_equal(working: torch.dtype) -> None:
    case = moved(working=working)
    right = case.judged(lambda own: own)
    assert right.must_be_exact
    assert right.bit_equal
    assert right.ratio == right.row_max == right.local_rel == right.floor_rel == 0

    def nudge(own: Tensor) -> Tensor:
        out = own.clone()
        out[1, 3, 4] = torch.nextafter(out[1, 3, 4], torch.tensor(torch.inf, dtype=working))
        return out

    wrong = case.judged(nudge)
    assert wrong.must_be_exact
    assert not wrong.bit_equal
    assert wrong.ratio == math.inf
    assert wrong.structure.first_token == 3


def test_an_exact_operation_dumped_wider_is_still_exact() -> None:
    case = moved()
    local = case.measure(case.at(B16).float())
    assert local.bit_equal
    assert local.ratio == 0


# -- zeros, small and single -----------------------------------------------------------------------------------


def test_zero_on_both_sides_is_right() -> None:
    case = Case(lambda x: F.silu(x) * 0, (draw(1, 5, 8),))
    local = case.judged(lambda own: own)
    assert local.ratio == local.ratio_fused == local.local_rel == 0
    assert not local.all_zero
    assert local.bit_equal


@pytest.mark.parametrize("case", [linear(), silu(), moved()], ids=["linear", "silu", "moved"])
def test_a_candidate_of_zeros_is_noticed(case: Case) -> None:
    local = case.judged(torch.zeros_like)
    assert local.all_zero
    assert local.ratio > 100
    assert local.local_rel == pytest.approx(1)


def test_numbers_where_the_truth_is_zero_have_no_floor_to_hide_behind() -> None:
    case = Case(lambda x: F.silu(x) * 0, (draw(1, 5, 8),))
    assert case.judged(lambda own: own + 1e-6).ratio == math.inf


def test_a_row_of_zeros_among_others_is_no_alarm() -> None:
    def op(x: Tensor) -> Tensor:
        out = F.silu(x)
        return torch.cat([torch.zeros_like(out[:, :1]), out[:, 1:]], 1)

    case = Case(op, (draw(1, 9, 40),))
    right = case.judged(lambda own: own)
    assert right.ratio == pytest.approx(1, abs=0.1)
    assert right.structure.by_token[0] == 0
    assert right.structure.first_token is None


def test_one_token_is_enough() -> None:
    case = linear(tokens=1)
    assert case.judged(lambda own: own).ratio == pytest.approx(1, abs=0.1)
    wrong = case.judged(lambda own: own * 1.0625)
    assert wrong.ratio > 4
    assert wrong.structure.by_token == (pytest.approx(wrong.row_max, rel=1e-3),)
    assert wrong.structure.first_token == 0


def test_one_row_may_have_rounded_its_scale_worse_than_the_reference_but_not_all_rows() -> None:
    def off(tokens: int) -> float:
        case = silu(1, tokens, 256, working=F32)
        exact = case.at(torch.float64)
        return case.measure((exact * (1 + 1.7 * 2.0**-24)).to(F32)).ratio

    assert off(tokens=1) < 2 < off(tokens=100)


def test_one_number_is_enough() -> None:
    case = Case(lambda x: x * 3, (torch.tensor([[[1.37]]]),))
    assert case.judged(lambda own: own).ratio <= 1
    assert case.judged(lambda own: own * 2).ratio > 50, "not even of one number is that chance"


def test_an_empty_tensor_measures_nothing() -> None:
    local = Case(F.silu, (torch.zeros(1, 0, 8),)).judged(lambda own: own)
    assert local.ratio == local.row_max == 0
    assert local.structure.first_token is None


# -- massive activations -------------------------------------------------------------------------------------


def massive(tokens: int = 24) -> Case:
    """Token 0 is a hundred times as large as the others in every channel, as trained models have it."""
    case = linear(tokens)
    (x,) = case.inputs
    x = x.clone()
    x[:, 0] *= 100
    return replace(case, inputs=(x,))


def test_a_massive_row_raises_no_alarm() -> None:
    local = massive().judged(lambda own: own)
    assert local.ratio == pytest.approx(1, abs=0.1)
    assert local.structure.first_token is None


def test_a_massive_row_does_not_hide_what_is_wrong_elsewhere() -> None:
    def wrong(own: Tensor) -> Tensor:
        out = own.clone()
        out[:, 1:] *= 1.0625
        return out

    local = massive().judged(wrong)
    energy = local.local_rel / local.floor_rel
    assert energy < 3, "over the whole tensor the massive row drowns it"
    assert local.ratio > 5 * energy, "the median row does not"
    assert local.structure.first_token == 1
    assert local.structure.by_token[0] < 2


@pytest.mark.parametrize("working", WORKING, ids=str)
@pytest.mark.parametrize("token", [3, 22, 23])
def test_one_wrong_row_hides_behind_no_massive_one(working: torch.dtype, token: int) -> None:
    """Neither the whole nor the middle sees it: the row itself does."""
    case = replace(massive(), working=working)

    def wrong(own: Tensor) -> Tensor:
        out = own.clone()
        out[:, token] *= 1.3
        return out

    local = case.judged(wrong)
    assert local.ratio < 0.1 * local.row_ratio
    assert working is not B16 or local.ratio < 2
    assert local.row_ratio > 10
    assert local.worst_tokens == (token,)
    assert local.tokens == 24
    clean = case.judged(lambda own: own)
    assert clean.row_ratio < 1


def test_the_worst_tokens_are_named_in_their_order_and_not_too_many() -> None:
    case = silu(1, 200, 40)

    def wrong(own: Tensor) -> Tensor:
        out = own.clone()
        out[:, 150::10] *= 1.3
        out[:, 20:40] *= 1.2
        return out

    worst = case.judged(wrong).worst_tokens
    assert len(worst) == 8
    assert list(worst) == sorted(worst)
    assert case.judged(lambda own: own).row_ratio < 1


def test_rows_that_are_equal_count_once() -> None:
    case = silu(1, 24, 40)
    (x,) = case.inputs
    repeated = replace(case, inputs=(x[:, :1].expand_as(x).contiguous(),))
    assert case.judged(lambda own: own).kinds == 24
    assert repeated.judged(lambda own: own).kinds == 1
    noisy = draw(1, 1, 40, seed=8) * 0.006

    def off(own: Tensor) -> Tensor:
        return (own.float() * (1 + noisy)).to(own.dtype)

    assert repeated.judged(off).ratio < 0.5 * case.judged(off).ratio, "of one row it may be chance"


def test_what_is_wrong_in_the_massive_row_alone_is_seen_too() -> None:
    def wrong(own: Tensor) -> Tensor:
        out = own.clone()
        out[:, 0] *= 1.0625
        return out

    local = massive().judged(wrong)
    assert local.ratio > 4
    assert local.structure.first_token == 0
    assert max(local.structure.by_token[1:]) < 2


# -- masked scores -------------------------------------------------------------------------------------------

SCORES: Dims = ("batch", "head", "token", "key")
HIDDEN = torch.ones(9, 9).triu(1).bool()


def scores(working: torch.dtype = B16) -> Case:
    def op(q: Tensor, k: Tensor) -> Tensor:
        mask = torch.zeros(9, 9, dtype=q.dtype).masked_fill(HIDDEN, torch.finfo(q.dtype).min)
        return q @ k.transpose(2, 3) * 0.25 + mask

    return Case(op, (draw(1, 3, 9, 16), draw(1, 3, 9, 16, seed=1)), dims=SCORES, working=working, summands=16)


@pytest.mark.parametrize("hidden", [-math.inf, -1e4, -1e9, -3.0e38], ids=str)
@pytest.mark.parametrize("working", WORKING, ids=str)
def test_how_a_score_is_hidden_does_not_matter(working: torch.dtype, hidden: float) -> None:
    if working is F16 and -math.inf < hidden < -65504:
        hidden = -65504.0  # all that it has
    local = scores(working).judged(lambda own: torch.where(HIDDEN, hidden, own.float()).to(own.dtype))
    assert 0.5 < local.ratio < 1.2
    assert local.nonfinite == 0
    assert local.structure.first_token is None


@pytest.mark.parametrize("shown", [0.0, 1.5, -100.0], ids=str)
def test_a_score_that_should_be_hidden_and_is_not(shown: float) -> None:
    def show(own: Tensor) -> Tensor:
        out = own.clone()
        out[..., 2, 5] = shown
        return out

    local = scores().judged(show)
    assert local.ratio > 100
    assert local.structure.first_token == 2


def test_a_visible_score_that_is_hidden() -> None:
    def hide(own: Tensor) -> Tensor:
        out = own.clone()
        out[..., 4, 3] = -1e9
        return out

    assert scores().judged(hide).ratio > 100


def test_a_visible_score_that_is_hidden_by_infinity() -> None:
    def hide(own: Tensor) -> Tensor:
        out = own.clone()
        out[..., 4, 3] = -math.inf
        return out

    local = scores().judged(hide)
    assert local.nonfinite > 0


def test_visible_scores_are_still_measured_beside_masked_ones() -> None:
    local = scores().judged(lambda own: torch.where(HIDDEN, own, own * 1.0625))
    assert local.ratio > 4
    assert abs(local.structure.gain - 0.0625) < 0.01


# -- what is not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_is_counted(bad: float) -> None:
    def poison(own: Tensor) -> Tensor:
        out = own.clone()
        out[0, 3, 5] = out[0, 7, 5] = bad
        return out

    local = linear().judged(poison)
    assert local.nonfinite == 2
    assert not local.nonfinite_inputs
    assert local.reference_nonfinite == 0
    assert not local.bit_equal
    assert local.ratio == pytest.approx(1, abs=0.1), "the other numbers are still measured"


def test_what_came_in_not_finite_is_told_apart() -> None:
    case = linear()
    (x,) = case.inputs
    x = x.clone()
    x[0, 4, 0] = math.nan
    local = replace(case, inputs=(x,)).judged(lambda own: own)
    assert local.nonfinite == 0
    assert local.nonfinite_inputs
    assert local.ratio == pytest.approx(1, abs=0.1)


def test_an_error_beside_what_came_in_not_finite_is_still_seen() -> None:
    case = linear()
    (x,) = case.inputs
    x = x.clone()
    x[0, 4, 0] = math.nan
    assert replace(case, inputs=(x,)).judged(lambda own: own * 1.0625).ratio > 4


def test_float16_overflows_in_the_reference_too() -> None:
    case = Case(lambda x: x * x, (draw(1, 9, 40, scale=100),), working=F16)
    assert case.at(F16).isinf().any()
    local = case.judged(lambda own: own)
    assert local.nonfinite == local.reference_nonfinite > 0
    # A candidate that clamps is not blamed for what the reference does.
    clamped = case.judged(lambda own: own.clamp(-65504, 65504))
    assert clamped.nonfinite == 0
    assert clamped.reference_nonfinite > 0


# -- storage and fusion --------------------------------------------------------------------------------------


def test_a_candidate_that_stores_more_bits_is_better_than_the_floor() -> None:
    case = linear()
    assert case.measure(case.at(F32), storage=F32).ratio < 0.1


def test_a_candidate_that_stores_fewer_bits_is_given_the_rounding_of_its_storage() -> None:
    case = linear(working=F32)
    stored = case.at(F32).to(B16).float()
    assert case.measure(stored, storage=B16).ratio == pytest.approx(1, abs=0.1)
    assert case.measure(stored, storage=F32).ratio > 1000


def test_a_fused_operation_is_within_the_fused_floor_only() -> None:
    case = linear(tokens=64)
    (x,) = case.inputs
    unrounded = F.linear(x, draw(40, 48, seed=9).to(B16).float()).to(B16)
    local = case.measure(unrounded)
    assert local.ratio > 1.2
    assert local.ratio_fused < 1.1
    assert local.ratio_fused < local.ratio


# -- where the error is --------------------------------------------------------------------------------------


def test_heads_and_tokens_of_four_axes() -> None:
    case = silu(2, 6, 11, 20, dims=("batch", "head", "token", "head_dim"))

    def wrong(own: Tensor) -> Tensor:
        out = own.clone()
        out[:, 4, 7:] *= 1.5
        return out

    local = case.judged(wrong)
    s = local.structure
    assert len(s.by_head) == 6
    assert len(s.by_token) == 11
    assert max(range(6), key=s.by_head.__getitem__) == 4
    assert max(x for i, x in enumerate(s.by_head) if i != 4) < 1.5
    assert s.first_token == 7
    assert max(s.by_token[:7]) < 1.5
    assert min(s.by_token[7:]) > 10


def test_heads_that_lie_behind_the_tokens() -> None:
    case = silu(2, 11, 6, 20, dims=("batch", "token", "head", "head_dim"))

    def wrong(own: Tensor) -> Tensor:
        out = own.clone()
        out[:, 7:, 4] *= 1.5
        return out

    s = case.judged(wrong).structure
    assert max(range(6), key=s.by_head.__getitem__) == 4
    assert s.first_token == 7
    assert len(s.by_token) == 11


def test_flattened_heads() -> None:
    case = silu(2, 11, 120, dims=("batch", "token", "head*head_dim"), head_dim=20)

    def wrong(own: Tensor) -> Tensor:
        out = own.clone()
        out[:, 7:, 80:100] *= 1.5
        return out

    s = case.judged(wrong).structure
    assert len(s.by_head) == 6
    assert s.by_head[4] > 20
    assert max(x for i, x in enumerate(s.by_head) if i != 4) < 1.6
    assert s.first_token == 7
    clean = case.judged(lambda own: own).structure
    assert max(clean.by_head) / min(clean.by_head) < 2


def test_a_batch_flattened_into_its_tokens_has_no_profile_by_token() -> None:
    case = silu(22, 40, dims=("batch*token", "feature"))
    s = case.judged(lambda own: own * 1.5).structure
    assert s.by_token == ()
    assert s.first_token is None
    assert s.by_head == ()


def test_a_channel_and_a_gain() -> None:
    case = linear()

    def wrong(own: Tensor) -> Tensor:
        out = own.clone()
        out[..., 13] = 0
        return out

    s = case.judged(wrong).structure
    assert s.channel == 13
    assert s.channel_share > 0.9
    gained = case.judged(lambda own: own * 1.0625).structure
    assert gained.gain == pytest.approx(0.0625, rel=0.02)
    assert gained.cosine > 0.99
    clean = case.judged(lambda own: own).structure
    assert abs(clean.cosine) < 0.15
    assert abs(clean.gain) < 1e-3
    assert clean.channel_share < 0.2
    assert clean.elements == 24 * 40


def test_many_tokens_are_binned_and_none_is_lost() -> None:
    case = silu(1, 1000, 8)

    def wrong(own: Tensor) -> Tensor:
        out = own.clone()
        out[:, 777] *= 2
        return out

    s = case.judged(wrong).structure
    assert len(s.by_token) == 250
    assert max(range(250), key=s.by_token.__getitem__) == 777 // 4
    assert s.first_token == 777


def test_inherited_error_is_kept_apart() -> None:
    case = silu()
    site = case.site(case.at(B16))
    bent = replace(site, own=site.own * 1.5, ideal=site.ideal * 1.5)
    local = local_error(bent, B16, B16, None)
    assert local.bit_equal
    assert local.ratio == pytest.approx(1, abs=0.1)
    assert local.inherited_rel == pytest.approx(0.5, rel=0.05)
    assert local.total_ratio > 10


# -- properties ----------------------------------------------------------------------------------------------


def numbers(local: Local) -> list[float]:
    s = local.structure
    plain = [local.ratio, local.ratio_fused, local.row_max, local.local_rel, local.floor_rel, local.inherited_rel]
    return [*plain, local.total_ratio, s.gain, s.cosine, s.channel_share, *s.by_token, *s.by_head]


CASES = {
    "linear": linear(tokens=50),
    "heads": silu(2, 6, 11, 20, dims=("batch", "head", "token", "head_dim")),
    "flat heads": silu(2, 11, 120, dims=("batch", "token", "head*head_dim"), head_dim=20),
    "moved": moved(),
    "scores": scores(),
    "massive": massive(),
}


@pytest.mark.parametrize("size", [1, 40, 41, 300, 1 << 20])
@pytest.mark.parametrize("name", CASES)
def test_the_size_of_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    case = CASES[name]

    def wrong(own: Tensor) -> Tensor:
        out = own.clone()
        out.view(-1)[-1] *= 1.5
        out.view(-1)[7] = math.nan
        return out

    candidate = wrong(case.at(B16))
    expected = case.measure(candidate)
    monkeypatch.setattr(transfer, "_IN_CACHE", size)
    found = case.measure(candidate)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-4, abs=1e-7)
    for name in ("bit_equal", "must_be_exact", "all_zero", "nonfinite", "nonfinite_inputs", "reference_nonfinite"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.structure.channel == expected.structure.channel
    assert found.structure.first_token == expected.structure.first_token


def scaled(site: Replayed, by: float) -> Replayed:
    assert site.candidate is not None
    values = {n: getattr(site, n) * by for n in ("own", "ideal", "candidate", "truth", "floor", "jitter")}
    return replace(site, **values)


@settings(deadline=None, max_examples=40)
@given(st.integers(-12, 12), st.sampled_from(["linear", "heads", "flat heads", "massive"]), st.floats(0.9, 1.1))
def test_units_do_not_matter(exponent: int, name: str, gain: float) -> None:
    case = CASES[name]
    site = case.site((case.at(B16).float() * gain).to(B16))
    one = local_error(site, B16, B16, case.head_dim)
    other = local_error(scaled(site, 2.0**exponent), B16, B16, case.head_dim)
    assert numbers(other) == pytest.approx(numbers(one), rel=1e-5, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 60))
def test_no_correct_rounding_is_an_alarm(seed: int, tokens: int, width: int) -> None:
    case = Case(F.silu, (draw(1, tokens, width, seed=seed),))
    right = case.measure(case.at(F32).to(B16))
    assert right.ratio <= 1.0001
    assert right.nonfinite == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(0.06, 1), st.booleans())
def test_a_larger_error_has_a_larger_ratio(seed: int, size: float, negative: bool) -> None:
    case = linear()
    noise = draw(1, 24, 40, seed=seed) * (-1 if negative else 1)
    small, large = (case.measure(case.at(F32) + noise * s, storage=F32).ratio for s in (size, 2 * size))
    assert large > 1.7 * small


# -- many values at one site ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("working", WORKING, ids=str)
@pytest.mark.parametrize("make", [linear, silu, moved])
def test_a_yardstick_measures_as_each_value_is_measured_alone(make: Callable[..., Case], working: torch.dtype) -> None:
    case = make(working=working)
    own, wide = case.at(working), case.site(case.at(working)).truth
    assert isinstance(wide, Tensor)
    # What a power trial has: the truth is its own jitter.
    site = replace(case.site(own), jitter=wide)
    yardstick = Yardstick.of(site, working, case.head_dim)
    assert yardstick is not None
    late = wide.clone()
    late[:, -2:] *= 1.7
    for value in (own, wide, wide * 1.01, wide.flip(1), late, own * 0, wide + draw(*wide.shape, seed=4).to(wide)):
        alone = local_error(replace(site, candidate=value), working, working, case.head_dim)
        assert yardstick.ratio(value) == alone.ratio
    assert yardstick.ratio(wide.masked_fill(wide == wide.max(), math.nan)) is None
    assert yardstick.ratio(wide[:, 1:]) is None


@pytest.mark.parametrize("odd", [math.nan, math.inf, -3e38])
def test_no_yardstick_is_made_of_what_is_masked_or_not_finite(odd: float) -> None:
    site = linear().site(linear().at(B16))
    assert isinstance(site.truth, Tensor)
    truth = site.truth.clone()
    truth[0, 0, 0] = odd
    assert Yardstick.of(replace(site, truth=truth), B16, None) is None
