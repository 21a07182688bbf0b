"""A candidate's own weights, as its runtime stores them, are read back to the last bit, and damage is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import parity
from impl.qwen3 import load
from parity.errors import ModelError
from parity.quantization import WeightError
from parity.reference.checkpoint import Weights, find
from parity.reference.grids import Grid
from parity.reference.mlx_weights import MlxWeights
from parity.reference.weight_error import weight_errors
from tests import architectures, checkpoints
from tests.conftest import slow_but
from tests.quantized_tensor import Int8

GATE = "model.layers.1.mlp.gate_proj"
TOKENS = "5 17 80 3 44 201 9 9 130 77 62 250 11"
Parts = dict[str, Tensor]
Damage = Callable[[Parts], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32}
    path = tmp_path_factory.mktemp("own") / "model"
    return checkpoints.qwen3(path, layers=2, dtype="float32", num_key_value_heads=1, **sizes)


def beside(model: Path, weights: Weights) -> dict[str, WeightError]:
    return {e.tensor: e for e in weight_errors(replace(find(str(model)), weights=weights))}


def bad(errors: dict[str, WeightError]) -> dict[str, str]:
    return {name: e.how for name, e in errors.items() if e.ratio is None or e.ratio > 1}


# -- MLX -----------------------------------------------------------------------------------------------------------


def write_mlx(model: Path, out: Path, bits: int, group: int = 32, damage: Damage | None = None) -> Parts:
    """A checkpoint as mlx_lm writes it; its numbers as they are to be read back. `damage` is done to GATE's parts."""
    stored, read = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if tensor.dim() != 2:
            stored[name] = read[name] = tensor
            continue
        blocks = tensor.double().reshape(len(tensor), -1, group)
        low, high = blocks.amin(-1), blocks.amax(-1)
        parts = {"scales": ((high - low) / (2**bits - 1)).float(), "biases": low.float()}
        whole = ((blocks - parts["biases"][..., None]) / parts["scales"][..., None]).round().clamp(0, 2**bits - 1)
        parts["whole"] = whole.long()
        if damage and name == f"{GATE}.weight":
            damage(parts)
        numbers = parts["whole"].float() * parts["scales"][..., None] + parts["biases"][..., None]
        read[name] = numbers.reshape(tensor.shape)
        module = name.removesuffix(".weight")
        stored |= {name: packed(parts["whole"].reshape(tensor.shape), bits)}
        stored |= {f"{module}.{end}": parts[end] for end in ("scales", "biases")}
    out.mkdir(exist_ok=True)
    save_file(stored, out / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    config["quantization"] = {"group_size": group, "bits": bits, "mode": "affine"}
    (out / "config.json").write_text(json.dumps(config))
    return read


def packed(whole: Tensor, bits: int) -> Tensor:
    """Integers (row, column) in uint32, one after another from the lowest bit on."""
    rows = [sum(int(x) << bits * i for i, x in enumerate(row)) for row in whole]
    words = [[number >> 32 * i & 0xFFFFFFFF for i in range(whole.shape[1] * bits // 32)] for number in rows]
    return torch.from_numpy(np.array(words, dtype=np.uint32))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_is_read_back_to_the_last_bit(bits: int, model: Path, tmp_path: Path) -> None:
    expected = write_mlx(model, tmp_path, bits)
    weights = MlxWeights(tmp_path)
    assert all(
        torch.equal(read, numbers) for name, numbers in expected.items() if (read := weights.tensor(name)) is not None
    )
    found = beside(model, weights)
    assert len(found) == len(expected) == 25
    assert (bad(found), found[f"{GATE}.weight"].format) == ({}, f"int{bits}/32")
    assert found["model.norm.weight"].format == "F32"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlx") is None, reason="mlx is not installed")
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_it_is_what_mlx_reads(bits: int, model: Path, tmp_path: Path) -> None:
    import mlx.core as mx

    weight = find(str(model)).tensor(f"{GATE}.weight")
    parts = mx.quantize(mx.array(weight.numpy()), group_size=32, bits=bits)
    names = [f"{GATE}.{end}" for end in ("weight", "scales", "biases")]
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(zip(names, parts, strict=True)))
    (tmp_path / "config.json").write_text(json.dumps({"quantization": {"group_size": 32, "bits": bits}}))
    theirs = mx.dequantize(*parts, group_size=32, bits=bits)
    read = MlxWeights(tmp_path).tensor(f"{GATE}.weight")
    assert read is not None
    assert np.array_equal(read.numpy(), np.array(theirs))


def doubled(parts: Parts) -> None:
    parts["scales"][3, 1] *= 2
    parts["biases"][3, 1] *= 2


def blocks_exchanged(parts: Parts) -> None:
    for part in parts.values():
        part[3] = part[3].flip(0)


def rows_exchanged(parts: Parts) -> None:
    for part in parts.values():
        part[[3, 7]] = part[[7, 3]]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (doubled, "the scale of block 1 of row 3 is 2 times too large; wrong are 1 of 192 blocks, in 1 of 96 rows"),
        (blocks_exchanged, "block 0 of row 3 holds block 1; wrong are 2 of 192 blocks"),
        (rows_exchanged, "row 3 holds row 7; wrong are 4 of 192 blocks, in 2 of 96 rows"),
    ],
)
def test_what_was_done_to_a_tensor_of_mlx_is_told(damage: Damage, said: str, model: Path, tmp_path: Path) -> None:
    write_mlx(model, tmp_path, 4, damage=damage)
    found = bad(beside(model, MlxWeights(tmp_path)))
    assert list(found) == [f"{GATE}.weight"]
    assert said in found[f"{GATE}.weight"]


@pytest.mark.parametrize(
    ("said", "about"),
    [
        ({"mode": "mxfp4", "bits": 4, "group_size": 32}, "kept in mode 'mxfp4', bits 4, group 32, which is not read"),
        ({"bits": 4, "group_size": 64}, "which are not 4 bits by 64, as config.json says"),
        ({"bits": "4", "group_size": 64}, "bits '4', group 64, which is not read"),
        (None, "bits None, group None, which is not read"),
    ],
)
def test_another_layout_of_mlx_is_refused(said: Any, about: str, model: Path, tmp_path: Path) -> None:
    write_mlx(model, tmp_path, 4)
    (tmp_path / "config.json").write_text(json.dumps({"quantization": said}))
    with pytest.raises(ModelError, match=about):
        MlxWeights(tmp_path).tensor(f"{GATE}.weight")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json with \*\.safetensors"):
        MlxWeights(tmp_path)


@pytest.mark.slow
def test_a_port_of_mlx_is_judged_on_its_own_weights(model: Path, tmp_path: Path) -> None:
    port = load(model, "float32")
    port.load_state_dict(write_mlx(model, tmp_path, 4))
    found = parity.diff(port, model=str(model), tokens=TOKENS, power=False, weights=f"mlx:{tmp_path}")
    assert (found.verdict, found.findings) == ("match", ())
    assert {e.format for e in found.weights} == {"int4/32", "F32"}
    weights = next(check for check in found.checks if check.name == "candidate weights")
    assert weights.detail == f"25 tensors equal to mlx:{tmp_path}"


# -- ONNX ----------------------------------------------------------------------------------------------------------

onnx_installed = pytest.mark.skipif(find_spec("onnx") is None, reason="onnx is not installed")


def graph_of(weight: np.ndarray[Any, Any], out: Path, kind: str) -> np.ndarray[Any, Any]:
    """Write a graph of one product with GATE's weight (out, in), and return that as it is to be read back."""
    import onnx
    from onnx import helper, numpy_helper

    bits, _, by = kind.removeprefix("int").partition("/")
    nodes: list[Any]
    if bits == "4":
        blocks = weight.reshape(len(weight), -1, int(by))
        scale = (blocks.max(-1) - blocks.min(-1)) / 15
        zero = np.round(-blocks.min(-1) / scale)
        whole = np.clip(np.round(blocks / scale[..., None]) + zero[..., None], 0, 15)
        read = ((whole - zero[..., None]) * scale[..., None]).reshape(weight.shape)
        halves = whole.astype(np.uint8)
        pairs = zero.astype(np.uint8)
        stored = {
            "w": halves[..., ::2] | halves[..., 1::2] << 4,
            "s": scale.astype(np.float32),
            "z": pairs[:, ::2] | pairs[:, 1::2] << 4,
        }
        said = {"K": weight.shape[1], "N": weight.shape[0], "bits": 4, "block_size": int(by)}
        nodes = [helper.make_node("MatMulNBits", ["x", "w", "s", "z"], ["y"], domain="com.microsoft", **said)]
    else:
        scale = np.abs(weight).max(1 if by == "row" else None, keepdims=True).astype(np.float32) / np.float32(127)
        whole = np.round(weight / scale)
        read = whole.astype(np.float32) * scale
        stored = {"w": whole.T.astype(np.int8), "s": scale.reshape(-1 if by == "row" else ()), "z": np.int8(0)}
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"]),
            helper.make_node("Mul", ["qs", "s"], ["both"]),
            helper.make_node("MatMulInteger", ["q", "w", "qz", "z"], ["sums"]),
            helper.make_node("Cast", ["sums"], ["floats"], to=1),
            helper.make_node("Mul", ["floats", "both"], ["y"]),
        ]
    note = nodes[-1].metadata_props.add()
    note.key, note.value = "pkg.torch.onnx.name_scopes", f"['', 'inner', 'inner.{GATE}', 'linear']"
    kept = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], kept)), out)
    return read


