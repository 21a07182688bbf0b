"""--exact says how the first operation with other bits rounds: only what gives all of its bits is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import parity
from impl.qwen3 import load
from parity.diagnose.sum_orders import Asked, Order, summed
from parity.results import Comparison

TOKENS = "5 17 99 4 150 23 8"


def _terms(x: Tensor, weight: Tensor) -> Tensor:
    return x.float()[..., None, :] * weight.float()


class InLanes(nn.Linear):
    """Eight running sums, added one after another."""

    def forward(self, x: Tensor) -> Tensor:
        terms = _terms(x, self.weight)
        lanes = torch.zeros(*terms.shape[:-1], 8)
        for start in range(0, terms.shape[-1], 8):
            lanes = lanes + terms[..., start : start + 8]
        total = lanes[..., 0]
        for lane in range(1, 8):
            total = total + lanes[..., lane]
        return total.to(x.dtype)


class Shuffled(nn.Linear):
    """An order of sums that no engine has."""

    def forward(self, x: Tensor) -> Tensor:
        order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(3))
        terms = _terms(x, self.weight)[..., order]
        total = terms[..., 0]
        for i in range(1, terms.shape[-1]):
            total = total + terms[..., i]
        return total.to(x.dtype)


class Narrow(nn.Linear):
    """Sums rounded to the dtype of the model after every 32 terms."""

    def forward(self, x: Tensor) -> Tensor:
        terms, total = _terms(x, self.weight), torch.zeros((), dtype=x.dtype)
        for start in range(0, terms.shape[-1], 32):
            part = terms[..., start]
            for i in range(start + 1, min(start + 32, terms.shape[-1])):
                part = part + terms[..., i]
            total = (total.float() + part).to(x.dtype)
        return total


class RoundedOnce(nn.Module):
    """An RMSNorm whose product with the weight is in float32 too."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * wide).to(x.dtype)


class InSteps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def as_class(place: str, kind: type) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.get_submodule(place).__class__ = kind

    return change


def rounded_once(model: Any) -> None:
    layer = model.model.layers[1]
    layer.post_attention_layernorm = RoundedOnce(layer.post_attention_layernorm)


def in_steps(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = InSteps()


def fused(model: Any) -> None:
    mlp = model.model.layers[1].mlp

    def forward(x: Tensor) -> Tensor:
        gate = mlp.gate_proj(x)
        mlp.act_fn(gate)  # what is seen of it is rounded
        product = (silu(gate.float()) * mlp.up_proj(x).float()).to(x.dtype)
        result: Tensor = mlp.down_proj(mlp.product(product))
        return result

    mlp.forward = forward


_UP, _ACT = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.act_fn"
_NORM, _PRODUCT = "model.layers.1.post_attention_layernorm", "model.layers.1.mlp.product"
# dtype, change, the site, and a way that must be said; none where nothing may be said.
_PLANTED: list[tuple[str, Callable[[Any], None], str, str | None]] = [
    ("float32", as_class(_UP, InLanes), _UP, "sums in 8 lanes"),
    ("bfloat16", as_class(_UP, Narrow), _UP, "sums rounded to bfloat16 after every block of 32 terms"),
    ("bfloat16", rounded_once, _NORM, "all steps in float32, rounded once"),
    ("bfloat16", fused, _PRODUCT, "fused with mlp.act_fn, not rounded in between, in float32"),
    ("float32", in_steps, _ACT, "x · sigmoid(x) with the sigmoid rounded first"),
    ("float32", as_class(_UP, Shuffled), _UP, None),
]


@pytest.fixture(scope="module")
def models(checkpoint: Callable[..., Path]) -> dict[str, Path]:
    return {dtype: checkpoint("qwen3", layers=2, dtype=dtype) for dtype in ("float32", "bfloat16")}


def exactly(candidate: Any, path: Path, dtype: str, **options: Any) -> Comparison:
    return parity.diff(candidate, model=str(path), tokens=TOKENS, dtype=dtype, power=False, exact=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "change", "site", "way"), _PLANTED, ids=[way or "none" for *_, way in _PLANTED])
