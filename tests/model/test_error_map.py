"""The residual of a finding: it shows the token, the head and the channel that are wrong, and no other."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch import Tensor, nn

from impl.qwen3 import load
from parity.candidates.base import open_candidate
from parity.compare.pipeline import diff
from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.results import ULP_BINS, Comparison, Residual
from parity.run_spec import RunSpec

TOKENS = 24


class Doubled(nn.Module):
    """The wrapped module's output, doubled from a token on (the last axis but one), in a stretch of another axis."""

    def __init__(self, inner: nn.Module, axis: int, stretch: slice, first: int, factor: float = 2.0) -> None:
        super().__init__()
        self.inner, self.axis, self.stretch, self.first, self.factor = inner, axis, stretch, first, factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x).clone()
        axes = [slice(None)] * out.ndim
        axes[-2] = slice(self.first, None)
        axes[self.axis] = self.stretch
        out[tuple(axes)] *= self.factor
        return out


def compared(
    path: Path, module: str, axis: int, stretch: slice, first: int, factor: float = 2.0, *, inner: bool = False
) -> Comparison:
    """A candidate with one doubled module."""
    ids = tuple((97 * i * i + 31 * i + 7) % 200 for i in range(TOKENS))
    question = RunSpec(find(str(path)), (ids,), "bfloat16", RunOptions(inner=inner), faults=())
    candidate = load(path, "bfloat16")
    candidate.set_submodule(module, Doubled(candidate.get_submodule(module), axis, stretch, first, factor))
    return diff(question, open_candidate(candidate))


def found(path: Path, module: str, axis: int, stretch: slice, first: int, factor: float = 2.0) -> Residual:
    """The residual of the only finding in a candidate with one doubled module."""
    (finding,) = compared(path, module, axis, stretch, first, factor).findings
    assert finding.residual is not None
    assert finding.residual.site == module == finding.sites[0]
    return finding.residual


@pytest.mark.parametrize(
    ("module", "axis", "stretch", "columns", "size", "guilty"),
    [
        ("model.layers.1.self_attn.q_rope", 1, slice(4, 5), "head", 6, {4}),
        ("model.layers.0.self_attn.v_proj", -1, slice(20, 40), "head", 2, {1}),
        ("model.layers.1.mlp.act_fn", -1, slice(0, 8), "channel", 112, {0, 1}),
    ],
)
def test_it_shows_the_heads_and_tokens_that_are_wrong(
    small: Path, module: str, axis: int, stretch: slice, columns: str, size: int, guilty: set[int]
) -> None:
    shown = found(small, module, axis, stretch, first=9)
    assert (shown.columns, shown.size, len(shown.ratios)) == (columns, size, TOKENS)
    assert len(shown.ratios[0]) == (size if columns == "head" else 28), "4 channels in each"
    wrong = {(t, i) for t, row in enumerate(shown.ratios) for i, ratio in enumerate(row) if ratio > 10}
    assert wrong == {(t, i) for t in range(9, TOKENS) for i in guilty}
    right = [ratio for t, row in enumerate(shown.ratios) for i, ratio in enumerate(row) if (t, i) not in wrong]
    assert max(right) < 3


def test_nan_is_shown_where_it_is(small: Path) -> None:
    shown = found(small, "model.layers.1.mlp.down_proj", -1, slice(0, 3), first=20, factor=math.nan)
    assert [row[0] == math.inf for row in shown.ratios] == [t >= 20 for t in range(TOKENS)]
    assert max(ratio for row in shown.ratios for ratio in row[1:]) < 3


def test_the_local_error_is_counted_in_ulps(small: Path) -> None:
    """Twice a number of bfloat16 is 128 steps away from it."""
    guilty = "model.layers.1.mlp.act_fn"
    result = compared(small, guilty, -1, slice(0, 8), first=9)
    assert {m.site for m in result.sites if m.verdict == "wrong"} == {guilty}
    (wrong,) = (m.ulps for m in result.sites if m.site == guilty)
    doubled = (TOKENS - 9) * 8
    assert wrong == (TOKENS * 112 - doubled, *[0] * ULP_BINS.index(64), doubled)
    assert [m.site for m in result.sites if m.ulps is not None] == [m.site for m in result.sites if not m.bit_equal]


def test_masked_scores_are_not_counted(small: Path) -> None:
    guilty = "model.layers.1.self_attn.scores"
    result = compared(small, guilty, 1, slice(0, 1), first=0, inner=True)
    assert {m.site for m in result.sites if m.verdict == "wrong"} == {guilty}
    assert {m.site: (m.bit_equal, m.ulps) for m in result.sites}[guilty] == (False, None)


def test_many_tokens_are_pooled() -> None:
    from parity.diagnose.error_map import _pooled

    assert _pooled([1.0, 2.0, 3.00049]) == (1.0, 2.0, 3.0)
    assert _pooled([float(i == 70) for i in range(129)]) == tuple(float(i == 70 // 3) for i in range(43))
    assert _pooled([]) == ()
