"""Large logits are computed row by row: the same numbers, and none left whole in the precision of the truth."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parity.compare.next_token import ending
from parity.observer import Observer
from parity.reference import products, transfer
from parity.reference.batch import Batch
from parity.reference.checkpoint import find
from parity.reference.floor import Local, local_error
from parity.reference.pieces import PiecewiseModel
from parity.reference.products import Product
from parity.reference.replay import Reference, Replayed

IDS = (torch.arange(2 * 7).reshape(2, 7) * 37 + 11) % 200
NOISE, WAYS = 2, 1


def recording(of: Reference) -> dict[str, Tensor]:
    """The reference's own plain run."""
    seen: dict[str, Tensor] = {}
    for _, sites in of.replay(IDS, lambda _site: None):
        seen |= {site.site.name: site.plain.clone() for site in sites}
    return seen


def logits(of: Reference, candidate: dict[str, Tensor]) -> Replayed:
    *_, (_, sites) = of.replay(IDS, lambda site: candidate.get(site.name), NOISE, WAYS)
    return sites[-1]


def measured(site: Replayed, of: Reference) -> Local:
    return local_error(site, of.working.dtype, of.working.dtype, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_by_row_are_the_same_numbers(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    path = checkpoint("qwen3", layers=1)
    of = Reference(PiecewiseModel(find(str(path)), dtype))
    candidate = recording(of)
    moved = candidate["lm_head"]
    moved[0, 3] = moved[0, 3].flip(0)  # a token that is wrong, and flipped
    whole = logits(of, candidate)
    monkeypatch.setattr(products, "LARGE", 1)
    monkeypatch.setattr(transfer, "_OF_PRODUCT", 3 * moved.shape[-1])
    rows = logits(of, candidate)
    for now, before in zip(
        (rows.truth, rows.jitter, rows.ideal, *rows.noise),
        (whole.truth, whole.jitter, whole.ideal, *whole.noise),
        strict=True,
    ):
        assert isinstance(now, Product)
        assert isinstance(before, Tensor)
        assert (now.shape, now.dtype, now.numel()) == (before.shape, before.dtype, before.numel())
        torch.testing.assert_close(now.flatten()[2:9], before.flatten(0, -2)[2:9])
    assert all(isinstance(x, Tensor) for x in (rows.own, rows.plain, rows.floor)), (
        "the reference's answer, as it gives it"
    )
    assert rows.allowed is not None
    assert whole.allowed is not None
    torch.testing.assert_close(rows.allowed, whole.allowed, rtol=1e-3, atol=0)
    assert measured(rows, of).ratio == pytest.approx(measured(whole, of).ratio, rel=1e-3)
    assert measured(rows, of).worst_tokens == measured(whole, of).worst_tokens == (3,)
    ends = [ending(site, Batch(IDS), find(str(path)), Observer()) for site in (rows, whole)]
    assert ends[0].next_token is not None
    assert ends[0].next_token.flips == 1
    assert ends[0].noise_ratio == pytest.approx(ends[1].noise_ratio, rel=1e-4)


def test_a_bias_is_added() -> None:
    inputs, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    rows = Product(inputs, weight, bias).flatten()[1:4]
    torch.testing.assert_close(rows, (inputs @ weight.T + bias).flatten(0, 1)[1:4])


def test_small_logits_are_computed_at_once_and_another_last_site_always(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PiecewiseModel(find(str(checkpoint("qwen3", layers=1))), torch.bfloat16)
    capped = PiecewiseModel(
        find(str(checkpoint("gemma3_text", num_hidden_layers=3, final_logit_softcapping=5.0))), torch.bfloat16
    )
    assert not products.withholds(plain, IDS)
    monkeypatch.setattr(products, "LARGE", 1)
    assert products.withholds(plain, IDS)
    assert not products.withholds(capped, IDS), "its last site is what a function makes of the product"


def test_a_measured_piece_makes_room_for_the_next(checkpoint: Callable[..., Path]) -> None:
    of = Reference(PiecewiseModel(find(str(checkpoint("qwen3", layers=2))), torch.bfloat16))
    steps = of.replay(IDS, lambda _site: None)
    next(steps)
    _, sites = next(steps)
    kept = weakref.ref(sites[0].truth)
    del sites
    next(steps)
    gc.collect()
    assert kept() is None
