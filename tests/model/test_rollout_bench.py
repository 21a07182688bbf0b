"""The bench of rollouts: what it draws, and that a clean one and a wrong one are told apart."""

from __future__ import annotations

import pytest

from tests.bench.rollouts import DTYPES, MISTAKES, draw, run_one


def test_rollouts_differ_in_what_engines_differ_in() -> None:
    drawn = [draw(seed) for seed in range(200)]
    assert {d.dtype for d in drawn} == set(DTYPES)
    assert {d.attention for d in drawn} == {"eager", "sdpa"}
    assert len({d.architecture for d in drawn}) == 7
    assert {d.together for d in drawn} == {1, 2, 5}
    assert {d.mistake for mistake in MISTAKES for d in [draw(3, mistake)]} == set(MISTAKES)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["", "temperature twice"])
def test_a_clean_rollout_of_a_batch_is_a_match_and_a_wrong_one_is_told(mistake: str) -> None:
    drawn = next(d for seed in range(200) if (d := draw(seed, mistake)).together == 5 and d.dtype == "float16")
    outcome = run_one(drawn)
    assert outcome.is_right, outcome
