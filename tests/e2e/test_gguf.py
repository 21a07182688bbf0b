"""llama.cpp itself as the candidate: correct files match, what is wrong in one is named, trouble is one line."""

from __future__ import annotations

import random
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from parity.errors import CandidateError
from parity.results import Comparison
from tests.conftest import slow_but
from tests.gguf_file import write_gguf

engine = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


def diff(file: Path, model: Path, query: str = "", tokens: int = 24, rows: int = 1) -> Comparison:
    draw = random.Random(tokens)
    path = file.with_name("ids.txt")
    path.write_text("".join(" ".join(str(draw.randrange(301)) for _ in range(tokens)) + "\n" for _ in range(rows)))
    return parity.diff(f"gguf:{file}{query}", model=str(model), tokens=str(path), power=False)


def checks(found: Comparison) -> dict[str, str]:
    return {check.name: check.detail for check in found.checks}


def bad(found: Comparison) -> set[str]:
    return {site.site.rpartition(".")[2] for site in found.sites if site.verdict in ("wrong", "imprecise", "nonfinite")}


RUNS: dict[str, tuple[dict[str, Any], int, int]] = {
    "1 token": ({}, 1, 1),
    "2 tokens": ({}, 1, 2),
    "7 tokens, 3 rows": ({}, 3, 7),
    "20 tokens, as many as a head has numbers": ({}, 1, 20),
    "48 tokens": ({}, 1, 48),
    "130 tokens": ({}, 1, 130),
    "300 tokens": ({}, 1, 300),
    "tied head": ({"tied": True, "dtype": "float32"}, 1, 33),
    "hidden 1024": ({"hidden_size": 1024, "head_dim": 64}, 1, 24),
    "one key head": ({"num_key_value_heads": 1}, 1, 17),
}


@engine
@pytest.mark.parametrize("run", slow_but(["1 token", "48 tokens"], RUNS))
def test_a_correct_file_matches(run: str, checkpoint: Any, tmp_path: Path) -> None:
    settings, rows, tokens = RUNS[run]
    model = checkpoint("qwen3", layers=2, **settings)
    found = diff(write_gguf(model, tmp_path / "model.gguf"), model, tokens=tokens, rows=rows)
    assert (found.verdict, found.findings) == ("match", ())
    assert found.environment.candidate.endswith("model.gguf?kv=f32&fa=off")
    assert checks(found)["run without taps"] == "logits with and without taps are bit-equal"
    gaps = {site.site: site.gap.kind for site in found.sites if site.gap is not None}
    assert gaps == {f"model.layers.{n}.mlp.act_fn": "not observable" for n in range(2)}


@engine
@pytest.mark.parametrize("query", ["?kv=f16", "?fa=on", "?kv=q8_0&fa=on"])
def test_attention_in_half_precision_is_seen_where_it_is(query: str, checkpoint: Any, tmp_path: Path) -> None:
    model = checkpoint("qwen3", layers=2, head_dim=32)  # blocks of q8_0 have 32 numbers
    found = diff(write_gguf(model, tmp_path / "model.gguf"), model, query)
    assert (found.verdict, bad(found)) == ("diverged", {"context"})


@engine
def test_a_wrong_rope_base_in_the_file_is_named(checkpoint: Any, tmp_path: Path) -> None:
    model = checkpoint("qwen3", layers=2)
    found = diff(write_gguf(model, tmp_path / "model.gguf", qwen3__rope__freq_base=10000.0), model)
    assert (found.verdict, bad(found)) == ("diverged", {"q_rope", "k_rope"})
    assert {finding.fault.id for finding in found.findings if finding.fault} == {"rope-theta"}


@engine
def test_a_wrong_eps_in_the_file_is_named(checkpoint: Any, tmp_path: Path) -> None:
    model = checkpoint("qwen3", layers=2)
    file = write_gguf(model, tmp_path / "model.gguf", qwen3__attention__layer_norm_rms_epsilon=1e-5)
    found = diff(file, model)
    assert found.verdict == "diverged"
    assert {finding.fault.id for finding in found.findings if finding.fault} == {"norm-eps"}


