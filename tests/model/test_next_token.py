"""What both sides would say next: KL against its definition, and the sample of logits that is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from parity.compare import next_token
from parity.compare.next_token import ending, sample_of
from parity.observer import Observer
from parity.reference.batch import Batch
from parity.reference.checkpoint import find
from parity.reference.replay import Replayed
from parity.sites import Site

INF, NAN = math.inf, math.nan


def kl_divergence(candidate: Tensor, reference: Tensor) -> float:
    return float(next_token.kl_divergence(candidate, reference))


def noisy(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Candidate and reference: alike, and not too much so."""
    generator = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(size, generator=generator)
    return reference + 0.1 * torch.randn(size, generator=generator), reference


@pytest.mark.parametrize("size", [1, 9, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kl_agrees_with_the_definition(size: int, dtype: torch.dtype) -> None:
    candidate, reference = (side.to(dtype) for side in noisy(size))
    p, q = (np.exp(side.double().numpy()) for side in (reference, candidate))
    p, q = p / p.sum(), q / q.sum()
    expected = float((p * np.log(p / q)).sum())
    assert kl_divergence(candidate, reference) == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert size == 1 or expected > 1e-4, "there is something to measure"


def test_kl_is_zero_of_equal_stable_and_blind_to_a_shift() -> None:
    candidate, reference = (side.double() for side in noisy(50))
    assert kl_divergence(candidate, candidate) == 0.0
    shifted = kl_divergence(candidate + 1e4, reference - 1e4)
    assert shifted == pytest.approx(kl_divergence(candidate, reference), rel=1e-6)
    assert kl_divergence(torch.tensor([0.0, 1e4]), torch.tensor([1e4, 0.0])) == pytest.approx(1e4)


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ([0.0, 0.0, -INF], [0.0, 0.0, -INF], 0.0),
        ([0.0, 0.0, 0.0], [0.0, 0.0, -INF], math.log(1.5)),
        ([0.0, -INF, 0.0], [0.0, 0.0, -INF], INF),
        ([NAN, 0.0], [0.0, 0.0], INF),
        ([0.0, 0.0], [NAN, 0.0], INF),
        ([INF, 0.0], [0.0, 0.0], INF),
        ([0.0, 0.0], [INF, 0.0], INF),
        ([-INF, -INF], [0.0, 0.0], INF),
        ([0.0, 0.0], [-INF, -INF], INF),
    ],
)
def test_kl_of_excluded_tokens_and_of_what_is_no_distribution(
    candidate: list[float], reference: list[float], expected: float
) -> None:
    assert kl_divergence(torch.tensor(candidate), torch.tensor(reference)) == pytest.approx(expected)


def test_a_small_vocabulary_is_drawn_whole() -> None:
    candidate, reference = noisy(512)
    sample = sample_of(reference, candidate)
    assert sample.vocabulary == len(sample.reference) == 512
    assert sorted(sample.reference, reverse=True) == list(sample.reference)
    pairs = dict(zip(sample.reference, sample.candidate, strict=True))
    six = [[float(f"{value:.6g}") for value in side.tolist()] for side in (candidate, reference)]
    assert [pairs[value] for value in six[1]] == six[0]


@pytest.mark.parametrize("size", [513, 1000, 151_936])
def test_of_a_large_one_the_largest_of_each_side_and_some_of_all_ranks(size: int) -> None:
    candidate, reference = noisy(size)
    candidate[reference.argsort()[size // 2 : size // 2 + 10]] = 100.0  # what the reference would never say
    sample = sample_of(reference, candidate)
    assert 400 < len(sample.reference) == len(sample.candidate) <= 512
    assert sample.vocabulary == size
    assert sample.candidate.count(100.0) == 10
    for drawn, side in ((sample.reference, reference), (sample.candidate, candidate)):
        largest = [float(f"{value:.6g}") for value in side.sort(descending=True).values[:60].tolist()]
        assert set(largest) <= set(drawn)
    ranks = reference.sort(descending=True).values
    gaps = np.diff(np.searchsorted(-ranks.numpy(), [-v for v in sample.reference]))
    # Six digits do not always give the rank back exactly.
    assert gaps.max() <= math.ceil(size / 380) * 1.1 + 1, "no part of the ranking is left out"
    assert sample.reference[-1] == pytest.approx(float(reference.min()), rel=1e-5)


def test_ties_do_not_matter() -> None:
    ties = torch.randn(3000, generator=torch.Generator().manual_seed(0)).mul(2).round()
    first = sample_of(ties, -ties)
    assert first == sample_of(ties.clone(), -ties)
    assert all(r == -c for r, c in zip(first.reference, first.candidate, strict=True))


# -- flips ---------------------------------------------------------------------------------------------------------


def unexplained(path: Path, draws: list[list[float]]) -> int:
    """Of one token whose exact logits are 3, 1 and 0, and where the candidate has 1 and 3 of the first two."""
    ideal = torch.tensor([[[3.0, 1.0, 0.0]]])
    own = ideal + torch.tensor([0.01, -0.01, 0.0])
    candidate, noise = torch.tensor([[[1.0, 3.0, 0.0]]]), tuple(ideal + torch.tensor(draw) for draw in draws)
    site = Site("lm_head", ("batch", "token", "vocab"), (1, 1, 3), "torch.float32", "lm_head", "output")
    batch = Batch(torch.zeros(1, 1, dtype=torch.long))
    logits = Replayed(site, own, ideal, candidate, ideal, own, ideal, 1, noise)
    found = ending(logits, batch, find(str(path)), Observer())
    assert found.next_token is not None
    assert found.next_token.flips == 1
    return found.next_token.unexplained_flips


def test_a_flip_is_explained_by_the_noise_of_its_own_two_logits(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3", layers=1)
    assert unexplained(path, []) == 1, "the reference's own error is small, as one draw may be"
    assert unexplained(path, [[0.3, -0.4, 0.0], [-0.5, 0.5, 0.0]]) == 0
    assert unexplained(path, [[0.02, -0.03, 0.0], [0.01, 0.02, 0.0]]) == 1
    assert unexplained(path, [[0.5, 0.5, 0.9], [-0.5, -0.5, 0.0]]) == 1, "what moves both alike flips nothing"
