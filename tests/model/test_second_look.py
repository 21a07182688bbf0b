"""What a first look accuses and roundings that add up explain: spans of sparse dumps, flipped top tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from impl.qwen3 import load
from parity.candidates.base import open_candidate
from parity.compare import explain, measure
from parity.compare.pipeline import diff
from parity.dump import ArchiveWriter
from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.results import Comparison
from parity.run_spec import RunSpec
from tests.bench.clean import run_one

pytestmark = pytest.mark.slow
TOKENS = tuple((97 * i * i + 31 * i + 7) % 200 for i in range(48))


# Logits alone, with a massive token; layers alone; half of the sites; computed in float32 and only dumped in bfloat16.
@pytest.mark.parametrize("seed", [383, 21024, 977, 50584])
def test_one_row_may_stray_where_operations_in_between_are_not_recorded(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_one(seed).is_clean
    monkeypatch.setattr(explain, "second_look", lambda *_: {})
    assert run_one(seed).wrong, "there is something to explain"


# The dumps of the second and the third are sparse.
@pytest.mark.parametrize("seed", [282, 20915, 21487])
def test_massive_tokens_flip_others(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_one(seed).is_clean
    monkeypatch.setattr(measure, "_second_look", lambda end, *_: end)
    assert "top token" in run_one(seed).headline


def compared(path: Path, folder: Path, kept: Callable[[str], bool], damage: Callable[[np.ndarray], None]) -> Comparison:
    """A right port's dump of some sites, its last layer damaged."""
    run = RunSpec(find(str(path)), (TOKENS,), "float16", RunOptions(power=False, allow_unexamined=True), faults=())
    reference = Reference(run.model())
    sites = reference.working.sites
    full = open_candidate(load(path, "float16")).record(run, sites, folder / "full.h5")
    with full, ArchiveWriter(folder / "kept.h5", full.info) as writer:
        for site in sites:
            if site.name in full.entries and kept(site.name):
                array = full.read(site.name).copy()
                if site.name == "model.layers.1":
                    damage(array)
                writer.add(site.name, array, site.dims)
    return diff(run, open_candidate(folder / "kept.h5"), reference=reference)


def test_a_row_that_is_wrong_is_not_explained(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint("qwen3", layers=2, dtype="float16")

    def kept(site: str) -> bool:
        return site == "lm_head" or (site.startswith("model.layers.") and site.count(".") == 2)

    def row_off(values: np.ndarray) -> None:
        values[:, 20] *= np.float16(1.1)

    found = compared(path, tmp_path, kept, row_off)
    assert [s.site for s in found.sites if s.verdict == "wrong"] == ["model.layers.1"]
    right = compared(path, tmp_path, kept, lambda _: None)
    assert (right.verdict, right.findings) == ("match", ())


@pytest.mark.parametrize("factor", [1.02, 1.1])
def test_a_row_that_is_wrong_on_recorded_inputs_is_not_explained(
    checkpoint: Callable[..., Path], tmp_path: Path, factor: float
) -> None:
    def row_off(values: np.ndarray) -> None:
        values[:, 20] *= np.float16(factor)

    found = compared(checkpoint("qwen3", layers=2, dtype="float16"), tmp_path, lambda _: True, row_off)
    assert [s.site for s in found.sites if s.verdict == "wrong"] == ["model.layers.1"]
