"""One line a site makes a port in Python a candidate, whatever its arrays are."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import parity
from parity.errors import DumpError, UsageError

jax_is_there = pytest.mark.skipif(find_spec("jax") is None, reason="jax is not installed")
mlx_is_there = pytest.mark.skipif(find_spec("mlx") is None, reason="mlx is not installed")
NUMBERS = np.arange(6, dtype=np.float32).reshape(1, 2, 3) / 3


def recorded(value: Any, path: Path) -> Any:
    with parity.recording(path, [[1, 2]]):
        assert parity.tap("model.norm", value) is value
    with parity.open_dump(path) as dump:
        assert dump.info.token_ids == ((1, 2),)
        return dump.read("model.norm")


def test_outside_of_a_recording_a_tap_does_nothing(tmp_path: Path) -> None:
    recorded(NUMBERS, tmp_path / "port.h5")
    assert parity.tap("model.norm", NUMBERS) is NUMBERS
    assert parity.tap("model.norm", "anything") == "anything"


def test_numpy_and_torch_are_kept_bit_by_bit(tmp_path: Path) -> None:
    half = torch.from_numpy(NUMBERS).bfloat16()
    assert np.array_equal(recorded(NUMBERS, tmp_path / "numpy.h5"), NUMBERS)
    read = recorded(half, tmp_path / "torch.h5")
    assert np.array_equal(read.astype(ml_dtypes.bfloat16), NUMBERS.astype(ml_dtypes.bfloat16))


def test_what_is_overwritten_later_is_kept_as_it_was(tmp_path: Path) -> None:
    value = torch.from_numpy(NUMBERS.copy())
    with parity.recording(tmp_path / "port.h5", [[1, 2]]):
        parity.tap("model.norm", value).zero_()
    with parity.open_dump(tmp_path / "port.h5") as dump:
        assert np.array_equal(dump.read("model.norm"), NUMBERS)


def test_axes_are_those_of_the_family(tmp_path: Path) -> None:
    dims = {"model.layers.*.self_attn.q_rope": "batch token head head_dim"}
    with parity.recording(tmp_path / "port.h5", [[1, 2]], dims):
        parity.tap("model.layers.3.self_attn.q_rope", np.zeros((1, 2, 2, 4), np.float32))
    with parity.open_dump(tmp_path / "port.h5") as dump:
        assert dump.entries["model.layers.3.self_attn.q_rope"].dims == ("batch", "token", "head", "head_dim")


def tap_all(path: Path, *values: Any) -> None:
    with parity.recording(path, [[1, 2]]):
        for value in values:
            parity.tap("model.norm", value)


def test_a_site_twice_and_no_array_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match="recorded twice"):
        tap_all(tmp_path / "a.h5", NUMBERS, NUMBERS)
    with pytest.raises(UsageError, match=r"'model\.norm' is object\. Tap an array"):
        tap_all(tmp_path / "b.h5", object())
    with pytest.raises(UsageError, match="'x' is tapped twice"):
        parity.with_taps(lambda: (parity.tap("x", 1), parity.tap("x", 2)))()


def test_a_function_returns_what_it_taps_beside_its_result() -> None:
    def double(x: int) -> int:
        return parity.tap("doubled", 2 * x)

    assert parity.with_taps(double)(4) == (8, {"doubled": 8})


@jax_is_there
def test_jax_is_pure_under_jit(tmp_path: Path) -> None:
    import jax
    import jax.numpy as jnp

    def norm(x: Any) -> Any:
        return parity.tap("model.norm", x / jnp.linalg.norm(x, axis=-1, keepdims=True))

    result, values = jax.jit(parity.with_taps(norm))(NUMBERS.astype(ml_dtypes.bfloat16))
    assert np.array_equal(recorded(values["model.norm"], tmp_path / "port.h5"), np.asarray(result))
    with pytest.raises(UsageError, match="tapped while JAX traces"), parity.recording(tmp_path / "no.h5", [[1, 2]]):
        jax.jit(lambda x: norm(x))(NUMBERS)


@mlx_is_there
def test_mlx_keeps_its_bits(tmp_path: Path) -> None:
    import mlx.core as mx

    read = recorded(mx.array(NUMBERS).astype(mx.bfloat16), tmp_path / "port.h5")
    assert np.array_equal(read.astype(ml_dtypes.bfloat16), NUMBERS.astype(ml_dtypes.bfloat16))


def test_a_port_with_taps_matches_and_a_wrong_one_is_found(small: Path, tmp_path: Path) -> None:
    from impl.qwen3_numpy import Config, Qwen3, read_weights

    ids, heads = np.array([[5, 17, 3, 9, 250]]), "batch token head head_dim"
    port = Qwen3(Config.read(small / "config.json"), read_weights(small))
    dims = {f"model.layers.*.self_attn.{name}": heads for name in ("q_norm", "k_norm", "q_rope", "k_rope", "context")}
    for name, scale in (("right.h5", 1.0), ("wrong.h5", 1.01)):
        with parity.recording(tmp_path / name, ids, dims):
            for site, value in port.forward(ids).items():
                parity.tap(site, value * np.float32(scale if site == "model.norm" else 1))
    options: dict[str, Any] = {"model": str(small), "dtype": "float32", "power": False}
    assert parity.diff(tmp_path / "right.h5", **options).verdict == "match"
    found = parity.diff(tmp_path / "wrong.h5", **options)
    assert (found.verdict, found.findings[0].sites) == ("diverged", ("model.norm",))
