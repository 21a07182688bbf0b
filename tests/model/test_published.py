"""The checks of published numbers: phases, positions, correlations, and a validation that lets a fault pass."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.bench import published
from tests.bench.outcomes import Examined
from tests.bench.published import Validation, passes
from tests.bench.published_math import WAYS, correlations, frequencies, neighbours, pcc, phase_error
from tests.bench.published_page import PHASES, validation


def test_phase_errors_are_those_reported_and_float32_leaves_the_tables_rounding() -> None:
    found = [phase_error(WAYS[0], 1e4, 128, tokens) for tokens in (512, 2048)]
    assert found == pytest.approx(list(PHASES[:2]), rel=0.01)
    assert phase_error(WAYS[2], 1e4, 128, 512) == pytest.approx(2.8e-3, rel=0.05)
    assert phase_error(WAYS[1], 1e4, 128, 512) > found[0]
    assert phase_error(WAYS[1], 1e4, 128, 2048) <= math.pi


def test_a_position_goes_to_the_nearer_neighbour_of_its_dtype() -> None:
    assert neighbours(15962, torch.bfloat16) == (15936, 15936, 16000)
    assert neighbours(15962, torch.float16) == (15960, 15960, 15968)
    assert neighbours(256, torch.bfloat16) == (256, 256, 256)


def test_correlation_falls_with_length_where_angles_are_rounded_and_only_there() -> None:
    short, long = correlations(WAYS[0], 1e4, 64, 128), correlations(WAYS[0], 1e4, 64, 1024)
    assert all(a > b for a, b in zip(short, long, strict=True))
    assert min(correlations(WAYS[2], 1e4, 64, 1024)) > 0.999999


def test_correlation_and_frequencies_by_hand() -> None:
    assert pcc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([11.0, 12.0, 13.0])) == pytest.approx(1.0)
    assert pcc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])) == pytest.approx(-1.0)
    assert frequencies(1e4, 4).tolist() == pytest.approx([1.0, 0.01])


def test_what_passes_is_counted_and_what_does_not_is_not_listed() -> None:
    figures = {"mse": [1e-3, 2e-3, 3e-3], "cosine": [0.9999, 0.9998, 0.9997], "same_token": [True] * 3}

    def run(what: str, bug: str, verdict: str, how: str = "", **more: object) -> Examined:
        key = ("published", "m", "bfloat16", what, bug, verdict, "")
        return Examined(*key, naming=how, figures=figures | more)

    assert passes(figures)
    assert not passes(figures | {"mse": [1e-3, 2e-2, 3e-3]})
    assert not passes(figures | {"mse": [1e-3, math.nan, 3e-3]})
    assert not passes(figures | {"cosine": [0.9999, 0.998, 0.9997]})
    assert not passes(figures | {"same_token": [True, False, True]})
    runs = [
        run("hf:?attn=sdpa", "", "not asked"),
        run("a@1", "a@1", "diverged", "named"),
        run("b@1", "b@1", "match", "unnamed"),
        run("c@1", "c@1", "not asked"),
        run("d@1", "d@1", "not run"),
    ]
    text = "\n".join(validation(runs, 9))
    assert "a part of the bench: 4 of 9 were tried" in text
    assert "a part" not in "\n".join(validation(runs, 4))
    assert "Of 3 runs with a fault" in text
    assert "2 pass as that port did" in text
    assert "1 of these diverge, 1 by their right name" in text
    assert "| b@1 |" in text
    assert "| c@1 |" not in text
    assert "| hf:?attn=sdpa, which is right | 0.001 |" in text


@pytest.mark.slow
def test_a_fault_that_the_validation_lets_pass_is_found_by_parity(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "STORY", 12)
    monkeypatch.setattr(published, "PROMPTS", published.PROMPTS[1:2])
    on = Validation(tiny)
    assert max(on.examine("hf:?attn=eager").figures["mse"]) == 0.0
    hidden, seen = on.examine("act-relu@14"), on.examine("gqa-tile")
    assert hidden.verdict == "diverged"
    assert hidden.naming == "named"
    assert seen.verdict == "not asked"
    assert on.examine("sinks-dropped@1").verdict == "not run", "for the model has no sinks"
