"""What must never be called a match: answers that are no logits, operations that nobody saw, unknown names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impl.qwen3 import load
from parity.candidates.base import open_candidate
from parity.compare.pipeline import diff
from parity.dump import ArchiveWriter, open_dump
from parity.errors import CandidateError
from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.results import Comparison
from parity.run_spec import RunSpec

TOKENS = tuple((97 * i * i + 31 * i + 7) % 200 for i in range(12))


def ask(path: Path, **options: Any) -> RunSpec:
    return RunSpec(find(str(path)), (TOKENS,), "bfloat16", RunOptions(power=False, **options), faults=())


class Wrapped(nn.Module):
    """The right model with something done around its forward pass."""

    def __init__(self, path: Path, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        inner = load(path, "bfloat16")
        for name, child in inner.named_children():
            self.add_module(name, child)
        self._inner, self._around = [inner], forward

    def forward(self, ids: Tensor) -> Tensor:
        return self._around(self._inner[0], ids)


WRONG: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "halved": lambda m, ids: m(ids) / 2,
    "halved in place": lambda m, ids: m(ids).mul_(0.5),
    "capped": lambda m, ids: 3 * torch.tanh(m(ids) / 3),
    "zero": lambda m, ids: m(ids) * 0,
    "of another token": lambda m, ids: m(ids).roll(1, -1),
    "NaN": lambda m, ids: m(ids) * float("nan"),
}
RIGHT: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "as they are": lambda m, ids: m(ids),
    "in float32": lambda m, ids: m(ids).float(),
    "of the last token alone": lambda m, ids: m(ids)[:, -1:],
    "of the last tokens, in float32": lambda m, ids: m(ids)[:, -3:].float(),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_candidate_returns_is_its_answer(small: Path, case: str) -> None:
    found = diff(ask(small), open_candidate(Wrapped(small, WRONG[case])))
    assert found.verdict == "diverged"
    assert [f.families for f in found.findings] == [("lm_head",)]


@pytest.mark.parametrize("case", RIGHT)
def test_right_logits_may_be_returned_in_another_form(small: Path, case: str) -> None:
    assert diff(ask(small), open_candidate(Wrapped(small, RIGHT[case]))).verdict == "match"


def test_logits_of_some_other_token_are_refused(small: Path) -> None:
    with pytest.raises(CandidateError, match="not the last ones of lm_head"):
        diff(ask(small), open_candidate(Wrapped(small, lambda m, ids: m(ids)[:, :1])))


def test_a_second_pass_is_not_dropped(small: Path) -> None:
    """A warm-up with the right tokens hides what the pass that counts does."""

    def twice(model: nn.Module, ids: Tensor) -> Tensor:
        model(ids)
        return model(ids.flip(-1))

    with pytest.raises(CandidateError, match="again in one forward pass"):
        diff(ask(small), open_candidate(Wrapped(small, twice)))


def test_a_module_that_stands_in_several_places_is_recorded_in_each(small: Path) -> None:
    module = load(small, "bfloat16")
    shared = module.get_submodule("model.layers.0.mlp.act_fn")
    module.set_submodule("model.layers.1.mlp.act_fn", shared)
    found = diff(ask(small), open_candidate(module))
    assert (found.verdict, found.coverage.measured) == ("match", found.coverage.known)


# -- operations that nobody saw ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of all sites."""
    path = tmp_path_factory.mktemp("whole") / "whole.h5"
    run = ask(small)
    open_candidate("impl.qwen3:load").record(run, run.model().sites, path).close()
    return path


def part(whole: Path, path: Path, keep: Callable[[str], bool], **renamed: str) -> Path:
    with open_dump(whole) as dump, ArchiveWriter(path, dump.info) as writer:
        for site, entry in dump.entries.items():
            if keep(site):
                writer.add(renamed.get(site.replace(".", "_"), site), dump.read(site), entry.dims)
    return path


def compared(small: Path, dump: Path, **options: Any) -> Comparison:
    return diff(ask(small, **options), open_candidate(dump))


def test_logits_alone_are_no_match(small: Path, whole: Path, tmp_path: Path) -> None:
    dump = part(whole, tmp_path / "logits.h5", lambda site: site == "lm_head")
    found = compared(small, dump)
    assert (found.verdict, found.exit_code) == ("inconclusive", 2)
    assert found.coverage.unexamined == found.coverage.known - 1
    assert "not examined" in found.headline
    allowed = compared(small, dump, allow_unexamined=True)
    assert (allowed.verdict, allowed.exit_code) == ("match", 0)
    assert "not examined" in allowed.headline


def test_the_outputs_of_all_layers_are_a_coarse_match(small: Path, whole: Path, tmp_path: Path) -> None:
    dump = part(whole, tmp_path / "layers.h5", lambda s: s.split(".")[-1].isdigit() or not s.startswith("model.layers"))
    found = compared(small, dump)
    assert (found.verdict, found.coverage.unexamined) == ("match", 0)
    assert found.coverage.measured < found.coverage.known


def test_layers_that_were_left_out_are_not_covered(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint("qwen3", layers=4)
    run = ask(path)
    open_candidate("impl.qwen3:load").record(run, run.model().sites, tmp_path / "whole.h5").close()
    ends = ("model.layers.3", "model.norm", "lm_head", "model.embed_tokens")
    found = compared(path, part(tmp_path / "whole.h5", tmp_path / "few.h5", lambda s: s in ends))
    assert (found.verdict, found.inconclusive and found.inconclusive.kind) == ("inconclusive", "unexamined")


def test_a_name_that_nobody_understood_is_said(small: Path, whole: Path, tmp_path: Path) -> None:
    renamed = {"model_layers_0_mlp_act_fn": "model.layers.0.mlp.activation"}
    found = compared(small, part(whole, tmp_path / "renamed.h5", lambda _: True, **renamed))
    check = next(c for c in found.checks if c.name == "recorded names")
    assert not check.ok
    assert "model.layers.0.mlp.activation" in check.detail
    assert "model.layers.0.mlp.act_fn" in check.detail
    assert found.verdict == "inconclusive"


def test_an_array_too_many_is_no_trouble(small: Path, whole: Path, tmp_path: Path) -> None:
    with open_dump(whole) as dump, ArchiveWriter(tmp_path / "more.h5", dump.info) as writer:
        for site, entry in dump.entries.items():
            writer.add(site, dump.read(site), entry.dims)
        writer.add("my.own.statistics", dump.read("lm_head"), None)
    found = compared(small, tmp_path / "more.h5")
    assert found.verdict == "match"
    assert any(c.name == "recorded names" and c.ok and "my.own.statistics" in c.detail for c in found.checks)


def test_an_array_of_another_shape_is_no_match(small: Path, whole: Path, tmp_path: Path) -> None:
    with open_dump(whole) as dump, ArchiveWriter(tmp_path / "cut.h5", dump.info) as writer:
        for site, entry in dump.entries.items():
            array = dump.read(site)
            writer.add(site, array[..., :-1] if site.endswith("0.mlp.act_fn") else array, entry.dims)
    found = compared(small, tmp_path / "cut.h5")
    assert found.verdict == "inconclusive"
    assert any(c.name == "recorded shapes" and not c.ok for c in found.checks)
