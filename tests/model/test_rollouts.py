"""Rollouts of a model with a known difference: a clean one is rounding, each other one is told apart."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from parity.report.rollouts import headline
from parity.rollout_report import RolloutReport
from parity.rollouts.compare import RolloutOptions, compare_rollouts
from tests.rollouts import Row, sample, scored, trl

DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def clean(small: Path, dtype: str) -> list[Row]:
    return sample(small, dtype)


@pytest.fixture
def judge(small: Path, dtype: str, tmp_path: Path) -> Callable[..., RolloutReport]:
    def judged(rows: list[Row], temperature: float = 1.0, earlier: tuple[str, ...] = ()) -> RolloutReport:
        options = RolloutOptions(str(small), dtype, temperature=temperature, earlier=earlier)
        return compare_rollouts(trl(tmp_path / "rollout.jsonl", rows), options)

    return judged


def test_a_clean_one_is_rounding(judge: Callable[..., RolloutReport], clean: list[Row]) -> None:
    report = judge(clean)
    assert (report.verdict, report.causes, report.far_rows, report.exit_code) == ("match", (), (), 0)
    assert report.ratio < 2
    figures = {figure.key: figure for figure in report.figures}
    assert 0 < figures["mean_abs"].value < 3 * figures["mean_abs"].floor
    assert 1 < figures["mean_exp"].value < 1.05
    assert figures["pearson"].value > 0.99
    assert sum(stretch.tokens for stretch in report.stretches) == report.tokens == 80


@pytest.mark.slow
def test_rounded_numbers_in_the_file_are_rounding(judge: Callable[..., RolloutReport], clean: list[Row]) -> None:
    report = judge([(p, c, [round(v, 3) for v in values]) for p, c, values in clean])
    assert (report.verdict, report.storage) == ("match", "3 decimals")


@pytest.mark.slow
@pytest.mark.parametrize("by", [1, -1])
def test_a_shift_by_a_token(judge: Callable[..., RolloutReport], clean: list[Row], by: int) -> None:
    report = judge([(p, c, values[by:] + values[:by]) for p, c, values in clean])
    assert report.verdict == "diverged"
    assert (report.causes[0].kind, report.causes[0].value) == ("shift", by)


@pytest.mark.slow
def test_a_temperature_that_is_applied_twice(small: Path, judge: Callable[..., RolloutReport], dtype: str) -> None:
    twice = sample(small, dtype, temperature=0.64)
    report = judge(twice, temperature=0.8)
    assert report.verdict == "diverged"
    assert report.causes[0].kind == "temperature"
    assert abs(report.causes[0].value - 0.64) < 5 * report.causes[0].stderr < 0.1
    assert headline(report).startswith("the temperature 0.8 is applied twice")
    assert headline(judge(twice)).startswith("another temperature than 1: they are those at temperature 0.6")
    assert judge(twice, temperature=0.64).verdict == "match"


@pytest.fixture(scope="module")
def stale(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint a step before: all weights are a little different."""
    path = tmp_path_factory.mktemp("stale") / "model"
    shutil.copytree(small, path)
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for value in weights.values():
        value.mul_(1 + 0.1 * torch.randn(value.shape, generator=generator).to(value.dtype))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.slow
def test_stale_weights(judge: Callable[..., RolloutReport], stale: Path, dtype: str) -> None:
    rows = sample(stale, dtype)
    report = judge(rows)
    assert (report.verdict, report.causes) == ("diverged", ())
    assert headline(report).endswith("from the first sampled token on: other weights or a wrong operation")
    named = judge(rows, earlier=(str(stale),))
    assert (named.causes[0].kind, named.causes[0].id) == ("checkpoint", str(stale))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32"], scope="module")
def test_rows_before_an_update_of_the_weights(
    judge: Callable[..., RolloutReport], clean: list[Row], stale: Path, dtype: str
) -> None:
    report = judge([*sample(stale, dtype, rows=1), *clean])
    assert report.verdict == "diverged"


def test_a_float16_cache(small: Path, judge: Callable[..., RolloutReport], dtype: str) -> None:
    report = judge(sample(small, dtype, cache_dtype=torch.float16))
    if dtype == "bfloat16":  # whose numbers float16 holds to the last bit
        assert report.verdict == "match"
    else:
        assert (report.verdict, [cause.id for cause in report.causes]) == ("diverged", ["kv-cache-fp16"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32"], scope="module")
def test_a_cache_that_is_read_in_later_calls_alone(small: Path, judge: Callable[..., RolloutReport]) -> None:
    report = judge(sample(small, "float32", cache_dtype=torch.float16, late=True))
    assert (report.verdict, report.causes, report.starts) == ("diverged", (), 1)
    assert "from sampled token 1 on: the cache, or what decoding does otherwise" in headline(report)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32"], scope="module")
def test_probabilities_of_the_likeliest_alone(judge: Callable[..., RolloutReport], small: Path) -> None:
    def keep(model: nn.Module) -> None:
        def truncate(_module: nn.Module, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
            least = logits.topk(9).values[..., -1:]
            return logits.masked_fill(logits < least, -torch.inf)

        model.get_submodule("lm_head").register_forward_hook(truncate)

    report = judge(sample(small, "float32", change=keep))
    assert (report.causes[0].kind, report.causes[0].value) == ("top-k", 9)


@pytest.mark.slow
def test_a_legal_engine_that_sums_otherwise_is_rounding(
    judge: Callable[..., RolloutReport], small: Path, clean: list[Row], dtype: str
) -> None:
    def split(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.forward = lambda x, m=module: sum(  # type: ignore[method-assign]
                    nn.functional.linear(a, b).float()
                    for a, b in zip(x.chunk(4, -1), m.weight.chunk(4, -1), strict=True)
                ).to(x.dtype)

    assert judge(scored(small, dtype, clean, split)).verdict == "match"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32"], scope="module")
def test_numbers_that_are_none(judge: Callable[..., RolloutReport], clean: list[Row]) -> None:
    (prompt, completion, values), *others = clean
    broken = judge([(prompt, completion, [float("-inf"), *values[1:]]), *others])
    assert (broken.verdict, broken.nonfinite) == ("diverged", 1)
    assert "1 log-probability not finite" in headline(broken)
    logits = judge([(p, c, [v + 5 for v in vs]) for p, c, vs in clean])
    assert logits.verdict == "diverged"
    assert "these are no log-probabilities" in headline(logits)


@pytest.mark.slow
def test_random_numbers_are_explained_by_nothing(judge: Callable[..., RolloutReport], clean: list[Row]) -> None:
    draw = random.Random(5)
    report = judge([(p, c, [-5 * draw.random() for _ in values]) for p, c, values in clean])
    assert (report.verdict, report.causes) == ("diverged", ())
