"""RoPE read off by its gains: frequencies and positions far from the right ones, and error bars that hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parity.diagnose import rope_gain
from parity.diagnose.rope_gain import Gains

HEADS, TOKENS, PAIRS = 4, 96, 16
ANGLES = 1e4 ** (-torch.arange(PAIRS, dtype=torch.float64) / PAIRS)
PLACES = torch.arange(TOKENS, dtype=torch.float64)[None]


def turned(x: Tensor, angles: Tensor, places: Tensor, size: float, dtype: torch.dtype) -> Tensor:
    """Pairs x (b, h, t, p) turned as an engine does whose tables and products are of a dtype."""
    phases = (places[..., None] * angles)[:, None]
    cos, sin = ((f(phases) * size).to(dtype) for f in (torch.cos, torch.sin))
    real, imaginary = x.real.to(dtype), x.imag.to(dtype)
    return torch.complex((real * cos - imaginary * sin).double(), (real * sin + imaginary * cos).double())


def read(
    angles: Tensor, places: Tensor, size: float = 1.0, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Gains:
    """The gains of an engine with these angles (p) and positions (b, t); the reference has the right ones."""
    generator = torch.Generator().manual_seed(seed)
    real, imaginary = torch.randn(2, len(places), HEADS, TOKENS, PAIRS, generator=generator).to(dtype)
    x = torch.complex(real.double(), imaginary.double())
    right = PLACES.expand(len(places), -1)
    floor, truth = (turned(x, ANGLES, right, 1.0, d) for d in (dtype, torch.float64))
    return rope_gain.gains(x, turned(x, angles, places, size, dtype), floor, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frequencies_are_read_whatever_they_are(dtype: torch.dtype) -> None:
    for wrong in (ANGLES / 8, ANGLES.flip(0), ANGLES * torch.linspace(1, 1.5, PAIRS), ANGLES * 0):
        value, stderr = rope_gain.frequencies(read(wrong, PLACES, 1.2, dtype), PLACES, ANGLES)
        assert bool(((value - wrong).abs() < 5 * stderr).all())
        assert float(stderr.max()) < (1e-4 if dtype is torch.bfloat16 else 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_positions_are_read_whatever_they_are(dtype: torch.dtype) -> None:
    for wrong in (PLACES + 7, PLACES.flip(-1), (PLACES / 2).floor(), PLACES % 48, PLACES * 0, -PLACES):
        value, stderr = rope_gain.positions(read(ANGLES, wrong, 1.2, dtype), ANGLES)
        assert torch.equal(value.round(), wrong)
        assert bool(((value - wrong).abs() < 5 * stderr + 1e-6).all())


def test_the_standard_errors_hold_95_of_100_planted_numbers() -> None:
    wrong, moved = ANGLES * torch.linspace(0.9, 1.2, PAIRS), PLACES + 3
    off, away = [], []
    for seed in range(12):
        value, stderr = rope_gain.frequencies(read(wrong, PLACES, seed=seed), PLACES, ANGLES)
        off.append((value - wrong).abs() / stderr)
        value, stderr = rope_gain.positions(read(ANGLES, moved, seed=seed), ANGLES)
        away.append(((value - moved).abs() / stderr)[0])
    for found in (torch.cat(off), torch.cat(away)):
        # Neither too bold nor too shy.
        assert float((found < 2).double().mean()) > 0.93
        assert float((found < 0.3).double().mean()) < 0.7


def test_the_factor_is_read_as_far_as_tables_hold_it() -> None:
    for dtype, share in ((torch.bfloat16, 2**-8), (torch.float32, 2**-22)):
        assert rope_gain.factor(read(ANGLES, PLACES, 1.2, dtype)) == pytest.approx(1.2, rel=share)


def test_where_no_two_tokens_are_neighbours_no_frequency_is_read() -> None:
    with pytest.raises(ValueError, match="neighbouring"):
        rope_gain.frequencies(read(ANGLES, PLACES * 0), PLACES * 0, ANGLES)
