"""Several calls of one model: dumps that hold them, and modules that are run so."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from impl.qwen3 import load
from parity import words
from parity.candidates.base import Candidate, dump_file, open_candidate
from parity.compare.inject import Injected
from parity.compare.pipeline import diff
from parity.dump import open_dump, write_safetensors
from parity.dump.calls import call_name
from parity.errors import CandidateError, IncomparableError, UsageError
from parity.faults import parse
from parity.observer import Observer
from parity.options import RunOptions
from parity.reference.replay import Reference
from parity.results import Comparison, FirstCall
from parity.run_spec import RunSpec, run_spec
from tests.architectures import make
from tests.builders import IdsAlone
from tests.conftest import in_turn, slow_but
from tests.planted.decoding import LATE, LATE_CHUNK, LATE_STEP, LateBug

TOKENS = tuple((97 * i * i + 31 * i + 7) % 200 for i in range(13))


def ask(path: Path, dtype: str = "bfloat16", **options: Any) -> RunSpec:
    options = {"power": False, "dtype": dtype, "tokens": " ".join(map(str, TOKENS)), **options}
    return run_spec(RunOptions(model=str(path), **options))


def parts(array: np.ndarray[Any, Any], axis: int, calls: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    return np.split(array, np.cumsum(calls)[:-1], axis=axis)


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of one pass over all tokens."""
    path = tmp_path_factory.mktemp("whole") / "whole.h5"
    run = ask(small)
    open_candidate("impl.qwen3:load").record(run, run.model().sites, path).close()
    return path


def in_calls(whole: Path, path: Path, calls: Sequence[int], keep: Sequence[int] | None = None) -> Path:
    """The same run as arrays of single calls; with `keep`, the arrays of those calls alone, as if they were all."""
    with open_dump(whole) as dump:
        tensors: dict[str, Any] = {}
        for site in dump.entries:
            array = dump.read(site)
            axis = array.shape.index(len(TOKENS))
            for i, part in enumerate(parts(array, axis, calls)):
                tensors[call_name(site, i) if keep is None else site] = part
        metadata = {"parity.token_ids": json.dumps(dump.info.token_ids), "parity.model": dump.info.model}
    if keep is None:
        metadata["parity.calls"] = json.dumps(calls)
    write_safetensors(path, tensors, metadata)
    return path


def compare(path: Path, dump: Path) -> Comparison:
    return diff(ask(path), dump_file(dump))


@pytest.mark.parametrize("calls", [(9, 1, 1, 1, 1), (5, 5, 3)])
def test_calls_in_a_dump_are_compared_with_one_pass(small: Path, whole: Path, tmp_path: Path, calls: Any) -> None:
    found = compare(small, in_calls(whole, tmp_path / "calls.safetensors", calls))
    expected = compare(small, whole)
    assert (found.verdict, found.coverage) == ("match", expected.coverage)
    assert found.sites == expected.sites


def test_the_last_step_alone_is_told_to_bring_the_others(small: Path, whole: Path, tmp_path: Path) -> None:
    step = in_calls(whole, tmp_path / "step.safetensors", (12, 1), keep=(1,))
    with pytest.raises(IncomparableError) as error:
        compare(small, step)
    assert "13 token ids but the arrays of one call on 1" in str(error.value)
    assert "Join the arrays of all calls" in str(error.value)


# -- a module that is run in several calls -------------------------------------------------------------------

CALLS = [
    {"decode": 4},
    {"chunks": "5,5,3"},
    {"chunks": "4,4", "decode": 5},
    {"decode": 12},
    {"decode": 3, "greedy": True},
]


