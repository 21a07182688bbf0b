"""Higher precision than the model's author asked for: the stock model becomes a true float64 oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from parity.reference.precision import (
    PRECISION_BITS,
    jittered,
    promoted,
    stochastically_rounded,
    truth_dtype,
    unit_roundoff,
)
from tests.checkpoints import OTHER, QWEN3

F64 = torch.float64
NARROW = (torch.float32, torch.bfloat16, torch.float16)
# The error of float64, some operations long, and a float32 island's least.
EXACT, ROUNDED = 1e-12, 1e-9


def model(model_type: str = "qwen3") -> Any:
    """A stock model of one layer in float64, its weights random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = QWEN3 if model_type == "qwen3" else OTHER[model_type]
    settings = {k: v for k, v in settings.items() if k != "layer_types"} | {"num_hidden_layers": 1}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **settings), dtype=F64, attn_implementation="eager"
    ).eval()


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def error(found: Tensor, expected: NDArray[np.float64]) -> float:
    return float(np.abs(found.detach().numpy() - expected).max())


@pytest.mark.parametrize(("dtype", "within"), [(F64, (0, EXACT)), (torch.float32, (ROUNDED, 1e-4))], ids=str)
class TestOracle:
    """With promotion every island is float64; without it the same code rounds to float32."""

    def test_rms_norm(self, dtype: torch.dtype, within: tuple[float, float]) -> None:
        norm = model().model.layers[0].input_layernorm
        x = draw(1, 9, 80, scale=3)
        with promoted(dtype), torch.no_grad():
            norm.weight.copy_(draw(80, seed=1))
            found = norm(x)
        rows = x.numpy()
        expected = norm.weight.detach().numpy() * rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)
        assert found.dtype is F64
        assert within[0] <= error(found, expected) < within[1]

    def test_softmax_and_its_products(self, dtype: torch.dtype, within: tuple[float, float]) -> None:
        from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

        q, k, v = (draw(1, heads, 7, 20, seed=heads + i) for i, heads in enumerate((6, 2, 2)))
        mask = torch.full((7, 7), -1e30, dtype=F64).triu(1)[None, None]
        attention = model().model.layers[0].self_attn
        with promoted(dtype), torch.no_grad():
            found, _ = eager_attention_forward(attention, q, k, v, mask, scaling=20**-0.5)
        keys, values = (np.repeat(x.numpy(), 3, axis=1) for x in (k, v))
        scores = q.numpy() @ keys.swapaxes(2, 3) / np.sqrt(20) + mask.numpy()
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = (weights / weights.sum(-1, keepdims=True) @ values).swapaxes(1, 2)
        assert within[0] <= error(found, expected) < within[1]

    @pytest.mark.parametrize("model_type", ["qwen3", "llama", "phi3", "gpt_neox"])
    def test_rope(self, model_type: str, dtype: torch.dtype, within: tuple[float, float]) -> None:
        base = model(model_type).base_model
        positions = torch.arange(300)[None]
        with promoted(dtype), torch.no_grad():
            cos, sin = base.rotary_emb(draw(1, 300, 8), positions)
        # The frequencies are float32 by definition: those are what the model was trained with.
        angles = positions[0, :, None].numpy() * base.rotary_emb.inv_freq.numpy().astype(np.float64)
        half = angles.shape[1]
        assert within[0] <= error(cos[0, :, :half], np.cos(angles)) < within[1]
        assert within[0] <= error(sin[0, :, half:], np.sin(angles)) < within[1]


def test_rotating_the_heads_too() -> None:
    """Tables and rotation together, against complex numbers."""
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    rotary = model().model.rotary_emb
    q = draw(1, 6, 50, 20)
    with promoted(F64):
        found, _ = apply_rotary_pos_emb(q, q, *rotary(q, torch.arange(50)[None]))
    x = q[0, :, :, :10].numpy() + 1j * q[0, :, :, 10:].numpy()
    turned = x * np.exp(1j * np.arange(50)[:, None] * rotary.inv_freq.numpy().astype(np.float64))
    assert error(found[0], np.concatenate([turned.real, turned.imag], -1)) < EXACT


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_only_float64_promotes(dtype: torch.dtype) -> None:
    with promoted(dtype):
        assert torch.ones(3, dtype=F64).to(torch.float32).dtype is torch.float32
        assert torch.ones(3, dtype=F64).float().dtype is torch.float32


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_promotion_ends_with_its_block_and_leaves_integers_alone(dtype: torch.dtype) -> None:
    wide = torch.ones(3, dtype=F64)
    with promoted(F64):
        assert wide.to(dtype).dtype is F64
        assert torch.softmax(wide, -1, dtype=dtype).dtype is F64
        assert torch.zeros(2, dtype=dtype).dtype is F64
        assert wide.long().dtype is torch.int64
        assert wide.bool().dtype is torch.bool
        assert torch.arange(3).dtype is torch.int64
    assert wide.to(dtype).dtype is dtype
    with pytest.raises(ZeroDivisionError), promoted(F64):
        _ = 1 / 0
    assert wide.to(dtype).dtype is dtype, "after an error too"


