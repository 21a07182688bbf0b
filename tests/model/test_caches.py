"""What attention reads of a cache, call by call: a cache that is wrong is found there, and attention is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impl.qwen3 import load
from parity import words
from parity.candidates.base import dump_file, open_candidate
from parity.compare.pipeline import diff
from parity.diagnose.foreign_rows import foreign_rows
from parity.dump import open_dump
from parity.options import RunOptions
from parity.results import Comparison
from parity.run_spec import RunSpec, run_spec
from parity.sites import is_cached
from tests.conftest import in_turn, slow_but
from tests.planted.caches import BOTH, CACHES, CacheBug


def tokens(row: int) -> str:
    return " ".join(str((97 * i * i + 31 * i + 13 * row * i + 7) % 200) for i in range(13))


def ask(path: Path, dtype: str = "float32", rows: int = 1, **options: Any) -> RunSpec:
    options = {"power": False, "dtype": dtype, "tokens": "\n".join(map(tokens, range(rows))), "decode": 4, **options}
    return run_spec(RunOptions(model=str(path), **options))


def planted(path: Path, bug: CacheBug, dtype: str = "float32", **options: Any) -> Comparison:
    model = load(path, dtype)
    bug.apply(model)
    return diff(ask(path, dtype, bug.rows, **options), open_candidate(model))


def named(id: str) -> CacheBug:
    return next(bug for bug in CACHES if bug.id == id)


@pytest.mark.parametrize(
    ("bug", "dtype"), in_turn(CACHES[:1], CACHES, ["bfloat16", "float32"]), ids=lambda v: getattr(v, "id", v)
)
def test_a_wrong_cache_is_a_finding_of_its_own(small: Path, bug: CacheBug, dtype: str) -> None:
    found = planted(small, bug, dtype if dtype in bug.dtypes else bug.dtypes[0])
    assert {family for f in found.findings for family in f.families} == {f"model.layers.*.{n}" for n in bug.guilty}
    assert {finding.fault.id if finding.fault else None for finding in found.findings} == set(bug.faults or [None])
    assert {f.first_call.number if f.first_call else 0 for f in found.findings} == {bug.call}


@pytest.mark.parametrize("bug", slow_but(CACHES[1:2], [bug for bug in CACHES if bug.call]), ids=lambda bug: bug.id)
def test_what_later_calls_read_does_not_show_in_one(small: Path, bug: CacheBug) -> None:
    assert planted(small, bug, decode=0).verdict == "match"


def test_where_a_wrong_row_is_read_first_is_said(small: Path) -> None:
    begins = {words.begins(finding) for finding in planted(small, named("stale-row")).findings}
    assert begins == {"first in the row of token 2: the prompt is right, wrong from the first decoded token"}


@pytest.mark.slow
def test_rows_of_another_prompt_are_told(small: Path) -> None:
    said = {f.families[0][-7:]: " ".join(f.evidence) for f in planted(small, named("other-prompt")).findings}
    assert "rows of tokens 0, 1, 2, 3 are unlike the values of any token of this run" in said["cache_v"]
    assert "unlike" not in said["cache_k"]


def test_rows_that_moved_or_were_rounded_are_no_other_prompts() -> None:
    right = torch.randn((2, 3, 9, 32), generator=torch.Generator().manual_seed(0))
    other = torch.randn((2, 3, 9, 32), generator=torch.Generator().manual_seed(1))
    for legal in (right, right.roll(1, 2), right.roll(1, 0), right.flip(1), 3 * right, right + 0.3 * other, 0 * right):
        assert not foreign_rows(legal, right)
    mixed = right.clone()
    mixed[1, :, 4:6] = other[1, :, 4:6]
    assert foreign_rows(mixed, right) == [4, 5]


@pytest.mark.slow
def test_a_cache_in_float16_can_be_accepted(small: Path) -> None:
    found = planted(small, named("float16"), accept="kv-cache-fp16")
    assert found.verdict == "match", found.headline
    assert {m.regime for m in found.sites if is_cached(m.site)} == {"kv-cache-fp16"}


@pytest.mark.slow
def test_a_bug_of_attention_beside_a_wrong_cache_is_told_apart(small: Path) -> None:
    model = load(small, "float32")
    named("wrong-slot").apply(model)
    for layer in model.model.layers:

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, own: Any = layer.self_attn.attend) -> Tensor:
            out: Tensor = own(q * 1.1, k, v, mask)
            return out

        layer.self_attn.attend = attend  # type: ignore[method-assign]
    found = diff(ask(small), open_candidate(model))
    assert {f.fault.id: f.families for f in found.findings if f.fault} == {
        "cache-wrong-slot": tuple(f"model.layers.*.{name}" for name in BOTH),
        "attention-scale": ("model.layers.*.self_attn.context",),
    }


# -- sites that a port need not have -------------------------------------------------------------------------


def test_a_port_without_them_lacks_nothing(small: Path) -> None:
    model = load(small, "float32")
    for layer in model.model.layers:
        layer.self_attn.cache_k = layer.self_attn.cache_v = _Unseen()
    found = diff(ask(small), open_candidate(model))
    assert (found.verdict, found.coverage.measured) == ("match", found.coverage.known)
    assert not [m for m in found.sites if is_cached(m.site)]


class _Unseen(nn.Module):
    """Is called past its hooks."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


def test_one_call_and_inner_values_have_none(small: Path) -> None:
    for options in ({"decode": 0}, {"inner": True}, {"decode": 4}):
        sites = [site.name for site in ask(small, **options).model().sites if is_cached(site.name)]
        assert bool(sites) == (options == {"decode": 4})


def test_they_are_in_dumps_call_by_call(small: Path, tmp_path: Path) -> None:
    run = ask(small)
    open_candidate("impl.qwen3:load").record(run, run.model().sites, tmp_path / "port.h5").close()
    with open_dump(tmp_path / "port.h5") as dump:
        rows = dump.read("model.layers.0.self_attn.cache_k")
        assert rows.shape[2:4] == (5, 13)
        assert (rows[:, :, 0, :9] == rows[:, :, 4, :9]).all()
        assert not rows[:, :, 0, 9:].any()
    found = diff(ask(small), dump_file(tmp_path / "port.h5"))
    assert (found.verdict, sum(is_cached(m.site) for m in found.sites)) == ("match", 4)
