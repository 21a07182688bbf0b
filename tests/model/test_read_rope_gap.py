"""RoPE read across attention: from what a plain port recorded before it and behind it, and of no other bug."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parity.diagnose.match import _case
from parity.diagnose.read_rope_gap import angles_across, read_rope_across
from parity.diagnose.trial import Case, attempt
from parity.diagnose.workbench import Workbench
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.run_spec import RunSpec
from tests.bench import case_changes as changes
from tests.bench.case_list import Case as Planted
from tests.bench.cases import TOKENS, make, port
from tests.conftest import in_turn

DTYPES = ("float32", "bfloat16")
RECORDED = ("q_proj", "k_proj", "v_proj", "o_proj", "input_layernorm", "layers.0")
COUNT = 44


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gap")


@contextmanager
def gap(change: Callable[[Any], None], dtype: str, folder: Path) -> Iterator[Case]:
    """The output of attention in layer 1 of a port that records what its modules return alone."""
    path = make("mistral", folder)
    run = RunSpec(find(str(path)), (TOKENS[:COUNT],), dtype)
    reference = Reference(run.model())
    seen: dict[str, Tensor] = {}
    model = port(path, dtype, Planted("planted", "mistral", frozenset(), {}, change))
    for name, module in model.named_modules():
        if name.endswith(RECORDED):
            module.register_forward_hook(_keeping(seen, name))
    with torch.no_grad():
        model(run.ids)
    bench = Workbench(reference, run.ids, lambda site: seen.get(site.name))
    with bench.piece(1) as at:
        assert at is not None
        yield _case("model.layers.1.self_attn.o_proj", at, bench)


def _keeping(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def keep(_module: nn.Module, _args: Any, value: Any) -> None:
        seen[name] = (value if isinstance(value, Tensor) else value[0]).detach()

    return keep


PLANTED: dict[str, tuple[Callable[[Any], None], str]] = {
    "one pair": (
        changes.frequencies(lambda f: f * torch.tensor([1, 1, 1, 1.1, 1, 1, 1, 1])),
        "RoPE turns by other angles than the reference: 1.1 times for pair 3",
    ),
    "every second": (
        changes.positions(lambda p: p // 2),
        "RoPE counts positions in another way: token 1 is at 0, token 2 is at 1, token 3 is at 1",
    ),
    "all pairs": (changes.frequencies(lambda f: f.roll(1)), "RoPE turns by other angles than the reference: 0.000172"),
    "restart": (
        changes.positions(lambda p: p % 41),
        "RoPE counts positions in another way: token 41 is at 0, token 42 is at 1",
    ),
    "jump": (
        changes.positions(lambda p: p + 9 * (p > 30)),
        "RoPE counts positions in another way: token 31 is at 40, token 32 is at 41",
    ),
    "far away": (changes.frequencies(lambda f: f / 8), "RoPE turns by 0.125 times the reference's angles for pairs 0"),
}


@pytest.mark.parametrize(("name", "dtype"), in_turn([], PLANTED, DTYPES))
def test_angles_and_positions_are_read_and_explain_the_port(name: str, dtype: str, folder: Path) -> None:
    change, words = PLANTED[name]
    with gap(change, dtype, folder) as case:
        fault = read_rope_across(case)
        assert fault is not None
        assert fault.title.startswith(words)
        trial = attempt(fault, case)
        assert trial is not None
        assert trial.fits


def larger(model: Any) -> None:
    """The context is a tenth too large."""
    for attention in changes.attentions(model):
        attention.o_proj.register_forward_pre_hook(lambda _m, args: (args[0] * 1.1,))


def mixed(model: Any) -> None:
    """Attention sees the queries of the token before."""
    for attention in changes.attentions(model):
        own = attention.forward
        q_proj = attention.q_proj
        wrapped = nn.Sequential(q_proj, Before())
        attention.forward = lambda *args, own=own, a=attention, w=wrapped, **kwargs: _with(a, w, own, args, kwargs)


class Before(nn.Module):
    """Each token gets what belongs to the one before."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[:, :-1]], 1)


def _with(attention: Any, q_proj: nn.Module, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    before = attention.q_proj
    attention._modules["q_proj"] = q_proj
    try:
        return own(*args, **kwargs)
    finally:
        attention._modules["q_proj"] = before


CONTROLS: dict[str, Callable[[Any], None]] = {
    "scale of the scores": changes.scale_of_one,
    "queries of another token": mixed,
    "size of the context": larger,
}


@pytest.mark.parametrize(("name", "dtype"), in_turn([], CONTROLS, DTYPES[::-1]))
def test_other_bugs_of_attention_are_not_read_as_angles_or_positions(name: str, dtype: str, folder: Path) -> None:
    with gap(CONTROLS[name], dtype, folder) as case:
        assert read_rope_across(case) is None


@pytest.mark.slow
def test_errors_of_angles_hold(folder: Path) -> None:
    """Of planted angles 95 % lie within two standard errors, however few are told from the reference's."""
    right = (2e4 ** (-torch.arange(8) / 8)).double()
    within = []
    for seed, dtype in enumerate(DTYPES * 2):
        factor = 1 + 0.2 * torch.rand(8, generator=torch.Generator().manual_seed(seed))
        with gap(changes.frequencies(lambda f, factor=factor: f * factor), dtype, folder) as case:
            found = angles_across(case)
        assert found is not None
        # A table of float32 rounds each angle.
        error = found.stderr[:-1] + 2.0**-24 * right
        within += ((found.value[:-1] - right * factor).abs() / error).tolist()
    assert sum(ratio <= 2 for ratio in within) >= 0.9 * len(within)
    assert max(within) < 5
