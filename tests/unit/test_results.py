"""A Comparison survives the way to JSON and back, with all that JSON has no word for."""

from __future__ import annotations

import contextlib
import json
import math
import os
import types
import typing
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.errors import UsageError
from parity.json_values import MalformedError, from_json, to_json
from parity.predictions import NextToken
from parity.report import json as report_json
from parity.results import EXIT_CODES, SCHEMA, Comparison, Finding, Measurement, Structure
from tests.report_example import everything, matching


@cache
def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a type that a field of a result may have; infinities and NaN among the floats."""
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{f.name: values(hints[f.name]) for f in fields(kind) if f.name != "schema"})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return st.one_of([values(argument) for argument in arguments])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=2)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.integers(-(2**60), 2**60),
        float: st.floats(),
        # A name that reads like a number must stay a name.
        str: st.text(max_size=5) | st.sampled_from(["inf", "nan", "1.5", "Ġ", '"', "\n"]),
    }
    return simple[kind]


def same(a: Any, b: Any) -> bool:
    """Equality that knows NaN, and tells 1 from 1.0 and a tuple from a list."""
    if type(a) is not type(b):
        return False
    if is_dataclass(a) and not isinstance(a, type):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


@pytest.mark.parametrize("kind", [Structure, Measurement, Finding, NextToken, Comparison], ids=lambda k: k.__name__)
def test_what_goes_out_comes_back(kind: Any) -> None:
    @settings(max_examples=25, deadline=None)
    @given(values(kind))
    def check(value: Any) -> None:
        text = json.dumps(to_json(value), allow_nan=False)
        assert same(from_json(kind, json.loads(text)), value)

    check()


@settings(max_examples=20, deadline=None)
@given(values(Comparison))
def test_a_report_is_read_back_and_written_again_byte_by_byte(comparison: Comparison) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        text = report_json.dumps(comparison)
        path.write_text(text, encoding="utf-8")
        again = report_json.load(path)
    assert same(again, comparison)
    assert report_json.dumps(again) == text


STRUCTURE = Structure(0.0, math.nan, (1.0, math.inf), (), 3, 0.5, None, 40)
SITE = Measurement(
    "model.layers.0.mlp", "wrong", "why", ratio=math.inf, mse=-math.inf, ulp_max=2.0, structure=STRUCTURE, shape=(1, 2)
)


def test_profiles_keep_four_digits_and_all_else_its_own() -> None:
    shape = Structure(1 / 3, 1 / 3, (1 / 3, 12345.678, math.inf, 2.0), (1e-9 / 3,), 3, 1 / 3, 4, 5)
    short = shape.shortened()
    assert short == replace(shape, by_token=(0.3333, 12350.0, math.inf, 2.0), by_head=(3.333e-10,))
    assert math.isnan(replace(shape, by_head=(math.nan,)).shortened().by_head[0])


def test_json_gets_words_for_what_it_lacks() -> None:
    raw = to_json(SITE)
    assert raw["ratio"] == "inf"
    assert raw["mse"] == "-inf"
    assert raw["structure"]["cosine"] == "nan"
    assert raw["structure"]["by_token"] == [1.0, "inf"]
    assert raw["shape"] == [1, 2]
    assert raw["row_max"] is None


def test_fields_that_a_report_lacks_take_their_default() -> None:
    raw = to_json(SITE)
    del raw["structure"], raw["steps"]
    assert from_json(Measurement, raw) == replace(SITE, structure=None, steps=())


def test_exit_codes_are_those_of_diff() -> None:
    assert EXIT_CODES == {"match": 0, "diverged": 1, "inconclusive": 2}


@pytest.mark.parametrize("content", [f'{{"schema": {SCHEMA + 1}}}', "{}", "[]", "3", '{"schema": "1"}'])
def test_a_report_of_another_schema_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=rf"schema .* found, this parity reads schemas 1 to {SCHEMA}") as caught:
        report_json.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", None, b"[" * 100_000, b"[" * 50 + b"]" * 50, b'{"a": 1, "a": 2}']
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"not a report\.json") as caught:
        report_json.load(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    os.mkfifo(path)
    with pytest.raises(UsageError, match="a FIFO"):
        report_json.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"verdict": "fine"}, "verdict is 'fine', not one of match, diverged, inconclusive"),
        ({"verdict": None}, "verdict is null, not one of"),
        ({"headline": 3}, "headline is 3, not a text"),
        ({"headline": "x" * (1 << 23)}, "headline is a text of 8388608 characters"),
        ({"coverage": {"measured": True, "known": 1}}, "coverage.measured is true, not a whole number"),
        ({"coverage": {"measured": 1.5, "known": 1}}, "coverage.measured is 1.5, not a whole number"),
        ({"coverage": {"known": 1}}, "coverage.measured is missing"),
        ({"checks": [{"name": "a", "ok": 1, "detail": ""}]}, "checks[0].ok is 1, not true or false"),
        ({"noise_ratio": "big"}, "noise_ratio is 'big', not a number"),
        ({"noise_ratio": 10**400}, "noise_ratio is a number too large"),
        ({"sites": {}}, "sites is an object, not a list"),
        ({"sites": [[]]}, "sites[0] is a list, not an object"),
        ({"findings": [{"families": "a"}]}, "findings[0].families is 'a', not a list"),
        ({"inconclusive": {"kind": "\x1b[31m"}}, r"inconclusive.kind is '\x1b[31m', not one of"),
        ({"power": {"visible": [1], "invisible": []}}, "power.visible[0] is 1, not a text"),
    ],
    ids=lambda change: str(change)[:40],
)
def test_what_is_wrong_in_a_report_is_named_by_its_key(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(to_json(matching()) | change), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        report_json.load(path)
    assert f"claims to be a report, but {said}" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


SOUND = json.dumps(to_json(everything()))
DAMAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=80, deadline=None)
@given(st.data(), DAMAGE)
def test_any_damage_is_refused_or_harmless(data: st.DataObject, damage: Any) -> None:
    raw = json.loads(SOUND)
    holder, key = raw, data.draw(st.sampled_from(sorted(raw)))
    while isinstance(holder[key], dict | list) and holder[key] and data.draw(st.booleans()):
        holder = holder[key]
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    holder[key] = damage
    with contextlib.suppress(MalformedError):
        assert isinstance(from_json(Comparison, raw), Comparison)


@pytest.mark.parametrize("change", [{"sites": 3}, {"environment": None}, {"sites": [{}]}, {"next_token": []}], ids=str)
def test_a_report_of_the_right_schema_with_the_wrong_content_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"schema": SCHEMA} | change))
    with pytest.raises(UsageError):
        report_json.load(path)
