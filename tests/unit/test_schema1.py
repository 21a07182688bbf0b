"""Reports that the first version wrote are read: the same findings, sites and numbers, the same words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parity import words
from parity.errors import UsageError
from parity.json_values import to_json
from parity.reasons import Gap, Inconclusive
from parity.report import json as report_json
from parity.results import Comparison
from tests.conftest import ROOT

DATA = ROOT / "tests" / "data"
# Both were written by the version before schema 2.
NAMES = ("schema1-diverged.json", "schema1-inconclusive.json")


def pair(name: str) -> tuple[dict[str, Any], Comparison]:
    raw: dict[str, Any] = json.loads((DATA / name).read_text(encoding="utf-8"))
    assert raw["schema"] == 1
    return raw, report_json.load(DATA / name)


def within(old: Any, new: Any) -> Any:
    """What the new value says of the keys that the old one has, at any depth."""
    if isinstance(old, dict):
        return {key: within(value, new[key]) for key, value in old.items()}
    if isinstance(old, list) and len(old) == len(new):
        return [within(a, b) for a, b in zip(old, new, strict=True)]
    return new


@pytest.mark.parametrize("name", NAMES)
def test_sites_findings_and_numbers_are_the_same(name: str) -> None:
    raw, run = pair(name)
    new = to_json(run)
    for old, site in zip(raw["sites"], new["sites"], strict=True):
        assert {key: site[key] for key in old if key != "reason"} == {k: v for k, v in old.items() if k != "reason"}
    for old, finding in zip(raw["findings"], new["findings"], strict=True):
        assert ", ".join(finding["families"]) == old["family"]
        assert {key: finding[key] for key in old if key != "family"} == {k: v for k, v in old.items() if k != "family"}
    rest = set(raw) - {"sites", "findings", "power", "schema"}
    assert {key: within(raw[key], new[key]) for key in rest} == {key: raw[key] for key in rest}
    assert run.power is not None
    assert list(run.power.visible) == raw["power"]["visible"]


@pytest.mark.parametrize("name", NAMES)
def test_reasons_are_data_that_read_as_before(name: str) -> None:
    raw, run = pair(name)
    assert [words.reason(m) for m in run.sites] == [site["reason"] for site in raw["sites"]]
    assert words.headline(run) == raw["headline"]
    assert words.answer(run) == raw["answer"]
    assert run.power is not None
    assert run.power.dtype == "bfloat16"
    said = {item.fault: words.unseen(item, run.power.dtype) for item in run.power.unseen}
    for item in raw["power"]["invisible"]:
        reason, detail = said[item["fault"]]
        assert item["reason"] in (f"{reason}: {detail}", f"{reason}; {detail}", reason)


def test_kinds_are_recognized() -> None:
    gaps = {m.site: m.gap for m in pair(NAMES[0])[1].sites if m.gap}
    assert gaps == {
        "model.layers.0.mlp.gate_proj": Gap("not recorded"),
        "model.layers.1.input_layernorm": Gap("not recorded"),
        "model.layers.1.mlp.up_proj": Gap(
            "misshapen", (1, 12, 111), axes=("batch", "token", "feature"), sizes=(1, 12, 112)
        ),
    }
    assert pair(NAMES[1])[1].inconclusive == Inconclusive("logits unmeasured")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"checks": [{"name": "a", "ok": False, "detail": "b"}]}, Inconclusive("check failed")),
        ({"sites": []}, Inconclusive("no site")),
        ({}, Inconclusive("logits unmeasured")),
        ({"total_ratio": 4.5}, Inconclusive("logits off", ratio=4.5)),
        ({"total_ratio": 1.5, "flips": 2}, Inconclusive("flips", count=2)),
    ],
)
def test_why_a_run_was_inconclusive(tmp_path: Path, change: dict[str, Any], why: Inconclusive) -> None:
    raw, _ = pair(NAMES[1])
    total, flips = change.pop("total_ratio", None), change.pop("flips", 0)
    if total is not None:
        raw["sites"][-1] |= {"verdict": "rounding", "total_ratio": total}
    if flips:
        raw["next_token"] = pair(NAMES[0])[0]["next_token"] | {"unexplained_flips": flips}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(raw | change), encoding="utf-8")
    assert report_json.load(path).inconclusive == why


@pytest.mark.parametrize(
    ("key", "value"), [("sites", [3]), ("findings", [{"family": 3}]), ("power", {"invisible": [1]}), ("sites", None)]
)
def test_a_damaged_one_is_refused_as_any_other(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(pair(NAMES[0])[0] | {key: value}), encoding="utf-8")
    with pytest.raises(UsageError, match="claims to be a report, but"):
        report_json.load(path)
