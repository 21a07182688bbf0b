"""Batches with padding: run as they are on both sides, never compared where they are padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from impl.qwen3 import load
from parity.candidates.base import Candidate, dump_file, open_candidate
from parity.compare.parts import Asked
from parity.compare.pipeline import diff
from parity.diagnose.workbench import Workbench
from parity.dump import open_dump, write_safetensors
from parity.engines.contrast import contrast
from parity.engines.invariance import Settings, invariance
from parity.errors import CandidateError, IncomparableError, UsageError
from parity.observer import Observer
from parity.options import RunOptions
from parity.reference.batch import Batch, counted, padded
from parity.reference.padding_check import padding_check
from parity.reference.replay import Reference
from parity.results import Comparison
from parity.run_spec import RunSpec, run_spec
from parity.scale import compute_part, merge
from parity.shards import Shard
from parity.sites import is_cached
from tests.architectures import make
from tests.builders import IdsAlone
from tests.conftest import in_turn, slow_but
from tests.planted.base import rebind
from tests.planted.padding import BUGS, CLEAN, PaddingBug

LENGTHS = (8, 13, 6)  # the first is not the longest: what it has is wrong for the others


def row(length: int, seed: int) -> tuple[int, ...]:
    return tuple((97 * i * i + 31 * i * seed + 7) % 200 + 3 for i in range(length))


ROWS = tuple(row(length, seed) for seed, length in enumerate(LENGTHS))
TOKENS = "\n".join(" ".join(map(str, ids)) for ids in ROWS)


def ask(path: Path, dtype: str = "float32", **options: Any) -> RunSpec:
    options = {"power": False, "dtype": dtype, "tokens": TOKENS, "pad": "left", **options}
    return run_spec(RunOptions(model=str(path), **options))


def planted(path: Path, apply: Any, **options: Any) -> Comparison:
    run = ask(path, **options)
    model = load(path, run.dtype)
    apply(model)
    return diff(run, open_candidate(model))


# -- what is run -----------------------------------------------------------------------------------------------


def test_rows_are_padded_where_it_is_said() -> None:
    assert padded([(1, 2, 3), (4,)], "left", 0) == (((1, 2, 3), (0, 0, 4)), ((1, 1, 1), (0, 0, 1)))
    assert padded([(1, 2, 3), (4,)], "right", 9) == (((1, 2, 3), (4, 9, 9)), ((1, 1, 1), (1, 0, 0)))
    assert padded([(1, 2, 3), (4, 5)], "right", 9, tail=1) == (((1, 2, 3), (4, 9, 5)), ((1, 1, 1), (1, 0, 1)))
    assert padded([(1, 2), (4, 5)], "left", 0)[1] is None


def test_text_is_counted_from_zero() -> None:
    assert counted(torch.tensor([[False, True, True], [True, False, True]])).tolist() == [[0, 0, 1], [0, 0, 1]]


def test_a_mask_without_padding_is_none() -> None:
    batch = Batch.of_rows([[1, 2]], [[1, 1]], [[0, 1]])
    assert batch.text is None
    assert batch.positions is None
    assert batch.same_as(Batch(torch.tensor([[1, 2]])))


@pytest.mark.parametrize(
    "options", slow_but([{}], [{}, {"decode": 4}, {"chunks": "6,7"}, {"decode": 2, "greedy": True}]), ids=str
)
@pytest.mark.parametrize(("pad", "dtype"), [("left", "bfloat16"), ("right", "float32")])
@pytest.mark.parametrize("spec", ["impl.qwen3:load", "hf:?attn=sdpa"])
def test_a_port_that_pads_matches(small: Path, spec: str, pad: str, dtype: str, options: dict[str, Any]) -> None:
    found = diff(ask(small, dtype, pad=pad, **options), open_candidate(spec))
    assert found.verdict == "match", found.headline
    assert (found.coverage.measured, found.coverage.unexamined) == (found.coverage.known, 0)


def test_greedy_tokens_follow_the_text_of_each_row(small: Path) -> None:
    for pad in ("left", "right"):
        run = ask(small, pad=pad, decode=2, greedy=True)
        done = run.continued(run.model())
        for number, ids in enumerate(ROWS):
            alone = load(small, "float32").generate(torch.tensor([ids]), 2)[0].tolist()
            text = done.batch.text
            assert text is not None
            assert done.ids[number][text[number]].tolist() == alone


def test_the_row_of_a_batch_is_what_it_is_alone(small: Path) -> None:
    """`impl` itself, without parity."""
    run = ask(small)
    model, batch = load(small, "float32"), run.batch
    together = model(**batch.arguments(model, "cpu"))
    for number, ids in enumerate(ROWS):
        assert batch.text is not None
        torch.testing.assert_close(together[number][batch.text[number]], model(torch.tensor([ids]))[0])


# -- what is not compared --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["bfloat16", "float32"]))
@pytest.mark.parametrize("name", CLEAN)
def test_what_stands_in_padding_is_free(small: Path, name: str, dtype: str) -> None:
    found = planted(small, CLEAN[name], dtype=dtype, pad="right")
    assert found.verdict == "match", found.headline
    assert found.next_token is not None
    assert found.next_token.positions == sum(LENGTHS)


@pytest.mark.parametrize("seed", slow_but([0], range(4)))
def test_no_number_of_a_report_depends_on_padding(small: Path, tmp_path: Path, seed: int) -> None:
    """The same dump twice, once with noise in the padded rows of every site."""
    run = ask(small, "float32", pad=("left", "right")[seed % 2])
    recorded = tmp_path / "port.h5"
    open_candidate("impl.qwen3:load").record(run, run.model().sites, recorded).close()
    reports = []
    for noise in (0.0, 10.0 ** (3 * seed)):
        path = tmp_path / f"{noise}.safetensors"
        spoil(recorded, path, run.batch, noise)
        reports.append(diff(ask(small, "float32", pad=("left", "right")[seed % 2]), dump_file(path)))
    assert reports[0].verdict == "match"
    assert reports[0].sites == reports[1].sites
    assert reports[0].next_token == reports[1].next_token


def spoil(recorded: Path, path: Path, batch: Batch, noise: float) -> None:
    generator = np.random.default_rng(5)
    with open_dump(recorded) as dump:
        assert batch.text is not None
        arrays = {}
        for site in dump.entries:
            array = dump.read(site).copy()
            axis = array.shape.index(13)
            text = batch.text.numpy().reshape(
                [len(LENGTHS) if i == 0 else 13 if i == axis else 1 for i in range(array.ndim)]
            )
            arrays[site] = np.where(text, array, noise * generator.standard_normal(array.shape)).astype(np.float32)
        info = {name: json.dumps(getattr(dump.info, name)) for name in ("token_ids", "attention_mask", "position_ids")}
        dims = {site: " ".join(entry.dims) for site, entry in dump.entries.items() if entry.dims}
    write_safetensors(
        path, arrays, {f"parity.{key}": text for key, text in (info | {"dims": json.dumps(dims)}).items()}
    )


# -- bugs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bug", "pad", "dtype"),
    in_turn(BUGS[:1], BUGS, *[["left", "right"], ["float32", "bfloat16"]]),
    ids=lambda v: getattr(v, "id", v),
)
def test_a_bug_of_padding_is_found_and_named(small: Path, bug: PaddingBug, pad: str, dtype: str) -> None:
    found = planted(small, bug.apply, dtype=dtype, pad=pad if pad in bug.pad else bug.pad[0], **dict(bug.options))
    families = {family for finding in found.findings for family in finding.families}
    assert families == {name if "lm" in name else f"model.layers.*.{name}" for name in bug.guilty}
    assert {f.fault.id if f.fault else None for f in found.findings} == set(bug.faults)


@pytest.mark.parametrize("bug", slow_but(BUGS[:1], BUGS), ids=lambda bug: bug.id)
def test_bugs_of_padding_do_not_show_without(small: Path, bug: PaddingBug) -> None:
    if bug.id != "answer-at-padding":
        run = run_spec(RunOptions(model=str(small), dtype="float32", tokens="5 6 7 8 9 10", power=False))
        model = load(small, "float32")
        bug.apply(model)
        assert diff(run, open_candidate(model)).verdict == "match"


# -- what cannot be ----------------------------------------------------------------------------------------------


def test_a_module_without_a_mask_is_one_line(small: Path) -> None:
    with pytest.raises(CandidateError, match="takes no mask, and the batch is padded: forward takes input_ids"):
        diff(ask(small), open_candidate(IdsAlone(load(small))))


def test_a_runtime_without_a_mask_is_one_line(small: Path) -> None:
    class Other(Candidate):
        name = "other"

    with pytest.raises(UsageError, match="other takes no mask"):
        diff(ask(small), Other())  # type: ignore[abstract]


def test_a_row_too_short_to_be_decoded_is_one_line(small: Path) -> None:
    with pytest.raises(UsageError, match="--decode 6: row 2 has 6 tokens"):
        ask(small, decode=6)


def test_a_dump_without_the_mask_is_not_compared_with_a_padded_batch(small: Path, tmp_path: Path) -> None:
    run = ask(small)
    metadata = {"parity.token_ids": json.dumps(run.token_ids)}
    write_safetensors(tmp_path / "port.safetensors", {"lm_head": np.zeros((3, 13, 301), np.float32)}, metadata)
    with pytest.raises(IncomparableError, match=r"without a mask.*write it: parity\.attention_mask"):
        diff(run, dump_file(tmp_path / "port.safetensors"))


# -- the reference itself ----------------------------------------------------------------------------------------


def test_padding_that_leaks_in_the_reference_is_told(small: Path) -> None:
    run = ask(small)
    reference = Reference(run.model())
    assert [check.ok for check in padding_check(reference, run.batch)] == [True]
    assert not padding_check(reference, Batch(run.ids))

    def leaking(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = type(self).forward(self, x, *args, **kwargs)
        return out + x.mean(1, keepdim=True)

    with reference.precise.loaded(0):
        rebind(reference.precise.layers[0].mlp, leaking)
        (check,) = padding_check(reference, run.batch)
    assert not check.ok
    assert "transformers itself computes row 0 otherwise than alone" in check.detail


MODELS = (
    "mistral",
    "gemma3",
    "deepseek_v3",
    "mixtral",
    "qwen3_next",
    "lfm2",
    "gpt2",
    "bloom",
    "gpt_oss",
    "mamba2",
    "phi",
)


@pytest.mark.parametrize(
    ("name", "pad", "dtype"), in_turn(["mistral"], MODELS, ["right", "left"], ["float32", "bfloat16"])
)
def test_models_of_transformers_match_padded(tmp_path: Path, name: str, pad: str, dtype: str) -> None:
    path = make(name, tmp_path / name, dtype)
    found = diff(ask(path, dtype, pad=pad), open_candidate("hf:"))
    assert found.verdict == "match", found.headline


# -- where a run is divided, or asked something else -----------------------------------------------------------


@pytest.mark.slow
def test_parts_of_a_padded_run_in_several_calls_make_the_whole(small: Path, tmp_path: Path) -> None:
    run, dump = ask(small, decode=2), tmp_path / "port.h5"
    model = load(small, "float32")
    BUGS[0].apply(model)
    open_candidate(model).record(run, run.model().sites, dump).close()
    asked = Asked(str(dump), None, RunOptions(model=str(small), power=False))
    paths = [tmp_path / f"{number}.part" for number in (1, 2)]
    for number, path in enumerate(paths, 1):
        compute_part(asked, Shard(number, 2), path)
    found, expected = merge(paths), diff(ask(small, decode=2), dump_file(dump))
    assert (found.verdict, found.findings) == (expected.verdict, expected.findings)
    assert found.sites == expected.sites
    assert sum(is_cached(m.site) for m in found.sites) == 4


def test_invariance_of_a_padded_batch_is_refused_in_one_line(small: Path) -> None:
    with pytest.raises(UsageError, match="3 rows of tokens: --batch repeats one row"):
        invariance(ask(small), open_candidate("impl.qwen3:load"), Settings(batch=(2,)), Observer())


def test_two_dumps_of_a_padded_batch_are_refused_in_one_line(small: Path, tmp_path: Path) -> None:
    paths = (tmp_path / "a.h5", tmp_path / "b.h5")
    for path in paths:
        run = ask(small)
        open_candidate("impl.qwen3:load").record(run, run.model().sites, path).close()
    with pytest.raises(IncomparableError, match=r"holds a padded batch\. Compare each"):
        contrast(paths, None, RunOptions(model=str(small), power=False), "", Observer())


def test_what_is_measured_by_counts_text_alone(small: Path) -> None:
    run = ask(small)
    bench = Workbench(Reference(run.model()), run.batch, lambda _site: None)
    site = next(site for site in bench.sites.values() if site.name.endswith("q_rope"))
    generator = torch.Generator().manual_seed(2)
    truth = torch.randn((3, site.shape[1], 13, site.shape[3]), generator=generator)
    yardstick = bench.yardstick(site.name, truth, truth * (1 + 1e-6))
    assert yardstick is not None
    assert yardstick.rows.rr.size == sum(LENGTHS) * site.shape[1]
