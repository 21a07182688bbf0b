"""Words and numbers as the reports write them."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from parity.report import html, markdown, text
from parity.report.terminal import show
from parity.results import Comparison, Finding, Reading
from tests.report_example import in_regime, matching, on_own_weights


def shown(comparison: Comparison) -> str:
    stream = io.StringIO()
    show(comparison, Console(file=stream, width=200))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (1.0, "1.00"),
        (9.99, "9.99"),
        (9.996, "10"),
        (541.2, "541"),
        (123456.0, "1e+05"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (math.nan, "NaN"),
    ],
)
def test_a_ratio_fits_in_six_characters(value: float | None, shown: str) -> None:
    assert text.number(value) == shown


@given(st.floats(min_value=0) | st.just(math.nan))
def test_no_ratio_is_wider_than_a_column(value: float) -> None:
    assert len(text.number(value)) <= 6


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (1.0, "100 %"),
        (0.999998, "99.9998 %"),
        (0.99999999, "> 99.9999 %"),
        (0.973, "97.3 %"),
        (0.5, "50 %"),
        (0.0, "0 %"),
        (-0.25, "-25 %"),
        (math.nan, "NaN"),
    ],
)
def test_a_share_near_one_keeps_the_digits_that_matter(share: float, shown: str) -> None:
    assert text.percent(share) == shown


@pytest.mark.parametrize(
    ("read", "shown"),
    [
        (Reading(10000.4, 3.1, 1e6), "x = 1e4 ± 3; the config says 1e6"),
        (Reading(1.004e-5, 1e-7, 1e-6), "x = 1e-5 ± 1e-7; the config says 1e-6"),
        (Reading(0.12503, 0.0004, 0.125), "x = 0.125 ± 0.0004; the config says 0.125"),
        (Reading(2.0, 0.0, 1.0), "x = 2; the config says 1"),
        (Reading(0.0, 0.5, 1.0), "x = 0 ± 0.5; the config says 1"),
        (Reading(math.nan, math.nan, 1.0), "x = NaN; the config says 1"),
        (Reading(3.0, math.inf, 1e6), "x = 3; the config says 1e6"),
    ],
)
def test_a_reading_is_as_precise_as_its_error(read: Reading, shown: str) -> None:
    assert text.reading("x", read) == shown


@given(st.floats(), st.floats(), st.floats())
def test_any_reading_can_be_said(value: float, stderr: float, expected: float) -> None:
    assert "the config says" in text.reading("x", Reading(value, stderr, expected))


def test_what_is_shown_stays_on_one_line_and_cannot_command_a_terminal() -> None:
    """Every character there is, surrogates too: none that acts on a terminal or a line is left."""
    shown = text.visible("".join(map(chr, range(sys.maxunicode + 1))))
    assert shown.isprintable() or not shown.splitlines()[1:]
    acting = set(map(chr, [*range(32), *range(127, 160), 0x61C, *range(0x200B, 0x2010), *range(0x2028, 0x202F)]))
    acting |= set(map(chr, [*range(0x2060, 0x2065), *range(0x2066, 0x2070), 0xFEFF, *range(0xD800, 0xE000)]))
    left = acting.intersection(shown)
    assert not left
    assert "\\x1b" in shown
    assert "\\u202e" in shown


def test_letters_of_all_scripts_stay() -> None:
    assert text.visible("Ġpeintre 画家 🎨") == "Ġpeintre 画家 🎨"


def test_ranges() -> None:
    assert text.ranges([3, 0, 1, 2, 7, 9, 10, 2]) == "0-3, 7, 9-10"


@pytest.mark.parametrize(
    ("layers", "shown"),
    [
        ((), "outside the layers"),
        ((14,), "layer 14 only"),
        ((0, 1, 2), "all 3 layers"),
        ((0, 2), "layers 0, 2 (2 of 3)"),
    ],
)
def test_where(layers: tuple[int, ...], shown: str) -> None:
    assert text.where(Finding(("f",), (), layers, "wrong", 1.0, None, ()), 3) == shown


@pytest.mark.parametrize("render", [markdown.render, html.render, shown], ids=["markdown", "page", "terminal"])
def test_every_report_says_what_was_accepted(render: Callable[[Comparison], str]) -> None:
    said = "accepted: kv-cache-fp16 at model.layers.*.self_attn.q_rope, layer 0 only: 4147x the floor without it, 0.41x"
    assert said in " ".join(render(in_regime()).replace("\\", "").split())
    assert "accepted:" not in render(matching())


@pytest.mark.parametrize("render", [markdown.render, html.render, shown], ids=["markdown", "page", "terminal"])
def test_every_report_says_how_far_weights_are_off(render: Callable[[Comparison], str]) -> None:
    said = (
        "weights: 1 in Q4_K, 1 in F32; off the checkpoint by up to 6.2 % (lm_head.weight), "
        "the worst block 0.40x what its format allows"
    )
    assert said in " ".join(render(on_own_weights()).replace("\\", "").split())
    assert "weights: 1" not in render(matching())


@pytest.mark.parametrize("render", [markdown.render, html.render, shown], ids=["markdown", "page", "terminal"])
def test_every_report_ranks_weights_by_what_they_cost(render: Callable[[Comparison], str]) -> None:
    assert "alone moves the logits by" in render(on_own_weights())
    assert "12.5 %" in render(on_own_weights())
    assert "alone moves the logits by" not in render(matching())


def test_families_of_one_finding_share_their_path() -> None:
    both = ("model.layers.*.self_attn.q_rope", "model.layers.*.self_attn.k_rope", "model.layers.*.mlp")
    finding = Finding(both, (), (), "wrong", 1.0, None, ())
    assert text.families(finding) == "model.layers.*.self_attn.q_rope, k_rope, model.layers.*.mlp"
