"""Plain float32 ports match, because the legal ways to their numbers are computed; wrong constants still do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.candidates.base import open_candidate
from parity.compare import explain
from parity.compare.pipeline import diff
from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.reference.legal_ways import WAYS, _Ordered, _Straying, straying_of_sum, total
from parity.reference.replay import Reference
from parity.reference.rope_phases import other_tables, straying_of_angles
from parity.results import Comparison
from parity.run_spec import RunSpec
from tests.conftest import slow_but
from tests.planted import CLEAN, build
from tests.planted.base import Qwen3, norms, rebind
from tests.planted.loops import in_lanes, loop_norm

UNIT = 2.0**-24
LOOPS = {v.id: v for v in CLEAN}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- sums --------------------------------------------------------------------------------------------------------


def looped(terms: Tensor, lanes: int) -> float:
    """The sum of a vector, written out."""
    running = [np.float32(0)] * lanes
    for i, x in enumerate(terms.numpy()):
        running[i % lanes] = running[i % lanes] + x
    out = running[0]
    for lane in running[1:]:
        out = out + lane
    return float(out)


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_a_way_is_what_a_loop_makes(lanes: int) -> None:
    (way,) = [w for w in WAYS if w.lanes == lanes and not w.wide]
    for size in (1, 7, 200, 1024):
        x = draw(3, size, seed=size)
        assert total((x * x).double(), way).tolist() == [looped(row * row, lanes) for row in x]


def test_the_other_ways_add_the_same_numbers() -> None:
    x = draw(5, 333).double().square()
    for way in WAYS:
        assert torch.allclose(total(x, way), x.sum(-1), rtol=1e-5, atol=0), way.about
    assert torch.equal(total(x, WAYS[-1]), x.sum(-1))
    assert len({way.about for way in WAYS}) == len(WAYS)


@pytest.mark.parametrize("size", [16, 128, 1024, 4096])
def test_a_plain_loop_strays_as_far_as_it_is_said_to(size: int) -> None:
    x = draw(400, size).square().double()
    off = total(x, WAYS[0]) / x.sum(-1) - 1
    rms = float(off.square().mean().sqrt())
    assert 0.2 * straying_of_sum(size) < rms < straying_of_sum(size)
    assert float(off.abs().max()) < 5 * straying_of_sum(size)
    assert float(off.abs().max()) < UNIT * max(4.0, size**0.5)


class OnePlus(nn.Module):
    """A norm of another architecture: 1 + w."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = 0.1 * draw(512, seed=5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight.to(x.dtype))


def l2(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def softmax_of(x: Tensor) -> Tensor:
    return F.softmax(x, -1)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (512,), torch.full((512,), 1.5, dtype=x.dtype))


MODULES: dict[str, Callable[[Tensor], Tensor]] = {
    "1 + w": OnePlus(),
    "l2": l2,
    "softmax": softmax_of,
    "layer norm": layer_norm,
}


@pytest.mark.parametrize("name", MODULES)
def test_any_module_sums_in_that_way(name: str) -> None:
    """What a way changes is a factor that all of a row shares, as large as the sum is off."""
    module, x = MODULES[name], (10 + draw(20, 512)).double()
    exact = module(x)
    with _Ordered(WAYS[0]):
        other = module(x)
    off = torch.linalg.vector_norm(other - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)
    assert float(off.max()) > UNIT
    assert float(off.max()) < 50 * straying_of_sum(512), "a mean is off by as much as its terms are large"
    if name != "layer norm":
        factor = (other / exact - 1).mean(-1)
        assert float(off.max()) < 5 * straying_of_sum(512)
        assert float((other / exact - 1 - factor[:, None]).abs().max()) < 1e-13, "nothing but the sum is float32"


@pytest.mark.parametrize("name", MODULES)
def test_straying_is_of_the_size_of_the_ways(name: str) -> None:
    module, x = MODULES[name], draw(200, 512).double()
    exact = module(x)

    def off(mode: _Ordered | _Straying) -> float:
        with mode:
            return float(torch.linalg.vector_norm(module(x) - exact))

    strayed = off(_Straying(1))
    assert all(off(_Ordered(way)) < 1.1 * strayed for way in WAYS)
    assert off(_Ordered(WAYS[0])) > 0.1 * strayed


# -- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_frequencies_stray_as_far_as_they_are_said_to(theta: float) -> None:
    exact = theta ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    limits = straying_of_angles(exact)
    steps = torch.arange(0, 128, 2, dtype=torch.float32) / 128
    logs = (-steps * torch.tensor(theta).log()).exp().double()
    powers = (1 / theta**steps).double()
    for found in (logs, powers):
        assert bool(((found / exact - 1).abs() < 2.5 * limits).all())
    assert float(((logs / exact - 1).abs() / limits).max()) > 0.3


