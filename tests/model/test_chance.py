"""What chance makes of a ratio: no less than a simulation shows, and not much more."""

from __future__ import annotations

import math

import pytest
import torch

from parity.reference import chance
from parity.reference.row_sums import alike


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("freedom", [8, 16, 32, 100, 400])
def test_two_samples_of_one_spread_differ_by_less(freedom: int) -> None:
    runs = 2_000_000 // freedom
    theirs, ours = (gaussian(runs, freedom, seed=s).square().mean(-1).sqrt() for s in (1, 2))
    limit = 2 * chance.of_sample(freedom)
    assert int((theirs / ours > limit).sum()) == 0
    if limit > 2:
        # The limit stands where a tail of normal logarithms has the share of one site in ten thousand runs.
        sigmas = math.log(limit / 1.2) * math.sqrt(freedom)
        assert sigmas == pytest.approx(5.6, abs=0.1)


@pytest.mark.parametrize("freedom", [1, 4, 8, 32])
@pytest.mark.parametrize("rows", [1, 50])
def test_the_worst_of_many_rows_stays_below(freedom: int, rows: int) -> None:
    runs = 1_000_000 // (freedom * rows)
    worst = gaussian(runs, rows, freedom, seed=3).square().mean(-1).sqrt().amax(-1)
    limit = chance.of_worst_row(freedom, rows)
    assert float(worst.max()) < limit < 2.2 * float(worst.max())


def test_limits_follow_the_numbers() -> None:
    few = [chance.of_sample(f) for f in (1, 2, 8, 30, 300, 1e5)]
    assert few == sorted(few, reverse=True)
    assert few[0] == 8
    assert few[-1] == 1, "with many numbers the limit is 2, as it stands"
    assert chance.of_worst_row(8, 1000) > chance.of_worst_row(8, 1) > chance.of_worst_row(80, 1) > 1


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_what_is_within_the_floor_is_told_as_it_is(ratio: float) -> None:
    assert chance.less(ratio, 5.0) == ratio
    assert chance.less(3.0, 5.0) == 1.0
    assert chance.less(50.0, 5.0) == 10.0
    assert math.isnan(chance.less(math.nan, 5.0))


def test_rows_that_repeat_each_other_are_of_one_kind() -> None:
    rows = gaussian(6, 64)
    repeated = torch.cat([rows, 3 * rows, rows * (1 + 1e-7), rows])
    kinds = alike(repeated)
    assert len(set(kinds.tolist())) == 6
    assert kinds[0] == kinds[6] == kinds[12] == kinds[18]
    assert len(set(alike(gaussian(500, 8)).tolist())) > 480
    assert len(set(alike(torch.zeros(5, 8)).tolist())) == 1
    assert alike(torch.full((2, 8), math.nan)).shape == (2,)