@onnx_installed
@pytest.mark.parametrize("kind", ["int8/row", "int8/all", "int4/32"])
def test_onnx_is_read_back(kind: str, model: Path, tmp_path: Path) -> None:
    from parity.reference.onnx_weights import OnnxWeights

    weight = find(str(model)).tensor(f"{GATE}.weight").numpy()
    expected = graph_of(weight, tmp_path / "x.onnx", kind)
    weights = OnnxWeights(tmp_path / "x.onnx")
    read = weights.tensor(f"{GATE}.weight")
    assert read is not None
    assert np.allclose(read.numpy(), expected, rtol=1e-6, atol=0)
    found = beside(model, weights)
    assert [(e.tensor, e.format, bad(found)) for e in found.values()] == [(f"{GATE}.weight", kind, {})]


def test_a_last_block_need_not_be_whole() -> None:
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    grid = Grid(16, 15, ranged=True)
    assert grid.blocks(rows).shape == (3, 3, 16)
    assert torch.equal(grid.may_be_off(rows)[:, :2], grid.may_be_off(rows[:, :32]))
    assert bool((grid.may_be_off(rows)[:, 2] > 0).all())


@onnx_installed
@pytest.mark.parametrize("kind", ["int8/row", "int8/all", "int4/32"])
def test_a_wrong_scale_in_onnx_is_told(kind: str, model: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    from parity.reference.onnx_weights import OnnxWeights

    graph_of(find(str(model)).tensor(f"{GATE}.weight").numpy(), tmp_path / "x.onnx", kind)
    loaded = onnx.load(tmp_path / "x.onnx")
    (scale,) = (x for x in loaded.graph.initializer if x.name == "s")
    wrong = numpy_helper.to_array(scale).copy()
    wrong[(3, 1) if wrong.ndim == 2 else slice(3, 4) if wrong.ndim else ...] *= 2
    scale.CopyFrom(numpy_helper.from_array(wrong, "s"))
    onnx.save(loaded, tmp_path / "x.onnx")
    how = bad(beside(model, OnnxWeights(tmp_path / "x.onnx")))[f"{GATE}.weight"]
    row, block = (0, 0) if kind == "int8/all" else (3, 0 if kind == "int8/row" else 1)
    assert f"the scale of block {block} of row {row} is 2 times too large" in how


@onnx_installed
def test_a_graph_without_names_is_refused(model: Path, tmp_path: Path) -> None:
    import onnx

    from parity.reference.onnx_weights import OnnxWeights

    graph_of(find(str(model)).tensor(f"{GATE}.weight").numpy(), tmp_path / "x.onnx", "int8/row")
    loaded = onnx.load(tmp_path / "x.onnx")
    del loaded.graph.node[-1].metadata_props[:]
    onnx.save(loaded, tmp_path / "y.onnx")
    with pytest.raises(ModelError, match=r"no product says which module made it\. .*\?names_from=FILE"):
        OnnxWeights(tmp_path / "y.onnx")
    assert OnnxWeights(tmp_path / "y.onnx", tmp_path / "x.onnx").format(f"{GATE}.weight") == "int8/row"


# -- GGUF of more architectures ------------------------------------------------------------------------------------

gguf_installed = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")
OTHERS = ("llama", "mistral", "gemma", "gemma2", "gemma3", "nemotron", "phi3", "qwen2", "starcoder2")


@gguf_installed
@pytest.mark.parametrize("name", slow_but(["llama", "gemma2"], OTHERS))
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_what_the_converter_changes_is_changed_back(name: str, kind: str, tmp_path: Path) -> None:
    from parity.reference.gguf_weights import GgufWeights
    from tests.gguf_of import write

    made = architectures.make(name, tmp_path / "model")
    weights = GgufWeights(write(made, tmp_path / "model.gguf", kind))
    stored = load_file(made / "model.safetensors")
    found = beside(made, weights)
    assert (found.keys(), bad(found)) == (stored.keys(), {})
    if kind == "F32":  # 1 + w - 1 has lost the bits of w below those of 1
        assert all(
            torch.allclose(w, t, rtol=0, atol=2**-23) for n, t in stored.items() if (w := weights.tensor(n)) is not None
        )


@gguf_installed
def test_rows_that_were_not_paired_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parity.reference.gguf_weights import GgufWeights
    from tests import gguf_of

    monkeypatch.setattr(gguf_of, "paired", lambda rows, _heads: rows)
    made = architectures.make("llama", tmp_path / "model")
    found = bad(beside(made, GgufWeights(gguf_of.write(made, tmp_path / "model.gguf", "Q8_0"))))
    assert {name.split(".")[-2] for name in found} == {"q_proj", "k_proj"}


# -- a live module -------------------------------------------------------------------------------------------------


def live(model: Path, factor: float = 1.0) -> Any:
    port = load(model, "float32")
    for module in port.modules():
        if isinstance(module, torch.nn.Linear):
            weight = Int8.of(module.weight.detach())
            module._parameters["weight"] = weight
    port.get_submodule(GATE)._parameters["weight"] = Int8.of(
        port.get_submodule(GATE).weight.dequantize(), factor=factor
    )
    return port


def test_a_module_that_a_library_has_quantized_is_judged_on_its_own_weights(model: Path) -> None:
    found = parity.diff(live(model), model=str(model), tokens=TOKENS, power=False)
    assert (found.verdict, found.findings) == ("match", ())
    assert {e.format for e in found.weights} == {"int8/row"}
    assert len(found.weights) == 15
    weights = next(check for check in found.checks if check.name == "candidate weights")
    assert (weights.ok, weights.detail) == (True, "10 tensors equal to the checkpoint, 15 quantized")


def test_a_wrong_scale_of_a_quantized_module_is_told(model: Path) -> None:
    found = parity.diff(live(model, 1.5), model=str(model), tokens=TOKENS, power=False)
    assert found.verdict == "diverged"
    assert [finding.sites for finding in found.findings] == [(GATE,)]
    assert "the scale of block 0 of row 0 is 1.5 times too large" in found.findings[0].evidence[0]
