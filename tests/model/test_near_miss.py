"""A number that only comes near is not the cause; one that is wrong stays so, whatever it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parity.diagnose import near_miss
from parity.faults import by_id
from tests.bench.case_list import CASES, Case
from tests.bench.cases import compare, make, port

THETA = (by_id("rope-theta"),)


def named(case: Case, folder: Path) -> set[str | None]:
    """What a port that records what its modules return is said to have, if another theta is all that is known."""
    path = make(case.architecture, folder)
    found = compare(path, port(path, "bfloat16", case), "bfloat16", False, folder, THETA).findings
    return {f.fault and f.fault.id for f in found}


@pytest.mark.slow
@pytest.mark.parametrize("theta", [13e3, 3e5])
def test_a_theta_that_nobody_else_uses_is_read_across_what_was_not_recorded(theta: float, tmp_path: Path) -> None:
    other = {"rope_type": "default", "rope_theta": theta}
    assert named(Case("theta", "mistral", frozenset(), {"rope_parameters": other}), tmp_path) == {"rope-theta"}


@pytest.mark.slow
def test_frequencies_that_no_theta_makes_are_not_called_one(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.id == "frequencies-stretched")
    assert named(case, tmp_path) == {"rope-frequencies"}


def test_tables_of_neighbouring_channels_are_not_taken_for_halves() -> None:
    angles = torch.arange(20.0).reshape(1, 5, 4)
    halves, neighbours = torch.cat([angles, angles], -1), angles.repeat_interleave(2, -1)
    assert near_miss._are_halves((halves.cos(), halves.sin()))
    assert not near_miss._are_halves((neighbours.cos(), neighbours.sin()))
    assert not near_miss._are_halves(torch.polar(angles, angles))
