"""Which operations vary: the truth about the worked example, and a planted operation that looks at the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from parity.candidates.base import dump_file, open_candidate
from parity.candidates.torch_module import TorchModule
from parity.engines.invariance import Settings, as_module, invariance
from parity.errors import UsageError
from parity.invariance_report import Invariance
from parity.observer import Observer
from parity.options import RunOptions
from parity.run_spec import run_spec

TOKENS = "5 17 99 4 150 23 8 61 77 120 31"


@pytest.fixture
def ask(small: Path) -> Callable[..., Invariance]:
    def asked(candidate: TorchModule, dtype: str = "float32", exact: bool = False, **settings: object) -> Invariance:
        against = settings.pop("against", None)
        run = run_spec(RunOptions(model=str(small), tokens=TOKENS, dtype=dtype, power=False))
        varied = Settings(**settings)  # type: ignore[arg-type]
        return invariance(run, candidate, varied, Observer(), against=against, exact=exact)  # type: ignore[arg-type]

    return asked


def plain() -> TorchModule:
    return as_module(open_candidate("impl.qwen3:load"))


def outputs(module: nn.Module, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [module(one) for one in ids]


def test_the_worked_example_in_a_batch(ask: Callable[..., Invariance], small: Path) -> None:
    found = ask(plain(), batch=(3,), exact=True)
    from impl.qwen3 import load

    row = torch.tensor([list(map(int, TOKENS.split()))])
    alone, together = outputs(load(str(small), "float32", "cpu"), [row, row.repeat(3, 1)])
    # Bits of the whole run differ exactly if those of some operation do.
    assert bool(found.variances) == (not torch.equal(alone.expand_as(together), together))
    assert found.measured > 30
    assert not found.unread
    assert found.settings == ("again", "batch 3")
    assert not [v for v in found.variances if v.setting == "again"]
    assert not found.beyond_rounding


@pytest.mark.slow
def test_another_attention_varies_in_its_context_alone(ask: Callable[..., Invariance]) -> None:
    found = ask(plain(), dtype="bfloat16", against=as_module(open_candidate("hf:?attn=sdpa")))
    assert [v.site for v in found.variances] == [f"model.layers.{n}.self_attn.context" for n in (0, 1)]
    assert all(0 < v.floors < 2 for v in found.variances if v.floors is not None)
    assert (found.verdict, found.exit_code) == ("match", 0)


class _LooksAtTheBatch(nn.Module):
    """SiLU that is off by the size of the batch: a little (as a kernel that sums otherwise), or a lot."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x) * (1 + self.step * (x.shape[0] - 1))


def planted(step: float) -> TorchModule:
    def factory(model_dir: str, dtype: str, device: str) -> nn.Module:
        from impl.qwen3 import load

        model = load(model_dir, dtype, device)
        model.model.layers[1].mlp.act_fn = _LooksAtTheBatch(step)
        return model

    return TorchModule.from_factory("planted", factory, {})


@pytest.mark.parametrize(("step", "verdict"), [(2.0**-23, "match"), (1e-3, "diverged")])
def test_an_operation_that_looks_at_the_batch_is_named(
    ask: Callable[..., Invariance], step: float, verdict: str
) -> None:
    found = ask(planted(step), batch=(2,))
    named = {v.site for v in found.variances} - {v.site for v in found.of_reference}
    assert named == {"model.layers.1.mlp.act_fn"}
    assert found.verdict == verdict
    assert [v.site for v in found.beyond_rounding] == (["model.layers.1.mlp.act_fn"] if verdict == "diverged" else [])


@pytest.mark.slow
def test_chunks_and_decoding_are_asked_on_the_same_inputs(ask: Callable[..., Invariance]) -> None:
    found = ask(plain(), chunks=(4,), decode=2)
    assert found.settings == ("again", "chunks of 4", "2 tokens decoded")
    assert not found.unread
    assert not found.beyond_rounding
    # Norms and RoPE take each token by itself.
    assert not [v for v in found.variances if v.site.endswith(("layernorm", "_norm", "_rope", "act_fn"))]


def test_what_cannot_be_asked(ask: Callable[..., Invariance], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only a torch module"):
        as_module(dump_file(tmp_path / "port.h5"))
    with pytest.raises(UsageError, match="--chunks 40: the prompt has 11 tokens"):
        ask(plain(), chunks=(40,))
