"""Numbers read off a candidate: found from far away, and no surer than they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from parity.diagnose.readings import Uncertainty, best_value, difference, energy, is_told, uncertainty
from parity.faults import Number

TRUTH = torch.randn(40, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
ANGLES = torch.arange(40.0, dtype=torch.float64)[:, None] * torch.linspace(0.001, 0.1, 24, dtype=torch.float64)


def gain(value: float) -> Tensor:
    return TRUTH * value


def turned(value: float) -> Tensor:
    return torch.cos(ANGLES * value) * TRUTH


@pytest.mark.parametrize(
    ("curve", "wrong", "log"),
    [(gain, 1.5, True), (gain, 0.07, True), (gain, -0.3, False), (turned, 1.4, True), (turned, 0.96, False)],
)
def test_a_number_is_found_from_starts_that_are_no_better_than_the_right_one(
    curve: Callable[[float], Tensor], wrong: float, log: bool
) -> None:
    number = Number("factor", lambda _s: 1.0, (2.0,), log=log)
    for starts in ([2.0], [0.5, 2.0]):
        found = best_value(number, 1.0, starts, curve, curve(wrong), curve(1.0))
        assert found == pytest.approx(wrong, rel=1e-6)


def test_a_number_of_ratios_stays_positive_and_a_discrete_one_is_among_those_tried() -> None:
    ratio = Number("factor", lambda _s: 1.0, (2.0,))
    assert best_value(ratio, 1.0, [0.5, 2.0], gain, gain(-1.0), gain(1.0)) > 0
    window = Number("window", lambda _s: math.inf, (2.0,), discrete=True)
    assert best_value(window, math.inf, [1.0, 2.0], gain, gain(1.6), gain(3.0)) == 2.0


def test_the_standard_error_covers_noise_of_rows_and_what_all_rows_share() -> None:
    generator = torch.Generator().manual_seed(6)
    trials = 200
    covered = {"rows": 0, "shared": 0}
    for _ in range(trials):
        noise = 1e-3 * torch.randn(TRUTH.shape, generator=generator, dtype=torch.float64)
        # A table that all rows are multiplied by is rounded once.
        tables = [1 + 1e-2 * torch.randn(24, generator=generator, dtype=torch.float64) for _ in range(3)]
        for kind, (candidate, floor, plain) in {
            "rows": (gain(1.5) + noise, gain(1.5) + noise.flip(0), noise.flip(1)),
            "shared": (gain(1.5) * tables[0] + noise, gain(1.5) * tables[1] + noise, gain(1.0) * (tables[2] - 1)),
        }.items():
            number = Number("factor", lambda _s: 1.0, (2.0,))
            value = best_value(number, 1.0, [2.0], gain, candidate, gain(1.0))
            unsure = uncertainty(value, gain, candidate, floor, plain)
            covered[kind] += abs(value - 1.5) <= 2 * unsure.total
            assert unsure.total < 0.02
    assert covered["rows"] >= 0.9 * trials
    assert covered["shared"] >= 0.7 * trials, "two samples of what is shared tell its size only roughly"


def test_a_candidate_of_the_same_bits_says_nothing_of_its_own_bias() -> None:
    """It has been fitted to the very errors in question; those of the plain reference remain."""
    biased = gain(1.5) * 1.001
    unsure = uncertainty(1.5015, gain, biased, biased, gain(1.0) * 0.001)
    assert unsure.stderr == pytest.approx(0, abs=1e-9)
    assert unsure.total == pytest.approx(0.001, rel=1e-3)


def test_a_number_without_effect_has_no_standard_error() -> None:
    assert uncertainty(1.0, lambda _v: TRUTH, TRUTH, TRUTH, TRUTH * 0).total == math.inf
    assert Uncertainty(3.0, (4.0, 12.0)).total == 13.0


def test_energy_of_what_is_large_masked_or_not_finite() -> None:
    truth = torch.tensor([1e30, -math.inf, -3e38, 1.0, math.nan])
    candidate = torch.tensor([2e30, -1e9, -math.inf, 4.0, 5.0])
    assert difference(candidate, truth).tolist() == pytest.approx([1e30, 0, 0, 3, 0])
    assert energy(candidate, truth) == pytest.approx(1e60)


@pytest.mark.parametrize(
    ("value", "expected", "unsure", "told"),
    [
        (1e4, 1e6, Uncertainty(3.0), True),
        (999999.552, 1e6, Uncertainty(0.01), False),  # frequencies by another power function
        (9.9e5, 1e6, Uncertainty(9e3), False),
        (9.9e5, 1e6, Uncertainty(math.inf), True),
        (9.9e5, 1e6, Uncertainty(1.0, (9e3, 0.0)), False),
        (0.5, 0.0, Uncertainty(0.1), True),
    ],
)
def test_what_legal_ways_make_of_a_constant_is_not_another_constant(
    value: float, expected: float, unsure: Uncertainty, *, told: bool
) -> None:
    assert is_told(value, expected, unsure, 1.5 * TRUTH, TRUTH) == told
    assert not is_told(value, expected, unsure, TRUTH * (1 + 2e-7), TRUTH), "as a root or its inverse may be rounded"
