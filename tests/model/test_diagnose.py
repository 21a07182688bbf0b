"""Causes across unmeasured sites, layer by layer, and none where none can be told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import nn

from parity.candidates.base import open_candidate
from parity.compare.pipeline import diff
from parity.diagnose.readings import Uncertainty
from parity.diagnose.trial import Trial
from parity.faults import CATALOGUE, by_id
from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.results import Comparison, Finding
from parity.run_spec import RunSpec
from tests.planted import BUGS, build
from tests.planted.dumps import TAPS, dump_without

TOKENS = tuple((97 * i * i + 31 * i + 168) % 301 for i in range(24))
VARIANTS = {bug.id: bug for bug in BUGS}


def spec_of(path: Path, dtype: str = "float32") -> RunSpec:
    return RunSpec(find(str(path)), (TOKENS,), dtype, faults=CATALOGUE, options=RunOptions(power=False))


def planted(path: Path, plants: Sequence[tuple[str, Sequence[int]]], dtype: str = "float32") -> nn.Module:
    """A port with bugs in it, each in layers of its own."""
    (first, where), *others = plants
    model = build(VARIANTS[first], path, dtype, where)
    for name, layers in others:
        VARIANTS[name].apply(model, layers)
    return model


def without_taps(path: Path, folder: Path, model: nn.Module, dtype: str = "float32") -> Comparison:
    run = spec_of(path, dtype)
    reference = Reference(run.model())
    dump = dump_without(model, run, reference, folder / "dump.h5", TAPS)
    return diff(run, open_candidate(dump), reference=reference)


def named(result: Comparison) -> list[tuple[str, tuple[int, ...]]]:
    return [(finding.fault.id if finding.fault else "", finding.layers) for finding in result.findings]


@pytest.mark.parametrize(
    ("bug", "dtype"),
    [
        ("rope-theta-default", "float32"),
        ("rope-interleaved", "bfloat16"),
        ("gqa-tile", "float32"),
        pytest.param("gqa-tile", "bfloat16", marks=pytest.mark.slow),
        pytest.param("mask-next-token", "float32", marks=pytest.mark.slow),
        pytest.param("residual-dropped-attention", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_bug_behind_unmeasured_sites_is_named(
    checkpoint: Callable[..., Path], tmp_path: Path, bug: str, dtype: str
) -> None:
    path = checkpoint("qwen3")
    result = without_taps(path, tmp_path, planted(path, [(bug, (1, 2))], dtype), dtype)
    name = "rope-theta" if bug == "rope-theta-default" else bug
    found = [f for f in result.findings if f.fault and name in (f.fault.id, *f.fault.rivals)]
    assert [f.layers for f in found] == [(1, 2)]
    assert found == list(result.findings)


def test_a_bug_behind_unmeasured_sites_that_no_fault_explains_says_what_to_record(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoint("qwen3")
    (finding,) = without_taps(path, tmp_path, planted(path, [("heads-rolled", (2,))])).findings
    assert finding.fault is None
    assert finding.sites == ("model.layers.2.self_attn.o_proj",)
    wanted = "record self_attn.q_rope, self_attn.k_rope, self_attn.context to tell which operation it is"
    assert wanted in finding.evidence


def test_what_is_right_behind_unmeasured_sites_matches(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint("qwen3")
    model = build(next(b for b in BUGS if b.id == "gqa-tile"), path, "float32", ())
    assert without_taps(path, tmp_path, model).verdict == "match"


def test_layers_with_different_causes_are_different_findings(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3")
    result = diff(spec_of(path), open_candidate(planted(path, [("act-relu", (0, 2)), ("act-gelu-tanh", (1,))])))
    assert sorted(named(result)) == [("act-gelu-tanh", (1,)), ("act-relu", (0, 2))]


def test_one_cause_in_all_layers_is_one_finding(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3")
    ((name, layers),) = named(diff(spec_of(path), open_candidate(planted(path, [("act-relu", (0, 1, 2))]))))
    assert (name, layers) == ("act-relu", (0, 1, 2))


def test_a_layer_that_no_fault_explains_is_not_given_its_neighbours_cause(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3")
    found = named(diff(spec_of(path), open_candidate(planted(path, [("act-relu", (0, 2)), ("act-elu", (1,))]))))
    assert sorted(found) == [("", (1,)), ("act-relu", (0, 2))]


def test_one_bug_in_all_norms_is_one_finding(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3")
    (finding,) = diff(spec_of(path), open_candidate(planted(path, [("norm-eps-1e-3-all", range(3))]))).findings
    assert _name(finding) == "norm-eps"
    assert len(finding.families) == 5
    assert len(finding.sites) == 13


def _name(finding: Finding) -> str:
    return finding.fault.id if finding.fault else ""


@pytest.mark.parametrize(
    ("explained", "ratio", "fits"), [(0.99, 1.5, True), (0.8, 1.5, False), (0.8, 1.1, True), (0.99, 2.0, False)]
)
def test_a_cause_explains_the_whole_error_or_all_but_rounding(explained: float, ratio: float, fits: bool) -> None:
    assert Trial(by_id("norm-eps"), 1e-3, 1e-6, Uncertainty(), explained, ratio).fits is fits


def test_no_constant_is_read_where_weights_are_known_to_differ(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3")

    down = "model.layers.1.mlp.down_proj"
    port = planted(path, [("act-relu", ())])
    port.get_submodule(down).register_forward_hook(lambda _module, _args, out: out * 1.5)
    (read,) = diff(spec_of(path), open_candidate(port)).findings
    assert _name(read) == "weight-gain"
    assert read.fault
    assert read.fault.reads["factor"].value == pytest.approx(1.5)
    other = planted(path, [("act-relu", ())])
    other.get_submodule(down).weight.data.mul_(1.5)
    (silent,) = diff(spec_of(path), open_candidate(other)).findings
    assert silent.fault is None
