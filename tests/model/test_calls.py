"""A module that is called again in one forward pass: each call has a site of its own, on both sides."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parity.candidates.torch_module import TorchModule
from parity.dump import Dump
from parity.errors import CandidateError
from parity.faults import by_id, shows_at
from parity.record.discover import discover
from parity.record.tap import quiet_torch, tapping
from parity.reference.checkpoint import Checkpoint
from parity.run_spec import RunSpec
from parity.sites import family

SITES = ["embed_tokens", "0.q_proj", "0.qk_norm", "0.k_proj", "0.qk_norm#1", "0.resid_mid", "0.o_proj", "0", "lm_head"]


class Layer(nn.Module):
    """One norm for queries and keys, as Llama 4 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = (nn.Linear(10, 10) for _ in range(3))
        self.qk_norm = nn.RMSNorm(10)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.qk_norm(self.q_proj(x)), self.qk_norm(self.k_proj(x))
        out: Tensor = x + self.o_proj(query * key)
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.layers, self.lm_head = nn.Embedding(50, 10), nn.ModuleList([Layer()]), nn.Linear(10, 50)

    def forward(self, input_ids: Tensor, **_more: Any) -> Any:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.lm_head(x))


def on_meta() -> Model:
    with torch.device("meta"):
        return Model()


def test_the_probe_numbers_the_calls() -> None:
    names = [site.name.removeprefix("layers.") for site in discover(on_meta()).sites]
    assert names == SITES


def test_each_call_is_tapped_and_can_be_replaced() -> None:
    model, ids = Model(), torch.tensor([[3, 7, 1]])
    seen: dict[str, Tensor] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        seen[site] = value
        return torch.zeros_like(value) if site == "layers.0.qk_norm#1" else value

    with quiet_torch(), tapping(model, discover(on_meta()).sites, tap):
        model(ids)
    assert [site.removeprefix("layers.") for site in seen] == SITES
    assert not torch.equal(seen["layers.0.qk_norm"], seen["layers.0.qk_norm#1"])
    assert not seen["layers.0.resid_mid"].any(), "the second call's value flows on, the first's stays"


def recorded(module: nn.Module, path: Path) -> Dump:
    run = RunSpec(Checkpoint("tiny", path, ()), ((3, 7),), "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "fingerprint", lambda _self: "none")
        return TorchModule.of(module, {}).record(run, discover(on_meta()).sites, path / "port.h5")


def test_a_candidate_drops_no_call(tmp_path: Path) -> None:
    with closing(recorded(Model(), tmp_path)) as dump:
        assert [site.removeprefix("layers.") for site in dump.entries] == [s for s in SITES if s != "0.resid_mid"]
        assert (dump.read("layers.0.qk_norm") != dump.read("layers.0.qk_norm#1")).any()


def test_a_call_that_the_reference_does_not_make_is_an_error(tmp_path: Path) -> None:
    class Again(Model):
        def forward(self, input_ids: Tensor, **more: Any) -> Any:
            super().forward(input_ids)
            return super().forward(input_ids + 1, **more)

    with pytest.raises(CandidateError, match="calls embed_tokens again"):
        recorded(Again(), tmp_path)


def test_a_numbered_call_is_of_the_same_kind() -> None:
    assert family("model.layers.3.self_attn.qk_norm#1") == "model.layers.*.self_attn.qk_norm#1"
    assert shows_at(by_id("qk-norm-skipped"), "model.layers.0.self_attn.q_norm#1")
