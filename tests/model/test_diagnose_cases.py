"""Bugs of many architectures bear the right names, or none, and the right ports match.

`python -m tests.bench.cases` runs them all, in both dtypes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.case_list import ARCHITECTURES, CASES, Case
from tests.bench.cases import compare, false_alarms, make, naming, port
from tests.conftest import in_turn, slow_but


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cases")


FAST = ("llama3-factor", "nope-inverted", "clip-missing")


@pytest.mark.parametrize(
    "case",
    slow_but([case for case in CASES if case.id in FAST], CASES),
    ids=lambda case: case.id,
)
def test_a_bug_bears_its_name(case: Case, folder: Path) -> None:
    path = make(case.architecture, folder)
    assert naming(case, compare(path, port(path, "float32", case), "float32", True, folder)) in ("right", "tied")


@pytest.mark.parametrize(
    ("case", "dtype"), in_turn([], CASES, ["float32", "bfloat16"]), ids=lambda v: getattr(v, "id", v)
)
def test_a_bug_of_a_plain_port_bears_no_wrong_name(case: Case, dtype: str, folder: Path) -> None:
    path = make(case.architecture, folder)
    assert naming(case, compare(path, port(path, dtype, case), dtype, False, folder)) not in ("wrong", "missed")


@pytest.mark.parametrize("architecture", slow_but(["llama", "olmo"], ARCHITECTURES))
def test_a_right_port_is_accused_of_nothing(architecture: str, folder: Path) -> None:
    assert not false_alarms([architecture], folder, ["float32"])
