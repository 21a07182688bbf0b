"""A part of the localization bench: the flagged sites are exactly the guilty ones, and legal variants have none.

Bugs and variants are planted in copies of `impl` by `tests.planted`, which shares no code with parity.
`python -m tests.bench.localization` runs them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from parity.candidates.base import open_candidate
from parity.compare.inject import Injected
from parity.compare.pipeline import diff
from parity.dump import ArchiveWriter
from parity.faults import parse
from parity.observer import Observer
from parity.options import RunOptions
from parity.record.arrays import to_numpy
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.results import Comparison
from parity.run_spec import RunSpec
from tests import checkpoints
from tests.bench.localization import summary
from tests.bench.localization_run import Outcome, Plant, Run, run_one
from tests.bench.localization_runs import TINY, bug_runs, clean_runs, material
from tests.planted import BUGS, CAUSES, CLEAN, Variant, build, observe, threads
from tests.planted.kinds import KINDS
from tests.planted.kinds import checkpoint as kind_of_checkpoint

TOKENS = tuple((97 * i * i + 31 * i + 168) % 301 for i in range(24))
LAYER = 2

FAST_BUGS = (
    "rope-interleaved",
    "norm-one-plus-w",
    "qk-norm-skipped-q",
    "mask-next-token",
    "gqa-tile",
    "act-gelu-tanh",
    "residual-dropped-mlp",
    "weight-gain",
)
FAST_CLEAN = ("plain", "sdpa", "online-softmax", "ops-fp32", "sequential", "swiglu-fused")
# Those that only a longer prompt, an earlier layer or a wider dtype tells from rounding.
_OTHERS = (
    "norm-eps-1e-3",
    "norm-not-upcast",
    "position-chunk-restart",
    "softmax-bf16",
    "kv-cache-fp8",
    "rope-inv-freq-bf16",
    "rope-phase-bf16",
    "sums-low",
    "outputs-truncated",
    "bias-missing",
    "window-applied-all-but-one",
)

_references: dict[tuple[Path, str], Reference] = {}


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterable[None]:
    yield
    _references.clear()


def compare(path: Path, variant: Variant, dtype: str, layers: tuple[int, ...] | None, folder: Path) -> Comparison:
    question = RunSpec(find(str(path)), (TOKENS,) * variant.batch, dtype, faults=())
    reference = _references.setdefault((path, dtype), None) or Reference(question.model())  # type: ignore[arg-type]
    _references[path, dtype] = reference
    module = build(variant, path, dtype, layers)
    with threads(variant.threads):
        if not variant.dump_dtype:
            return diff(question, open_candidate(module), reference=reference)
        seen = observe(module, question.ids)
    with ArchiveWriter(folder / "dump.h5", question.info(variant.id)) as writer:
        for site in reference.working.sites:
            if site.name in seen:
                writer.add(site.name, to_numpy(seen[site.name]).astype(variant.dump_dtype), site.dims)
    return diff(question, open_candidate(folder / "dump.h5"), reference=reference)


def flagged(result: Comparison) -> set[str]:
    return {m.site for m in result.sites if m.verdict in ("wrong", "imprecise", "nonfinite")}


def runs(variants: Iterable[Variant], fast: tuple[str, ...]) -> list[object]:
    """Those of `fast` in each dtype that they are about, one of them slow; every fourth of the others in one dtype."""
    slow = pytest.mark.slow
    found = []
    for number, name in enumerate(fast):
        variant = next(v for v in variants if v.id == name)
        for place, dtype in enumerate(variant.dtypes):
            # Alternating, so that the fast part sees both dtypes.
            marks = () if place == number % len(variant.dtypes) else slow
            found.append(pytest.param(variant, dtype, id=f"{name}-{dtype}", marks=marks))
    rest = [v for v in variants if v.id not in fast][::4]
    return found + [pytest.param(v, v.dtypes[0], id=f"{v.id}-{v.dtypes[0]}", marks=slow) for v in rest]


def is_here(variant: Variant) -> bool:
    """Whether a variant belongs to this part of the bench."""
    return variant.id not in _OTHERS and not variant.compile


@pytest.mark.parametrize(
    ("bug", "dtype"),
    runs([b for b in BUGS if is_here(b) and b.needs not in KINDS and not b.everywhere_only], FAST_BUGS),
)
def test_a_bug_in_one_layer_is_found_there_and_nowhere_else(
    checkpoint: Callable[..., Path], tmp_path: Path, bug: Variant, dtype: str
) -> None:
    result = compare(checkpoint("qwen3"), bug, dtype, (LAYER,), tmp_path)
    known = {m.site for m in result.sites if m.verdict != "unmeasured"}
    assert flagged(result) == bug.guilty_sites([LAYER]) & known
    assert result.verdict == "diverged"
    assert result.exit_code == 1
    inside = {layer for f in result.findings for layer in f.layers}
    assert inside <= {LAYER}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["act-gelu", "rope-interleaved"])
def test_a_bug_everywhere_is_one_finding_a_family(checkpoint: Callable[..., Path], tmp_path: Path, name: str) -> None:
    bug = next(b for b in BUGS if b.id == name)
    result = compare(checkpoint("qwen3"), bug, "bfloat16", None, tmp_path)
    assert flagged(result) == bug.guilty_sites(range(4))
    assert {f.layers for f in result.findings} == {(0, 1, 2, 3)}
    assert len(result.findings) == len(bug.guilty)


@pytest.mark.parametrize(("variant", "dtype"), runs([v for v in CLEAN if is_here(v)], FAST_CLEAN))
def test_a_legal_variant_raises_no_alarm(
    checkpoint: Callable[..., Path], tmp_path: Path, variant: Variant, dtype: str
) -> None:
    result = compare(checkpoint("qwen3"), variant, dtype, None, tmp_path)
    assert flagged(result) == set()
    assert result.verdict == "match", result.headline
    assert result.findings == ()
    assert result.exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("clean", ["sdpa", "ops-fp32"])
def test_a_bug_in_a_legal_variant_is_still_found(checkpoint: Callable[..., Path], tmp_path: Path, clean: str) -> None:
    """A port differs in both ways at once."""
    legal = next(v for v in CLEAN if v.id == clean)
    bug = next(b for b in BUGS if b.id == "residual-dropped-attention")

    def apply(model, layers) -> None:  # type: ignore[no-untyped-def]
        legal.apply(model, range(4))
        bug.apply(model, layers)

    result = compare(checkpoint("qwen3"), replace(bug, apply=apply), "bfloat16", (LAYER,), tmp_path)
    assert flagged(result) == bug.guilty_sites([LAYER])


# -- names ---------------------------------------------------------------------------------------------------


def outcome(path: Path, dtype: str, *plants: Plant) -> Outcome:
    tokens = tuple((97 * i * i + 31 * i) % 301 for i in range(40))
    found = run_one(Run(str(path), dtype, tokens, plants))
    assert not found.error, found.error
    return found


@pytest.mark.parametrize(
    ("bug", "dtype", "naming"),
    [
        ("act-gelu", "float32", "first"),
        ("window-applied-32", "bfloat16", "first"),
        ("residual-multiplier", "bfloat16", "first"),
        ("weight-previous-layer", "bfloat16", "first"),
        ("weight-bytes-swapped", "bfloat16", "first"),
        ("weight-bytes-swapped", "float32", "first"),
        ("products-tf32", "float32", "first"),
        ("act-elu", "float32", "unknown"),
        ("heads-rolled", "bfloat16", "unknown"),
        ("file-int4", "bfloat16", "unknown"),
    ],
)
def test_a_bug_gets_its_name_or_none(checkpoint: Callable[..., Path], bug: str, dtype: str, naming: str) -> None:
    found = outcome(checkpoint("qwen3"), dtype, Plant(bug, (LAYER,)))
    (named,) = found.named
    assert (named.naming, found.is_exact) == (naming, True), named.causes
    assert (naming == "unknown") == (not CAUSES[bug].faults)
    assert (named.right, named.constants > 0) == (named.constants, CAUSES[bug].number is not None)


def test_a_gain_far_from_those_seen_in_the_wild_is_read_off(checkpoint: Callable[..., Path]) -> None:
    found = outcome(checkpoint("qwen3"), "float32", Plant("embedding-gain"))
    assert [(n.naming, n.right, n.constants) for n in found.named] == [("first", 1, 1)]


@pytest.mark.parametrize("bug", ["rope-theta-default", "rope-attention-factor"])
def test_a_number_is_no_surer_than_tables_that_all_heads_share(checkpoint: Callable[..., Path], bug: str) -> None:
    tokens = tuple((89 * i * i + 18 * i + 31) % 301 for i in range(61))
    found = run_one(Run(str(checkpoint("qwen3")), "bfloat16", tokens, (Plant(bug, (1,)),)))
    assert not found.error
    assert [(n.naming, n.right, n.constants) for n in found.named] == [("first", 1, 1)], found.named


def test_rounding_of_the_same_size_is_not_the_same_rounding(tmp_path: Path) -> None:
    """Errors as large as those of a wrong way of rounding are no reason to name it; the same errors are."""
    path = kind_of_checkpoint("wide", tmp_path, layers=3)
    tokens = tuple((97 * i * i + 31 * i + 560) % 301 for i in range(80))
    run = run_one(Run(str(path), "bfloat16", tokens, (Plant("weight-8bit-blocks"),)))
    assert (run.error, [n.causes for n in run.named]) == ("", ["unknown"])
    long_sums = checkpoints.qwen3(tmp_path / "long", layers=2, intermediate_size=2048)
    question = RunSpec(find(str(long_sums)), (TOKENS,), "bfloat16", RunOptions(power=False))
    injected = Injected(parse("sums-low@1"), Reference(question.model()), Observer())
    (finding,) = diff(question, injected).findings
    assert finding.families[0].endswith("down_proj")
    assert finding.fault is not None
    assert (finding.fault.id, finding.fault.explained) == ("sums-low", pytest.approx(1.0, abs=1e-3))


def test_a_wrong_weight_does_not_silence_a_sum_without_weights(checkpoint: Callable[..., Path]) -> None:
    found = outcome(checkpoint("qwen3"), "bfloat16", Plant("weight-fp8", (0,)), Plant("residual-multiplier", (2,)))
    assert [n.naming for n in found.named] == ["first", "first"], found.named


def test_three_bugs_at_once_are_three_names(checkpoint: Callable[..., Path]) -> None:
    plants = (Plant("weight-fp8", (0,)), Plant("act-relu", (1,)), Plant("residual-dropped-mlp", (3,)))
    found = outcome(checkpoint("qwen3"), "bfloat16", *plants)
    assert found.is_exact
    assert [(n.naming, n.causes) for n in found.named] == [
        ("first", "weight-fp8"),
        ("first", "act-relu"),
        ("first", "residual-dropped-mlp"),
    ]
    assert summary([found]) == (
        "1 runs, 1 (100.0%) localized exactly; of 3 bugs of the catalogue 3 (100.0%) named first, "
        "3 (100.0%) first or tied"
    )


def test_a_wrong_name_would_be_counted(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CAUSES, "act-relu", CAUSES["act-gelu"])
    monkeypatch.setitem(CAUSES, "window-applied-32", replace(CAUSES["window-applied-32"], number=lambda _c, _t: 31.0))
    found = outcome(checkpoint("qwen3"), "float32", Plant("act-relu", (1,)), Plant("window-applied-32", (2,)))
    assert [(n.naming, n.right, n.constants) for n in found.named] == [("wrong name", 0, 0), ("first", 0, 1)]


# -- the matrix of the bench ---------------------------------------------------------------------------------


def test_the_bench_makes_the_runs_it_promises(tmp_path: Path) -> None:
    made = material(tmp_path)
    for path in (TINY, made.paths["plain"]):
        clean = [r for r in clean_runs(made, everything=False) if r.checkpoint == path]
        cells = Counter(r.plants[0].variant for r in clean)
        assert sum(count == 5 * 3 for count in cells.values()) >= 12
        assert len({r.tokens for r in clean}) == 5
    bugs = list(bug_runs(made, everything=False, half=False))
    assert {r.plants[0].variant for r in bugs} == {bug.id for bug in BUGS}
    cells = Counter(r.plants[0].variant for r in bugs if r.checkpoint != TINY)
    assert sum(count == 4 for count in cells.values()) >= 25
    assert {layer for r in bugs for layer in r.plants[0].layers if r.checkpoint == TINY} >= {0, 14, 27}
    assert len(set(bugs)) == len(bugs)
    more = set(bug_runs(made, everything=True, half=True))
    assert set(bugs) < more
    assert {r.dtype for r in more} == {"float32", "bfloat16", "float16"}
