"""The planted variants do what they say: a bug that changes nothing could not be missed, nor found."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from impl.qwen3 import Config, load
from parity.diagnose.workbench import Workbench
from parity.faults import CATALOGUE, by_id
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.run_spec import RunSpec
from tests.planted import BUGS, CAUSES, CLEAN, UNPLANTED, Variant, build, observe, threads
from tests.planted.causes import NAMES, NUMBERS, READINGS
from tests.planted.kinds import KINDS, checkpoint

# More than the window and the chunk of any plant.
TOKENS = 67
COMPILED = [v for v in CLEAN if v.compile]
LEGAL = [v for v in CLEAN if not v.compile]


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("planted")
    return {needs: checkpoint(needs, root, layers=2) for needs in ("", "untied", "no bias", "wide", "mha")}


@pytest.fixture(scope="module")
def plain_run(model_dirs: dict[str, Path]):
    return cache(lambda needs, dtype: observe(load(model_dirs[needs], dtype), input_ids()))


def input_ids() -> Tensor:
    return torch.randint(0, 301, (1, TOKENS), generator=torch.Generator().manual_seed(3))


def distance(a: Tensor, b: Tensor) -> float:
    """Relative distance, infinite if either holds NaN.

    Masked scores count as zero: beside numbers of 1e38 no other difference would be felt.
    """
    a, b = (torch.where(x < -1e30, 0, x) for x in (a.double(), b.double()))
    return float(((a - b).norm() / b.norm()).nan_to_num(torch.inf))


def ids(variant: Variant) -> str:
    return variant.id


def test_ids_are_unique_and_tables_long_enough() -> None:
    names = [v.id for v in (*BUGS, *CLEAN)]
    assert len(names) == len(set(names))
    assert len(BUGS) >= 40
    assert len(CLEAN) >= 12
    assert all(v.guilty for v in BUGS)
    assert not any(v.guilty for v in CLEAN)


@pytest.mark.parametrize("bug", BUGS, ids=ids)
def test_every_guilty_site_changes_first(bug: Variant, model_dirs, plain_run) -> None:
    dtype = "float32" if "float32" in bug.dtypes else bug.dtypes[0]
    layers = [0, 1] if bug.everywhere_only else [1]
    clean = plain_run(bug.needs, dtype)
    wrong = observe(build(bug, model_dirs[bug.needs], dtype, layers), input_ids())
    changed = {name for name in set(clean) & set(wrong) if distance(wrong[name], clean[name]) > 1e-7}
    assert bug.guilty_sites(layers) & changed == bug.guilty_sites(layers)
    before = [name for name in clean if name.startswith("model.layers.0.")]
    assert bug.everywhere_only or not changed & set(before), "planted in another layer as well"


@pytest.mark.parametrize("bug", [b for b in BUGS if b.inner], ids=ids)
def test_inner_sites_exist_and_change(bug: Variant, model_dirs, plain_run) -> None:
    dtype = "float32" if "float32" in bug.dtypes else bug.dtypes[0]
    clean = plain_run(bug.needs, dtype)
    wrong = observe(build(bug, model_dirs[bug.needs], dtype, [1]), input_ids())
    for name in bug.guilty_sites([1], inner=True):
        assert distance(wrong[name], clean[name]) > 1e-7


@pytest.mark.parametrize("variant", LEGAL, ids=ids)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_legal_variants_stay_close(variant: Variant, dtype: str, model_dirs, plain_run) -> None:
    if dtype not in variant.dtypes:
        pytest.skip(f"{variant.id} is about {variant.dtypes[0]}")
    model = build(variant, model_dirs[variant.needs], dtype)
    with threads(variant.threads):
        seen = observe(model, input_ids().repeat(variant.batch, 1))
    clean = plain_run(variant.needs, dtype)
    assert distance(seen["lm_head"][:1], clean["lm_head"]) < {"bfloat16": 0.06, "float32": 1e-5}[dtype]
    missing = set(clean) - set(seen)
    assert {name.rsplit(".", 1)[-1] for name in missing} <= {"scores", "probs"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", COMPILED, ids=ids)
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_still_fire_their_hooks(variant: Variant, model_dirs, plain_run) -> None:
    clean = plain_run("", "bfloat16")
    seen = observe(build(variant, model_dirs[""], "bfloat16"), input_ids())
    assert set(seen) == set(clean)
    assert distance(seen["lm_head"], clean["lm_head"]) < 0.06


def test_build_plants_in_a_copy_of_its_own(model_dirs) -> None:
    bug = next(v for v in BUGS if v.id == "channel-zero")
    build(bug, model_dirs[""], "float32")
    again = build(next(v for v in CLEAN if v.id == "plain"), model_dirs[""], "float32")
    fresh = load(model_dirs[""], "float32")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("bug", BUGS, ids=ids)
def test_guilty_names_are_modules(bug: Variant, model_dirs) -> None:
    model = load(model_dirs[bug.needs], "float32")
    names = dict(model.named_modules())
    for site in bug.guilty_sites([0, 1]) | bug.guilty_sites([0, 1], inner=True):
        assert site in names


# -- the ground truth ----------------------------------------------------------------------------------------


def test_every_bug_has_a_cause_and_every_fault_a_plant_or_an_excuse() -> None:
    assert set(CAUSES) == {bug.id for bug in BUGS}
    assert set(NAMES) | set(NUMBERS) <= set(CAUSES), "an entry for a bug that is not planted"
    planted = {fault for cause in CAUSES.values() for fault in cause.faults} - set(READINGS)
    assert not planted & set(UNPLANTED)
    assert planted | set(UNPLANTED) == {fault.id for fault in CATALOGUE}


@pytest.mark.parametrize("bug", [b for b in BUGS if set(CAUSES[b.id].faults) - set(READINGS)], ids=ids)
def test_a_cause_shows_where_the_bug_is(bug: Variant) -> None:
    """A wrong entry in the table of causes would be read as a wrong diagnosis."""
    faults = [by_id(fault) for fault in CAUSES[bug.id].faults]
    ends = {end for fault in faults for end in fault.sites}
    assert {name.removeprefix("model.").split(".")[-1] for name in bug.guilty} <= ends | {
        e.split(".")[-1] for e in ends
    }
    assert (CAUSES[bug.id].number is not None) == any(fault.number for fault in faults)


def test_excuses_hold(model_dirs: dict[str, Path]) -> None:
    """What is not planted because Qwen3 has nothing of the kind applies to none of the checkpoints."""
    applicable = {fault for kind in ("", "wide", "mha") for fault in _applicable(model_dirs[kind])}
    elsewhere = ("nothing", "several calls", "llama.cpp has it")
    excused = {fault for fault, reason in UNPLANTED.items() if not reason.startswith(elsewhere)}
    assert not applicable & excused
    assert "norm-rounding-order" in applicable


def _applicable(path: Path) -> set[str]:
    question = RunSpec(find(str(path)), ((1, 2, 3),), "float32")
    reference = Reference(question.model())
    bench = Workbench(reference, question.ids, lambda _site: None)
    found = set()
    reference.prepare(question.ids)
    for piece in reference.working.pieces:
        with reference.working.loaded(piece):
            found |= {fault.id for fault in CATALOGUE if bench.applies(fault, piece)}
    return found


def test_every_kind_of_checkpoint_has_bugs_of_its_own(model_dirs: dict[str, Path]) -> None:
    configs = {kind: Config.read(model_dirs[kind.replace("plain", "")] / "config.json") for kind in KINDS}
    where = [{kind for kind, config in configs.items() if bug.fits(config)} for bug in BUGS]
    assert all(where)
    assert {"wide"} in where
    assert {"mha"} in where


def test_a_damaged_file_leaves_the_sound_one_alone(model_dirs: dict[str, Path]) -> None:
    before = {path.name: path.read_bytes() for path in model_dirs[""].iterdir()}
    build(next(v for v in BUGS if v.id == "weight-zero"), model_dirs[""], "float32")
    assert {path.name: path.read_bytes() for path in model_dirs[""].iterdir()} == before