def test_how_it_rounds(
    models: dict[str, Path], dtype: str, change: Callable[[Any], None], site: str, way: str | None
) -> None:
    model = load(models[dtype], dtype)
    change(model)
    found = exactly(model, models[dtype], dtype)
    bits = found.other_bits
    assert (found.verdict, found.findings, found.troubles) == ("diverged", (), ())
    assert bits is not None
    assert bits.site == site
    assert 0 < bits.differing < bits.tried
    if way is None:
        assert bits.ways == ()
        assert bits.floors is not None
        assert f"which are {bits.floors:.2g}x the reference's own rounding away" in found.headline
    else:
        assert way in bits.ways
        assert len(bits.ways) <= 3
        assert f"gives all {bits.tried} numbers bit for bit" in found.headline


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other", "way"),
    [("sdpa", "eager", "torch's scaled_dot_product_attention"), ("eager", "sdpa", "attention step by step, as eager")],
)
def test_other_attention_is_told_by_its_bits(models: dict[str, Path], one: str, other: str, way: str) -> None:
    found = exactly(f"hf:?attn={one}", models["bfloat16"], "bfloat16", attention=other)
    assert found.other_bits is not None
    assert found.other_bits.site == "model.layers.0.self_attn.context"
    assert found.other_bits.ways == (way,)


def test_equal_bits_and_plain_runs_say_nothing(models: dict[str, Path]) -> None:
    found = exactly(load(models["bfloat16"], "bfloat16"), models["bfloat16"], "bfloat16")
    assert (found.verdict, found.other_bits) == ("match", None)


def test_orders_are_sums_as_loops_take_them() -> None:
    generator = np.random.default_rng(5)
    x, w = (generator.standard_normal((3, 37)).astype(np.float32) for _ in range(2))
    for order in (Order(), Order(4), Order(4, halves=True), Order(1, 8), Order(8, 16, fused=True)):
        assert summed(x, w, order).tolist() == [_loop(*pair, order) for pair in zip(x, w, strict=True)], order


def _loop(x: Any, w: Any, order: Order) -> float:
    total = None
    for start in range(0, len(x), order.block or len(x)):
        lanes = [np.float32(0)] * order.lanes
        for i, (a, b) in enumerate(zip(*(v[start : start + (order.block or len(x))] for v in (x, w)), strict=True)):
            exact = np.float64(a) * np.float64(b) if order.fused else np.float64(np.float32(a * b))
            lanes[i % order.lanes] = np.float32(np.float64(lanes[i % order.lanes]) + exact)
        while order.halves and len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [np.float32(a + b) for a, b in zip(lanes[:half], lanes[half:], strict=True)]
        part = lanes[0]
        for lane in lanes[1:]:
            part = np.float32(part + lane)
        total = part if total is None else np.float32(total + part)
    return float(np.float32(total or 0))


def test_of_a_large_product_the_numbers_that_differ_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parity.diagnose.sum_orders._MOST", 5 * 16)
    x, w = torch.randn(6, 16), torch.randn(7, 16)
    ours = x @ w.T
    found = ours.clone()
    found[4, 2] += 1
    found[5, 6] += 1
    asked = Asked.of(x, w, None, found, ours)
    assert (len(asked.found), torch.equal(asked.found[:2], found[[4, 5], [2, 6]])) == (5, True)
    ways = dict(asked.ways())
    assert all(len(value) == 5 for value in ways.values())
    exact = (x.double() @ w.double().T).float()
    assert torch.equal(ways["sums in float64, rounded once"][:2], exact[[4, 5], [2, 6]])
    monkeypatch.setattr("parity.diagnose.sum_orders._OUTPUTS", 7)
    assert len(Asked.of(x, w, None, found, ours).x) == 1, "one row, for torch computes rows whole"