@engine
def test_rounded_weights_are_no_match(checkpoint: Any, tmp_path: Path) -> None:
    model = checkpoint("qwen3", layers=2, dtype="float32")
    found = diff(write_gguf(model, tmp_path / "model.gguf", "F16"), model)
    assert found.verdict == "diverged"
    assert {"q_proj", "down_proj", "lm_head"} <= bad(found)
    assert not {"q_norm", "q_rope", "context", "resid_mid"} & bad(found)


@engine
def test_what_llama_cpp_refuses_is_said_in_one_line(checkpoint: Any, tmp_path: Path) -> None:
    model = checkpoint("qwen3", layers=2)
    file = write_gguf(model, tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CandidateError, match=r"its runtime failed: llama\.cpp does not load .*model\.gguf: "):
        diff(file, model)


@engine
def test_another_architecture_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    model = checkpoint("qwen3", layers=2)
    file = write_gguf(model, tmp_path / "model.gguf")
    # The same length, so that nothing else in the file moves; the graph of qwen2moe wants tensors that are not there.
    file.write_bytes(file.read_bytes().replace(b"qwen3", b"qwen2"))
    with pytest.raises(
        CandidateError, match=r"its runtime failed: .*qwen2|its runtime failed: llama\.cpp does not load"
    ):
        diff(file, model)


# -- no engine is needed to say these ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?kv=f8", "kv='f8' is not one of f32, f16, q8_0."),
        ("?flash=on", "no option 'flash'. It has kv, fa, python."),
        ("?python=/nowhere/python", "python=/nowhere/python: No such file or directory."),
    ],
)
def test_what_is_wrong_with_a_spec_is_said(query: str, said: str, small: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(CandidateError) as error:
        diff(file, small, query)
    assert str(error.value).endswith(said)


def test_a_missing_file_is_said(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CandidateError, match="no such file"):
        diff(tmp_path / "model.gguf", small)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "its runtime crashed with SIGSEGV: it said nothing",
        ),
        ("import no_such_engine", "its runtime failed: ModuleNotFoundError: No module named 'no_such_engine'"),
    ],
)
def test_a_runtime_that_dies_is_one_line(
    program: str, said: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from parity.candidates import foreign

    (tmp_path / "run_gguf.py").write_text(program)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(foreign, "_PRODUCERS", tmp_path)
    with pytest.raises(CandidateError) as error:
        diff(tmp_path / "model.gguf", small, f"?python={sys.executable}")
    assert str(error.value).endswith(said)


def test_a_run_that_taps_change_is_no_match() -> None:
    from parity.candidates.tapping import tapping_check

    assert tapping_check(0.0, 2.0**-24, 39).ok
    assert tapping_check(7e-7, 2.0**-24, 39).ok
    assert not tapping_check(1.1e-2, 2.0**-24, 39).ok


# llama.cpp's own defaults are those of the second row.
HALF = {"?kv=f16": "attention-operands-fp16", "?kv=f16&fa=on": "attention-sums-fp16", "?fa=on": "attention-sums-fp16"}


@engine
@pytest.mark.parametrize(
    "run", slow_but([("?kv=f16&fa=on", 12)], [(query, tokens) for query in HALF for tokens in (12, 40)]), ids=str
)
def test_half_precision_is_named_and_with_accept_a_match(run: tuple[str, int], checkpoint: Any, tmp_path: Path) -> None:
    query, tokens = run
    model = checkpoint("qwen3", layers=2, head_dim=32, dtype="float32")
    file = write_gguf(model, tmp_path / "model.gguf")
    draw = random.Random(tokens)
    ids = " ".join(str(draw.randrange(301)) for _ in range(tokens))
    for accept, verdict in ((None, "diverged"), (HALF[query], "match")):
        found = parity.diff(f"gguf:{file}{query}", model=str(model), tokens=ids, power=False, accept=accept)
        assert (found.verdict, {f.fault.id for f in (*found.findings, *found.accepted) if f.fault}) == (
            verdict,
            {HALF[query]},
        )


@engine
@pytest.mark.slow
def test_a_cache_in_8_bits_is_named_and_with_accept_a_match(checkpoint: Any, tmp_path: Path) -> None:
    model = checkpoint("qwen3", layers=2, head_dim=32, dtype="float32")
    file, draw = write_gguf(model, tmp_path / "model.gguf"), random.Random(17)
    ids = " ".join(str(draw.randrange(301)) for _ in range(17))
    for accept, verdict in ((None, "diverged"), ("kv-cache-q8-0", "match")):
        spec = f"gguf:{file}?kv=q8_0&fa=on"
        found = parity.diff(spec, model=str(model), tokens=ids, power=False, accept=accept)
        named = {f.fault.id for f in (*found.findings, *found.accepted) if f.fault}
        assert (found.verdict, named) == (verdict, {"kv-cache-q8-0"})


# -- quantized files, judged on their own weights ------------------------------------------------------------------

both = pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None, reason="xllamacpp and gguf are not both installed"
)
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
BLOCKS = {"Q8_0": "products-q8-0-inputs", "Q4_0": "products-q8-0-inputs", "Q4_K": "products-q8-k-inputs"}


