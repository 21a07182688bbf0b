"""ONNX Runtime as the candidate: exports match, what is wrong in a graph is named, trouble is one line."""

from __future__ import annotations

import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import parity
from parity.engine_report import Contrast
from parity.engines.contrast import contrast
from parity.errors import CandidateError
from parity.observer import Observer
from parity.options import RunOptions
from parity.results import Comparison
from tests.conftest import slow_but
from tests.gguf_file import write_gguf
from tests.onnx_file import changed, export, with_eps, with_sum_in_norm, with_theta, without_metadata

missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
engine = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
genai = pytest.mark.skipif(find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed")


@pytest.fixture(scope="module")
def small(checkpoint: Any) -> Path:
    path: Path = checkpoint("qwen3", layers=1)
    return path


@pytest.fixture(scope="module")
def exported(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once, for an export takes ten seconds."""
    return export(small, tmp_path_factory.mktemp("onnx") / "model.onnx")


def diff(file: Path, model: Path, query: str = "", tokens: int = 24, rows: int = 1) -> Comparison:
    draw, path = random.Random(tokens), model.parent / f"ids-{rows}-{tokens}.txt"
    path.write_text("".join(" ".join(str(draw.randrange(301)) for _ in range(tokens)) + "\n" for _ in range(rows)))
    return parity.diff(f"onnx:{file}{query}", model=str(model), tokens=str(path), power=False)


def bad(found: Comparison) -> set[str]:
    return {site.site.rpartition(".")[2] for site in found.sites if site.verdict in ("wrong", "imprecise", "nonfinite")}


def named(found: Comparison) -> set[str]:
    return {finding.fault.id for finding in found.findings if finding.fault}


RUNS = {
    "1 token": (1, 1),
    "48 tokens": (1, 48),
    "2 tokens": (1, 2),
    "3 tokens": (1, 3),
    "7 tokens, 3 rows": (3, 7),
    "6 tokens, as many as heads": (1, 6),
    "20 tokens, as many as a head has numbers": (1, 20),
    "80 tokens, as many as hidden numbers": (1, 80),
    "130 tokens": (1, 130),
    "300 tokens": (1, 300),
}


@engine
@pytest.mark.slow
def test_an_export_matches_at_every_site(exported: Path, small: Path) -> None:
    found = diff(exported, small)
    assert (found.verdict, found.findings, found.coverage.measured) == ("match", (), 21)
    checks = {check.name: check.detail for check in found.checks}
    assert checks["runtime"].startswith("onnxruntime ")
    assert checks["run without taps"] == "logits with and without taps are bit-equal"


@engine
@pytest.mark.parametrize("run", slow_but([], RUNS))
def test_it_matches_on_every_prompt(run: str, exported: Path, small: Path) -> None:
    rows, tokens = RUNS[run]
    found = diff(exported, small, tokens=tokens, rows=rows)
    assert (found.verdict, found.findings, found.coverage.measured) == ("match", (), 21)


@engine
@pytest.mark.parametrize("kind", slow_but([], ["head shared with the embedding", "opset 23, sdpa", "float16"]))
def test_other_exports_match(kind: str, checkpoint: Any, tmp_path: Path) -> None:
    import torch

    model = checkpoint("qwen3", layers=1, tied=kind.startswith("head"))
    options: dict[str, Any] = {"opset_version": 23} if "23" in kind else {}
    dtype = torch.float16 if kind == "float16" else torch.float32
    found = diff(export(model, tmp_path / "model.onnx", dtype, **options), model)
    assert (found.verdict, found.coverage.measured) == ("match", 21)
    assert found.environment.working_dtype == str(dtype).removeprefix("torch.")


@engine
@pytest.mark.slow
def test_a_wrong_rope_base_in_the_file_is_named(exported: Path, small: Path, tmp_path: Path) -> None:
    found = diff(changed(exported, tmp_path / "theta.onnx", lambda model: with_theta(model, 10000.0)), small)
    assert (found.verdict, bad(found), named(found)) == ("diverged", {"q_rope", "k_rope"}, {"rope-theta"})


@engine
@pytest.mark.slow
def test_a_wrong_eps_in_the_file_is_named(exported: Path, small: Path, tmp_path: Path) -> None:
    found = diff(changed(exported, tmp_path / "eps.onnx", lambda model: with_eps(model, 1e-5)), small)
    assert (found.verdict, named(found)) == ("diverged", {"norm-eps"})


@engine
@pytest.mark.slow
def test_int8_is_seen_in_the_products_by_the_names_of_its_export(exported: Path, small: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(exported, tmp_path / "int8.onnx", op_types_to_quantize=["MatMul"])
    found = diff(tmp_path / "int8.onnx", small, f"?names_from={exported}")
    assert (found.verdict, found.coverage.measured) == ("diverged", 21)
    assert bad(found) == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")} | {"lm_head"}
    with pytest.raises(CandidateError, match=r"all fit model\.layers\.0\. .*\?names_from=FILE"):
        diff(tmp_path / "int8.onnx", small)


@engine
@pytest.mark.slow
def test_int8_matches_on_its_own_weights_in_the_regime_of_its_inputs(
    exported: Path, small: Path, tmp_path: Path
) -> None:
    from onnxruntime.quantization import quantize_dynamic

    # One bit less, for without VNNI the sums of pairs of ONNX Runtime saturate.
    quantize_dynamic(exported, tmp_path / "int8.onnx", op_types_to_quantize=["MatMul"], reduce_range=True)
    spec = f"onnx:{tmp_path / 'int8.onnx'}?names_from={exported}"
    draw = random.Random(5)
    ids = " ".join(str(draw.randrange(301)) for _ in range(16))
    found = parity.diff(spec, model=str(small), tokens=ids, power=False, accept="products-uint8-inputs")
    assert (found.verdict, found.findings) == ("match", ())
    assert {error.format for error in found.weights} == {"F32", "int8/all"}
    assert {finding.fault.id for finding in found.accepted if finding.fault} == {"products-uint8-inputs"}


@engine
@pytest.mark.slow
@pytest.mark.parametrize("symmetric", slow_but([], [True, False]))
def test_blocks_of_4_bits_match_on_their_own_weights(
    symmetric: bool, exported: Path, small: Path, tmp_path: Path
) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(exported), bits=4, block_size=16, is_symmetric=symmetric)
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "q4.onnx"))
    found = diff(tmp_path / "q4.onnx", small, f"?names_from={exported}")
    assert (found.verdict, found.findings) == ("match", ())
    assert {error.format for error in found.weights} == {"F32", "int4/16"}


@engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_metadata, r"no node of the graph says that module 'model\.embed_tokens' made it\. Export with torch"),
        (with_sum_in_norm, r"values \w+, \w+ of the graph all fit model\.layers\.0\. "),
    ],
)
def test_a_graph_that_leaves_open_what_is_what_is_refused(
    change: Any, said: str, exported: Path, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(CandidateError, match=said):
        diff(changed(exported, tmp_path / "changed.onnx", change), small)


@genai
@engine
@pytest.mark.slow
def test_a_graph_of_genai_matches(checkpoint: Any, tiny: Path, tmp_path: Path) -> None:
    from onnxruntime_genai.models.builder import create_model

    model = checkpoint("qwen3", layers=2, head_dim=32)  # its kernel wants a multiple of 16
    source = tmp_path / "source"
    shutil.copytree(model, source)
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, source)
    create_model(None, str(source), str(tmp_path / "genai"), "fp32", "cpu", str(tmp_path / "cache"))
    found = diff(tmp_path / "genai" / "model.onnx", model)
    assert (found.verdict, found.coverage.measured) == ("match", 37)
    gaps = {site.site: site.gap.kind for site in found.sites if site.gap is not None}
    assert gaps == {f"model.layers.{n}.self_attn.q_rope": "not observable" for n in range(2)}


def test_what_is_wrong_with_a_spec_is_said(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"")
    with pytest.raises(CandidateError, match=r"no option 'opt'\. It has names_from, python\."):
        diff(file, small, "?opt=all")
    with pytest.raises(CandidateError, match="no such file"):
        diff(tmp_path / "none.onnx", small)


@engine
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.slow
def test_llama_cpp_and_onnx_runtime_stand_side_by_side(checkpoint: Any, tmp_path: Path) -> None:
    small: Path = checkpoint("qwen3", layers=2)
    exported = export(small, tmp_path / "model.onnx")
    files = {"llama": write_gguf(small, tmp_path / "right.gguf")}
    files["other"] = write_gguf(small, tmp_path / "other.gguf", qwen3__rope__freq_base=10000.0)
    engines = {name: f"gguf:{file}" for name, file in files.items()} | {"onnx": f"onnx:{exported}"}
    run = {"model": str(small), "tokens": " ".join(str(37 * i % 301) for i in range(24)), "dtype": "float32"}
    for name, spec in engines.items():
        done = parity.record(tmp_path / f"{name}.h5", spec, **run)
        assert done.missing == (() if name == "onnx" else tuple(f"model.layers.{n}.mlp.act_fn" for n in (0, 1)))
    assert not list(tmp_path.glob("*.npz")), "what a runtime leaves beside its dump"

    def beside(first: str, second: str) -> Contrast:
        dumps = (tmp_path / f"{first}.h5", tmp_path / f"{second}.h5")
        return contrast(dumps, None, RunOptions(model=str(small), power=False), "", Observer())

    right = beside("llama", "onnx")
    assert (right.verdict, right.agreeing, right.positions) == ("match", 24, 24)
    assert right.engines == (f"{engines['llama']}?kv=f32&fa=off", engines["onnx"])
    measured = {d.site: d for d in right.distances}
    assert len(measured) == 37
    # As far apart as two that round apart, and each explained by its own rounding.
    assert max(d.ratio for d in right.distances) < 3
    assert not measured["lm_head"].bit_equal
    wrong = beside("other", "onnx")
    assert (wrong.first.verdict, wrong.second.verdict) == ("diverged", "match")
    assert {f.fault.id for f in wrong.first.findings if f.fault} == {"rope-theta"}
    assert {d.site: d.ratio for d in wrong.distances}["model.layers.0.self_attn.q_rope"] > 1000