def test_promotion_hears_every_spelling_of_a_cast() -> None:
    frequencies, wide = torch.rand(5, generator=torch.Generator().manual_seed(2)), draw(5, 3)
    exact = frequencies.double() @ wide
    with promoted(F64):
        # Of a float32 tensor, .float() is no operation at all, and a list of numbers has no dtype of its own.
        assert torch.equal(frequencies.float() @ wide, exact)
        assert torch.equal(frequencies[None].expand(2, 5).to(torch.float32)[0] @ wide.to(wide.dtype), exact)
        assert torch.equal(torch.cat([frequencies, wide[:, 0]]), torch.cat([frequencies.double(), wide[:, 0]]))
        assert torch.tensor([0.1]).dtype is F64
        assert torch.zeros(2).dtype is F64
        assert (torch.arange(3) / 3).dtype is F64
        assert torch.polar(frequencies, frequencies).dtype is torch.complex128
        assert torch.zeros(2, dtype=torch.complex64).dtype is torch.complex128
    assert torch.zeros(2).dtype is torch.float32


@pytest.mark.parametrize(
    ("working", "truth"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_the_truth_is_wider_than_what_it_judges(working: torch.dtype, truth: torch.dtype) -> None:
    assert truth_dtype(working) is truth


@pytest.mark.parametrize("dtype", PRECISION_BITS, ids=str)
def test_unit_roundoff_is_half_the_epsilon_of_torch(dtype: torch.dtype) -> None:
    assert unit_roundoff(dtype) == torch.finfo(dtype).eps / 2


# -- jitter --------------------------------------------------------------------------------------------------


def ulp(value: Tensor, working: torch.dtype) -> Tensor:
    """Distance to the next larger number of `working` in magnitude, for numbers that `working` has."""
    narrow = value.abs().to(working)
    return (torch.nextafter(narrow, torch.full_like(narrow, torch.inf)).double() - narrow.double()).abs()


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("working", [torch.bfloat16, torch.float16], ids=str)
def test_jitter_stays_within_half_a_unit_and_uses_it(working: torch.dtype) -> None:
    # Kept off subnormals, whose units are wider than their exponent says.
    value = torch.cat([draw(5000), draw(5000, scale=50)]).to(working)
    value = value[value.abs() > 1e-4].float()
    moved = jittered(value, working, generator()).double() - value.double()
    share = moved / ulp(value, working)
    assert share.abs().max() <= 0.5 * (1 + 1e-4)
    assert share.abs().max() > 0.49
    # Uniform over ±½: mean 0, variance 1/12.
    assert abs(float(share.mean())) < 0.02
    assert float(share.var()) == pytest.approx(1 / 12, rel=0.05)


@pytest.mark.parametrize("working", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_jittered_numbers_round_back(working: torch.dtype) -> None:
    value = draw(4000).to(working)
    wide = value.to(truth_dtype(working))
    back = jittered(wide, working, generator()).to(working)
    # A draw of exactly half a unit is a tie, and powers of two have a finer unit below them: both are rare.
    assert float((back == value).float().mean()) > 0.995


def test_zero_stays_zero_and_signs_stay() -> None:
    value = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-120, -(2.0**100)])
    moved = jittered(value, torch.bfloat16, generator())
    assert torch.equal(moved[:2], torch.zeros(2))
    assert torch.equal(moved.sign(), value.sign())


def test_jitter_is_the_same_for_the_same_seed_only() -> None:
    value = draw(100).float()
    first, again = (jittered(value, torch.bfloat16, generator(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, jittered(value, torch.bfloat16, generator(2)))
    assert first.dtype is torch.float32


def test_jitter_leaves_its_argument_and_what_is_not_finite_alone() -> None:
    value = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan])
    kept = value.clone()
    moved = jittered(value, torch.bfloat16, generator())
    assert torch.equal(value.nan_to_num(7), kept.nan_to_num(7))
    assert not moved[1:].isfinite().any()


@given(st.integers(-60, 60), st.floats(1, 2, exclude_max=True))
def test_jitter_scales_with_powers_of_two(exponent: int, mantissa: float) -> None:
    value = torch.full((20,), mantissa, dtype=F64)
    one = jittered(value, torch.bfloat16, generator())
    other = jittered(value * 2.0**exponent, torch.bfloat16, generator())
    assert torch.equal(one * 2.0**exponent, other)


def test_stochastic_rounding_is_unbiased_and_lands_on_the_grid() -> None:
    value = torch.full((20000,), 1.0 + 0.3 * 2.0**-7, dtype=torch.float32)
    rounded = stochastically_rounded(value, torch.bfloat16, torch.Generator().manual_seed(1))
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}, "the two neighbours in bfloat16"
    assert float(rounded.mean()) == pytest.approx(1.0 + 0.3 * 2.0**-7, abs=2e-4)
    exact = torch.tensor([0.0, -2.0, 0.5, float("inf")])
    same = stochastically_rounded(exact, torch.bfloat16, torch.Generator().manual_seed(1))
    assert torch.equal(same, exact), "what bfloat16 has already stays"
