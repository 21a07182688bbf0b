"""Constants below the rounding: found where they are wrong, and nobody accused where they are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from parity.candidates.base import open_candidate
from parity.compare.inject import Injected
from parity.compare.pipeline import diff
from parity.diagnose.lean import Sums, sums_of
from parity.diagnose.weak_constants import _guilty
from parity.faults import CATALOGUE, parse
from parity.observer import Observer
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.results import Comparison
from parity.run_spec import RunSpec
from tests import checkpoints
from tests.bench.case_list import CASES
from tests.bench.cases import compare, make, port
from tests.planted import CLEAN, build
from tests.planted.base import norms

NUMBERS = tuple(fault for fault in CATALOGUE if fault.number)
SCALE = next(fault for fault in NUMBERS if fault.id == "attention-scale")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.qwen3(tmp_path_factory.mktemp("coherence") / "model", layers=3)


def test_rows_of_padding_are_no_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    truth, error, fault = (torch.randn(6, 8, generator=generator) for _ in range(3))
    values = (truth + error * 1e-3, truth, truth + error * 2e-3, truth + fault * 1e-2)
    padded = (torch.cat([value, torch.zeros(5, 8)]) for value in values)
    assert sums_of("x", *padded, torch.bfloat16) == sums_of("x", *values, torch.bfloat16)


def question(model: Path, tokens: int, dtype: str = "bfloat16") -> RunSpec:
    ids = tuple((97 * i * i + 31 * i) % 301 for i in range(tokens))
    return RunSpec(find(str(model)), (ids,), dtype, faults=NUMBERS)


def injected(run: RunSpec, fault: str) -> Comparison:
    return diff(run, Injected(parse(fault), Reference(run.model()), Observer()))


def leaning(comparison: Comparison) -> list[tuple[str, ...]]:
    return [
        f.families for f in comparison.findings if any("always in the same direction" in line for line in f.evidence)
    ]


def test_an_eps_that_no_single_value_shows_is_found(model: Path) -> None:
    found = injected(question(model, 61), "norm-eps=2e-3@2")
    assert found.verdict == "diverged"
    guilty = [f for f in found.findings if f.fault is not None and f.fault.id == "norm-eps"]
    assert guilty
    assert leaning(found), "the ratio alone would have let it pass"
    assert all(f.layers == (2,) for f in guilty)
    assert all(f.fault is not None and f.fault.reads["eps"].value > 1e-4 for f in guilty)


def test_an_eps_below_the_rounding_is_read_where_the_reference_rounds_as_the_candidate_does(model: Path) -> None:
    found = injected(question(model, 80), "norm-eps=1e-3")
    reads = {
        f.families: f.fault.reads["eps"] for f in found.findings if f.fault is not None and f.families in leaning(found)
    }
    assert len(reads) >= 3
    assert all(abs(eps.value - 1e-3) <= 2 * eps.stderr for eps in reads.values()), reads
    assert all(abs(eps.value - 1e-3) <= 5e-5 for eps in reads.values()), reads


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_repeated_token_is_one_row(model: Path, dtype: str) -> None:
    """Its rounding leans as one row's does, however often it is repeated."""
    chosen = next(v for v in CLEAN if v.id == "norm-weight-fp32")
    for token in (5, 14, 77):
        asked = replace(question(model, 1, dtype), token_ids=((token,) * 64,), calls=())
        found = diff(asked, open_candidate(build(chosen, model, dtype)), reference=Reference(asked.model()))
        assert (found.verdict, found.findings) == ("match", ())


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("variant", ["stream-fp32", "norm-weight-fp32", "ops-fp32"])
def test_a_legal_variant_is_not_accused(model: Path, variant: str, tokens: int) -> None:
    asked = question(model, tokens, "float16")
    chosen = next(v for v in CLEAN if v.id == variant)
    found = diff(asked, open_candidate(build(chosen, model, "float16")))
    assert found.findings == ()
    assert found.verdict == "match"