def quantized(checkpoint: Any) -> Path:
    return Path(checkpoint("qwen3", layers=2, dtype="float32", num_key_value_heads=2, **WIDE))


def accepting(file: Path, model: Path, regime: str, query: str = "") -> Comparison:
    draw = random.Random(3)
    ids = " ".join(str(draw.randrange(301)) for _ in range(12))
    return parity.diff(f"gguf:{file}{query}", model=str(model), tokens=ids, power=False, accept=regime)


@both
@pytest.mark.parametrize("kind", slow_but(["Q8_0"], BLOCKS))
def test_a_quantized_file_matches_on_its_own_weights(kind: str, checkpoint: Any, tmp_path: Path) -> None:
    model = quantized(checkpoint)
    found = accepting(write_gguf(model, tmp_path / "model.gguf", kind), model, BLOCKS[kind])
    assert (found.verdict, found.findings) == ("match", ())
    assert [finding.fault.id for finding in found.accepted if finding.fault] == [BLOCKS[kind]]
    assert {error.format for error in found.weights} == {kind, "F32"}
    assert max(error.ratio or 0 for error in found.weights) <= 1
    assert f", on the candidate's own weights, in the accepted regime {BLOCKS[kind]}" in found.headline


@both
@pytest.mark.slow
def test_a_wrong_eps_is_the_one_finding_of_a_quantized_file(checkpoint: Any, tmp_path: Path) -> None:
    model = quantized(checkpoint)
    file = write_gguf(model, tmp_path / "model.gguf", "Q8_0", qwen3__attention__layer_norm_rms_epsilon=1e-5)
    found = accepting(file, model, BLOCKS["Q8_0"])
    assert found.verdict == "diverged"
    assert [finding.fault.id for finding in found.findings if finding.fault] == ["norm-eps"] * len(found.findings)


@both
@pytest.mark.slow
def test_a_damaged_block_is_bad_quantization_of_one_tensor(checkpoint: Any, tmp_path: Path) -> None:
    def doubled(blocks: Any) -> None:
        blocks[3, 1, :2] = np.frombuffer((blocks[3, 1, :2].view(np.float16) * 2).tobytes(), np.uint8)

    model = quantized(checkpoint)
    file = write_gguf(model, tmp_path / "model.gguf", "Q8_0", {"blk.1.attn_output.weight": doubled})
    found = accepting(file, model, BLOCKS["Q8_0"])
    assert found.verdict == "diverged"
    assert [finding.sites for finding in found.findings] == [("model.layers.1.self_attn.o_proj",)]
    assert "the scale of block 1 of row 3 is 2 times too large" in found.findings[0].evidence[0]
