"""`parity power`, `--inject`, `--noise`, `--faults` and `parity report`, as a user calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parity.faults import CATALOGUE
from tests.conftest import Ran

Cli = Callable[..., Ran]
TOKENS = ("--tokens", "5 17 3 9 88 41 200")


@pytest.fixture
def asked(small: Path) -> tuple[object, ...]:
    return ("--model", small, *TOKENS, "--dtype", "float32")


def answer(ran: Ran) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ran.out)
    return found


@pytest.mark.slow
def test_power_speaks_of_every_fault(cli: Cli, asked: tuple[object, ...]) -> None:
    ran = cli("power", *asked, "--json")
    assert ran.code == 0
    said = answer(ran)
    unseen = [one["fault"] for one in said["invisible"] + said["not_tried"]]
    assert sorted(said["visible"] + unseen) == sorted(fault.id for fault in CATALOGUE)
    assert "rope-interleaved" in said["visible"]


@pytest.mark.slow
def test_power_is_less_on_one_token(cli: Cli, small: Path) -> None:
    ran = cli("power", "--model", small, "--tokens", "5", "--dtype", "float32", "--json")
    said = answer(ran)
    assert "rope-interleaved" not in said["visible"]
    assert "act-gelu" in said["visible"]


def test_an_injected_fault_is_named_where_it_is(cli: Cli, asked: tuple[object, ...]) -> None:
    ran = cli("diff", *asked, "--inject", "act-gelu@1", "--no-power", "--json")
    assert ran.code == 1
    (finding,) = answer(ran)["findings"]
    assert finding["sites"] == ["model.layers.1.mlp.act_fn"]
    assert finding["fault"]["id"] == "act-gelu"


@pytest.mark.slow
def test_an_injected_number_is_read_off(cli: Cli, asked: tuple[object, ...]) -> None:
    ran = cli("diff", *asked, "--inject", "rope-theta=30000", "--no-power", "--json")
    assert ran.code == 1
    (finding,) = answer(ran)["findings"]
    assert finding["fault"]["reads"].popitem()[1]["value"] == pytest.approx(30000, rel=0.02)


@pytest.mark.parametrize("wrong", ["act-gelus", "act-gelu@9", "rope-theta=many"])
def test_an_injection_that_cannot_be_made_is_one_line(cli: Cli, asked: tuple[object, ...], wrong: str) -> None:
    ran = cli("diff", *asked, "--inject", wrong)
    assert ran.code == 2
    assert len(ran.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_noise_tells_how_far_rounding_may_go(cli: Cli, small: Path) -> None:
    given = ("diff", "--model", small, *TOKENS, "--dtype", "bfloat16", "--no-power", "--json")
    assert answer(cli(*given))["noise_ratio"] is None
    assert 0 < answer(cli(*given, "--noise", "4"))["noise_ratio"] < 3


_OWN = """
from parity.faults import Fault
from parity.faults.patches.modules import forward, activation_of
FAULTS = (Fault(id="mine-tripled", title="the activation is tripled", sites=("act_fn",), fix="do not",
                patch=lambda scope, number: forward(activation_of(scope), lambda x: 3 * x),
                applies=lambda scope: scope.layer is not None),)
"""


@pytest.mark.slow
def test_a_fault_of_ones_own_is_found(cli: Cli, asked: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(_OWN)
    ran = cli(
        "diff", *asked, "--faults", tmp_path / "mine.py:FAULTS", "--inject", "mine-tripled", "--no-power", "--json"
    )
    assert ran.code == 1
    (finding,) = answer(ran)["findings"]
    assert finding["fault"]["id"] == "mine-tripled"


@pytest.mark.slow
def test_two_reports_are_compared(cli: Cli, asked: tuple[object, ...], tmp_path: Path) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    assert cli("diff", *asked, "--inject", "act-gelu@1", "--no-power", "--out", bad).code == 1
    assert cli("diff", *asked, "--no-power", "--out", good).code == 0
    fixed = cli("report", bad / "report.json", good / "report.json")
    assert "fixed" in fixed.out
    assert "mlp.act_fn" in fixed.out
    worse = cli("report", good / "report.json", bad / "report.json")
    assert "new" in worse.out
    assert "mlp.act_fn" in worse.out
