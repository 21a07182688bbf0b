"""Power: each fault of the catalogue is seen, drowned or not tried, and a number says from which change on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import parity
from parity.faults import CATALOGUE
from parity.results import Power


@pytest.fixture(scope="module")
def power_on(checkpoint: Callable[..., Path]) -> Callable[[str, str], Power]:
    """`power_on(tokens, dtype)`: what a clean run on a random Qwen3 would have revealed."""
    model = str(checkpoint("qwen3", layers=2))

    def power(tokens: str, dtype: str) -> Power:
        found = parity.diff(model=model, tokens=tokens, dtype=dtype).power
        assert found is not None
        return found

    return power


@pytest.mark.slow
def test_a_longer_run_in_more_precision_sees_more(power_on: Callable[[str, str], Power]) -> None:
    one, coarse, fine = (power_on(*given) for given in (("5", "float32"), (ROW, "bfloat16"), (ROW, "float32")))
    for found in (one, coarse, fine):
        known = [*found.visible, *(fault.fault for fault in found.unseen)]
        assert sorted(known) == sorted(fault.id for fault in CATALOGUE)
    assert "rope-interleaved" in fine.visible
    assert "rope-interleaved" not in one.visible
    assert "norm-eps" in fine.visible
    assert "norm-eps" not in coarse.visible
    assert 0 < fine.seen_from["norm-eps"] < coarse.seen_from["norm-eps"]


ROW = "5 17 3 9 88 41 200 150"