@pytest.mark.parametrize("spread", [lambda p: torch.cat([p, p], -1), lambda p: p.repeat_interleave(2, -1)])
def test_tables_are_moved_in_the_layout_they_have(spread: Callable[[Tensor], Tensor]) -> None:
    frequencies = 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = spread(torch.arange(30.0, dtype=torch.float64)[:, None] * frequencies)[None]
    given = (1.3 * angles.cos(), 1.3 * angles.sin())
    arguments = {"position_embeddings": given}
    with other_tables(arguments, [frequencies * 2, frequencies], 1):
        cos, sin = arguments["position_embeddings"]
        moved = torch.atan2(sin, cos) - torch.atan2(given[1], given[0])
        assert torch.allclose(torch.hypot(cos, sin), torch.full_like(cos, 1.3))
        expected = spread(straying_of_angles(frequencies)) * angles
        assert torch.allclose(torch.remainder(moved + 1, 2 * torch.pi) - 1, expected, atol=1e-12)
    assert arguments["position_embeddings"] is given
    with other_tables(arguments, [frequencies * 2], 1):
        assert arguments["position_embeddings"] is given, "no table of the given frequencies"


# -- ports ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(checkpoint: Callable[..., Path]) -> Path:
    """Rows as wide as those of a real model."""
    return checkpoint("qwen3", layers=1, dtype="float32", hidden_size=1024, head_dim=128)


def asked(path: Path, tokens: int) -> RunSpec:
    ids = tuple((97 * i * i + 31 * i) % 301 for i in range(tokens))
    return RunSpec(find(str(path)), (ids,), "float32", RunOptions(power=False), faults=())


def port(path: Path, variant: str, tokens: int) -> Comparison:
    run = asked(path, tokens)
    return diff(run, open_candidate(build(LOOPS[variant], path, "float32")), reference=Reference(run.model()))


def blinded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a second look."""
    monkeypatch.setattr(explain, "second_look", lambda *_: {})


@pytest.mark.parametrize("tokens", slow_but([1], [1, 24]))
@pytest.mark.parametrize(
    "variant", ["norm-loop", "norm-loop-fused", "norm-backwards", "norm-loop-of-means", "all-loops"]
)
def test_a_plain_loop_matches(wide: Path, variant: str, tokens: int) -> None:
    assert port(wide, variant, tokens).verdict == "match"


@pytest.mark.slow
def test_the_report_says_how_a_port_sums(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {s.site: s.reason for s in port(wide, "norm-loop", 24).sites}
    assert said["model.norm"] == "sums one after another, as a plain loop does"
    said = {s.site: s.reason for s in port(wide, "norm-backwards", 24).sites}
    assert said["model.norm"] == "sums in an order of its own"
    blinded(monkeypatch)
    assert port(wide, "norm-loop", 24).verdict == "diverged", "a first look alone accuses it"


@pytest.mark.parametrize("variant", ["rope-double", "rope-exp-log", "rope-products", "rope-double-frequencies"])
def test_tables_by_another_way_match(checkpoint: Callable[..., Path], variant: str) -> None:
    path = checkpoint("qwen3", layers=1, dtype="float32", head_dim=64)
    assert port(path, variant, 400).verdict == "match"


def with_eps(model: Qwen3, eps: float) -> Qwen3:
    """Plain-loop norms with a wrong eps."""
    for norm in norms(model, [0]):
        norm.eps = eps
        rebind(norm, loop_norm(in_lanes(1)))
    return model


@pytest.mark.parametrize("eps", [1e-5, 3e-6])
def test_a_wrong_eps_is_not_excused(wide: Path, eps: float) -> None:
    run = asked(wide, 24)
    module = with_eps(build(LOOPS["plain"], wide, "float32"), eps)  # type: ignore[arg-type]
    found = diff(run, open_candidate(module), reference=Reference(run.model()))
    assert found.verdict == "diverged"
    assert "model.layers.0.input_layernorm" in [s.site for s in found.sites if s.verdict in ("wrong", "imprecise")]


def test_a_theta_off_by_a_ten_thousandth_is_not_excused(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3", layers=1, dtype="float32", head_dim=64)
    run = asked(path, 100)
    module = build(LOOPS["plain"], path, "float32")
    module.config = replace(module.config, rope_theta=module.config.rope_theta * 1.0001)  # type: ignore[arg-type]
    found = diff(run, open_candidate(module), reference=Reference(run.model()))
    assert found.verdict == "diverged"
    assert {s.site.rsplit(".", 1)[-1] for s in found.sites if s.verdict == "wrong"} == {"q_rope", "k_rope"}