@pytest.mark.slow
def test_a_scale_kept_in_the_working_dtype_is_no_other_number(checkpoint: Callable[..., Path]) -> None:
    """12 ** -0.5 is 0.13 % larger in bfloat16; one percent more is neither that number nor its rounding."""
    path = checkpoint("llama", num_hidden_layers=2)
    asked = replace(question(path, 130), token_ids=(tuple(range(130)),), faults=(SCALE,))
    module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa")

    def run(factor: float) -> Comparison:
        for layer in module.model.layers:
            layer.self_attn.scaling = float(torch.tensor(factor * 12**-0.5).bfloat16())
        return diff(asked, open_candidate(module))

    right = run(1.0)
    assert (right.verdict, right.findings) == ("match", ())
    (finding,) = run(1.01).findings
    assert finding.fault is not None
    assert finding.fault.reads["scale"].value == pytest.approx(1.01 * 12**-0.5, rel=3e-3)


def leaner(site: str, slope: float) -> Sums:
    """A site that leans by itself, at 50 of its standard errors."""
    return Sums(site, slope, 0.0, 1.0, (slope / 50) ** 2, 0.0, 1.0, 1.0, 64)


def test_sites_that_lean_against_each_other_are_no_constant() -> None:
    one, other, unlike = leaner("a", 0.5), leaner("b", -0.5), leaner("c", 1.5)
    assert _guilty([one, leaner("b", 0.5)]) == [one, leaner("b", 0.5)]
    assert _guilty([one, unlike]) == [one, unlike], "not by as much, but the same way"
    assert _guilty([one, other]) == []
    assert _guilty([one, unlike, other]) == []


@pytest.mark.slow
@pytest.mark.parametrize(("eps", "guilty"), [(1e-6, False), (1.5e-6, True)])
def test_float32_norms_that_sum_in_an_order_of_their_own_hide_no_eps(
    checkpoint: Callable[..., Path], eps: float, guilty: bool
) -> None:
    """Their floor is wide enough to hide a wrong eps from the ratio; the lean of all rows together shows it."""
    path = checkpoint("qwen3", layers=2, dtype="float32", hidden_size=1024)
    run = question(path, 61, "float32")
    module = build(next(v for v in CLEAN if v.id == "norm-backwards"), path, "float32")
    for norm in norms(module, [0, 1]):  # type: ignore[arg-type]
        norm.eps = eps
    found = diff(run, open_candidate(module), reference=Reference(run.model()))
    assert found.verdict == ("diverged" if guilty else "match")
    assert bool(leaning(found)) is guilty


def plain(folder: Path, case: str) -> Comparison:
    """A bug of the cases in a port that records what its modules return, and nothing inside attention."""
    found = next(c for c in CASES if c.id == case)
    path = make(found.architecture, folder)
    return compare(path, port(path, "bfloat16", found), "bfloat16", False, folder)


@pytest.mark.slow
def test_a_scale_is_read_across_what_was_not_recorded(tmp_path: Path) -> None:
    (found,) = plain(tmp_path, "scale-of-one-layer").findings
    assert (found.families, found.layers) == (("model.layers.*.self_attn.o_proj",), (1,))
    assert found.fault is not None
    assert found.fault.id == "attention-scale"
    scale = found.fault.reads["scale"]
    assert abs(scale.value - 0.2525) < 2 * scale.stderr < 0.002


@pytest.mark.slow
def test_a_cap_that_is_forgotten_is_not_read_as_another_number(tmp_path: Path) -> None:
    faults = [f.fault for f in plain(tmp_path, "softcap-dropped").findings]
    assert [fault and fault.id for fault in faults] == ["softcap-dropped"]
    assert all(fault and not fault.reads for fault in faults)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_right_port_that_records_little_leans_nowhere(name: str, tmp_path: Path) -> None:
    path = make(name, tmp_path)
    assert not compare(path, port(path, "bfloat16"), "bfloat16", False, tmp_path).findings