@pytest.mark.parametrize("options", slow_but(CALLS[:2], CALLS), ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", ["impl.qwen3:load", "hf:", "hf:?attn=sdpa"])
def test_a_port_in_several_calls_matches(small: Path, spec: str, dtype: str, options: dict[str, Any]) -> None:
    found = diff(ask(small, dtype, **options), open_candidate(spec))
    assert found.verdict == "match", found.headline
    assert (found.coverage.measured, found.coverage.unexamined) == (found.coverage.known, 0)


@pytest.mark.parametrize("options", CALLS[:2], ids=str)
def test_scores_and_probs_of_calls_are_joined_too(small: Path, options: dict[str, Any]) -> None:
    for spec in ("impl.qwen3:load", "hf:"):
        found = diff(ask(small, inner=True, **options), open_candidate(spec))
        assert (found.verdict, found.coverage.measured) == ("match", found.coverage.known)


def test_greedy_tokens_are_those_that_the_reference_says(small: Path) -> None:
    run = ask(small, "float32", decode=3, greedy=True)
    done = run.continued(run.model())
    expected = load(small, "float32").generate(run.ids, 3)
    assert done.ids.tolist() == expected.tolist()
    assert done.calls == (13, 1, 1, 1)


def test_a_module_without_a_cache_is_one_line(small: Path) -> None:
    with pytest.raises(
        CandidateError, match=r"no cache that parity knows, and is to run in 5 calls: forward takes inp"
    ):
        diff(ask(small, decode=4), open_candidate(IdsAlone(load(small))))


def test_a_cache_that_is_taken_and_not_returned_is_one_line(small: Path) -> None:
    class Dropped(IdsAlone):
        def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Tensor:
            return super().forward(input_ids)

    with pytest.raises(CandidateError, match="takes past_key_values, but returns none"):
        diff(ask(small, decode=4), open_candidate(Dropped(load(small))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": 13}, "--decode 13: the prompt has 13 tokens, so that none is left"),
        ({"chunks": "5,5"}, "--chunks 5,5: 10 tokens, but the prompt has 13"),
        ({"chunks": "5,5", "decode": 4}, "the prompt has 9 before the 4 decoded ones"),
        ({"chunks": "5,,5"}, "no list of sizes"),
        ({"decode": -1}, "how many tokens are decoded"),
        ({"greedy": True}, "Say with --decode how many"),
    ],
)
def test_calls_that_cannot_be_are_one_line(small: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        ask(small, **options)


def test_a_dump_of_other_calls_is_one_line(small: Path, whole: Path, tmp_path: Path) -> None:
    dump = dump_file(in_calls(whole, tmp_path / "calls.safetensors", (9, 1, 1, 1, 1)))
    options = RunOptions(model=str(small), decode=3)
    with pytest.raises(UsageError, match=r"calls of 9, 1, 1, 1, 1 tokens, not 10, 1, 1, 1"):
        run_spec(options, dump.said())


def test_what_runs_all_at_once_is_one_line(small: Path) -> None:
    class Other(Candidate):
        name = "other"

    with pytest.raises(UsageError, match="other runs all tokens at once"):
        diff(ask(small, decode=4), Other())  # type: ignore[abstract]


CACHED = ("llama", "mistral", "qwen2", "gemma2", "gemma3", "olmo3", "phi", "gpt_neox", "starcoder2", "qwen3_moe")


@pytest.mark.parametrize(("name", "dtype"), in_turn(["mistral"], CACHED, ["float32", "bfloat16"]))
def test_models_of_transformers_match_with_their_own_cache(tmp_path: Path, name: str, dtype: str) -> None:
    """Their windows of 11 slide."""
    path, ids = make(name, tmp_path / name, dtype), " ".join(map(str, (*TOKENS, *TOKENS[:7])))
    for options in ({"decode": 4}, {"chunks": "7,7", "decode": 6}):
        found = diff(ask(path, dtype, tokens=ids, **options), open_candidate("hf:"))
        assert found.verdict == "match", found.headline


# -- bugs that begin with a later call -----------------------------------------------------------------------


def planted(path: Path, bug: LateBug, dtype: str, **options: Any) -> Comparison:
    model = load(path, dtype)
    bug.apply(model)
    return diff(ask(path, dtype, **options), open_candidate(model))


@pytest.mark.parametrize(
    ("bug", "dtype"), in_turn(LATE, LATE, ["bfloat16", "float32"]), ids=lambda v: getattr(v, "id", v)
)
def test_a_bug_of_decoding_is_found_and_named(small: Path, bug: LateBug, dtype: str) -> None:
    found = planted(small, bug, dtype, decode=4)
    families = {family for finding in found.findings for family in finding.families}
    assert families == {f"model.layers.*.{name}" for name in bug.guilty}
    named = {finding.fault.id if finding.fault else None for finding in found.findings}
    assert named <= set(bug.faults or [None]), named
    step = LATE_STEP.get(bug.id, 1)
    assert {finding.first_call for finding in found.findings} == {FirstCall(step, step)}
    if step == 1:
        assert words.begins(found.findings[0]).endswith("the prompt is right, wrong from the first decoded token")


@pytest.mark.parametrize("bug", LATE_CHUNK, ids=lambda bug: bug.id)
def test_a_bug_of_the_second_chunk_is_found_and_named(small: Path, bug: LateBug) -> None:
    found = planted(small, bug, "float32", chunks="5,8")
    assert {family for f in found.findings for family in f.families} == {f"model.layers.*.{n}" for n in bug.guilty}
    assert all(finding.fault is not None and finding.fault.id in bug.faults for finding in found.findings)
    assert {finding.first_call for finding in found.findings} == {FirstCall(1, 0)}
    assert words.begins(found.findings[0]) == "first at token 5: right up to chunk 1, wrong from chunk 2"


@pytest.mark.parametrize("bug", slow_but(LATE[:1], [*LATE, *LATE_CHUNK]), ids=lambda bug: bug.id)
def test_bugs_of_later_calls_do_not_show_in_one(small: Path, bug: LateBug) -> None:
    """What one pass shows is no bug of later calls: the plants would prove nothing."""
    assert planted(small, bug, "bfloat16").verdict == "match"


@pytest.mark.parametrize("id", slow_but(["cache-window-stands"], ["cache-window-stands", "cache-window-ignored"]))
def test_a_window_that_does_not_slide_in_decoding_is_named(tmp_path: Path, id: str) -> None:
    path = make("mistral", tmp_path / "mistral", "float32")
    run = ask(path, "float32", tokens=" ".join(map(str, (*TOKENS, *TOKENS[:7]))))
    reference = Reference(run.model())
    late = Injected(parse(f"{id}=16", run.faults), reference, Observer())
    found = diff(run, late, reference=reference)
    assert [(f.families, f.fault and f.fault.id) for f in found.findings] == [
        (("model.layers.*.self_attn.context",), id)
    ]
    assert found.findings[0].fault is not None
    assert found.findings[0].fault.reads["start"].value == 16
