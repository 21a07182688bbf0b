"""Bugs of many architectures bear the right names, or none, and the right ports match.

`python -m tests.bench.cases` runs them all, in both dtypes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

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


def test_a_value_recorded_after_it_was_written_into_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OLMo clamps what its projections return in place; who keeps that very tensor has the clamped numbers."""

    def late(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                module.register_forward_hook(lambda _m, _args, value, name=name: seen.__setitem__(name, value))
        model(ids)
        return seen

    path = make("olmo", folder)
    monkeypatch.setattr("tests.planted.dumps.observe", late)
    findings = compare(path, port(path, "float32"), "float32", False, folder).findings
    assert {f.families[0].rpartition(".")[2] for f in findings} == {"q_proj", "k_proj", "v_proj"}
    assert all(f.fault is None and "see that a copy was recorded" in f.evidence[-1] for f in findings)


@pytest.mark.parametrize("architecture", slow_but(["llama", "olmo"], ARCHITECTURES))
def test_a_right_port_is_accused_of_nothing(architecture: str, folder: Path) -> None:
    assert not false_alarms([architecture], folder, ["float32"])
