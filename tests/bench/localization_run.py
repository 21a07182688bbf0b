"""One run of the localization bench: build a candidate, compare it as `parity diff` does, keep what matters."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from impl.qwen3 import Config
from parity.candidates.base import open_candidate
from parity.compare.inject import power_of
from parity.compare.pipeline import diff
from parity.dump import ArchiveWriter
from parity.faults import CATALOGUE, by_id
from parity.observer import Observer
from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.results import Comparison, Finding
from parity.run_spec import RunSpec
from tests.planted import BUGS, CAUSES, CLEAN, Variant, build, threads

VARIANTS = {v.id: v for v in (*CLEAN, *BUGS)}
# How a planted bug was named, from the best to the worst: first, beside a rival, not at all but the report says
# that such a bug could not have been seen, not at all and nothing said, found without a name, or by a wrong one.
NAMINGS = ("first", "tied", "invisible", "unseen", "unknown", "wrong name")


@dataclass(frozen=True)
class Plant:
    """A variant and the layers that it is planted in; everywhere if there are none."""

    variant: str
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.variant}@{','.join(map(str, self.layers))}" if self.layers else self.variant


@dataclass(frozen=True)
class Run:
    """One comparison to make. Only the first plant may be a clean variant or one that damages the file."""

    checkpoint: str
    dtype: str
    tokens: tuple[int, ...]
    plants: tuple[Plant, ...]
    device: str = "cpu"

    def __str__(self) -> str:
        where = "+".join(map(str, self.plants))
        return f"{where} {self.dtype} {Path(self.checkpoint).name} T={len(self.tokens)}"


@dataclass(frozen=True)
class Named:
    """What became of one planted bug: one of NAMINGS, the causes given, and how many of its constants are right."""

    variant: str
    naming: str
    causes: str
    constants: int
    right: int


@dataclass(frozen=True)
class Outcome:
    """What came out of a run: sites flagged and sites that should have been, the largest ratio, the names given."""

    run: Run
    error: str = ""
    verdict: str = ""
    wrong: tuple[str, ...] = ()
    imprecise: tuple[str, ...] = ()
    guilty: tuple[str, ...] = ()
    findings: int = 0
    sites: int = 0
    largest: float = 0.0
    named: tuple[Named, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether the flagged sites are exactly the guilty ones."""
        return not self.error and set(self.wrong + self.imprecise) == set(self.guilty)


def run_one(run: Run) -> Outcome:
    """Make one comparison; a run that fails is an outcome too."""
    torch.set_num_threads(1)
    try:
        return _outcome(run)
    except Exception as error:
        return Outcome(run, f"{type(error).__name__}: {error}")


_references: dict[tuple[str, str, str], Reference] = {}


def _outcome(run: Run) -> Outcome:
    variants = [VARIANTS[p.variant] for p in run.plants]
    # A legal variant needs no diagnosis, but must not be accused of a wrong constant.
    faults = CATALOGUE if any(v.guilty for v in variants) else tuple(f for f in CATALOGUE if f.number)
    rows = (run.tokens,) * max(v.batch for v in variants)
    # What the run could have seen is asked below where it matters; it would take as long as all the rest.
    question = RunSpec(find(run.checkpoint), rows, run.dtype, RunOptions(device=run.device, power=False), faults=faults)
    key = (run.checkpoint, run.dtype, run.device)
    reference = _references.get(key) or Reference(question.model())
    _references[key] = reference
    layers = [p.layers or variants[i].places(len(reference.working.layers)) for i, p in enumerate(run.plants)]
    module = build(variants[0], question.checkpoint.path, run.dtype, layers[0])
    for variant, chosen in zip(variants[1:], layers[1:], strict=True):
        assert variant.damage is None, "a file can be damaged only before it is loaded"
        variant.apply(module, chosen)
    module.to(run.device)
    with threads(variants[0].threads):
        result = _diff(question, module, variants[0].dump_dtype, reference)
    guilty = [v.guilty_sites(chosen) for v, chosen in zip(variants, layers, strict=True)]
    named = [_named(v, sites, result, question) for v, sites in zip(variants, guilty, strict=True) if sites]
    return _summary(run, result, set().union(*guilty), named)


def _summary(run: Run, result: Comparison, guilty: set[str], named: Sequence[Named]) -> Outcome:
    ratios = [s.ratio for s in result.sites if s.ratio is not None]
    return Outcome(
        run,
        verdict=result.verdict,
        wrong=tuple(s.site for s in result.sites if s.verdict in ("wrong", "nonfinite")),
        imprecise=tuple(s.site for s in result.sites if s.verdict == "imprecise"),
        # What comes after a NaN cannot be judged, and is said to be unmeasured.
        guilty=tuple(s.site for s in result.sites if s.site in guilty and s.verdict != "unmeasured"),
        findings=len(result.findings),
        sites=len(ratios),
        largest=max(ratios),
        named=tuple(named),
    )


def _named(variant: Variant, sites: set[str], result: Comparison, question: RunSpec) -> Named:
    """How the findings at a bug's sites name it: as the worst of them does."""
    cause = CAUSES[variant.id]
    found = [f for f in result.findings if sites & set(f.sites)]
    namings = [_naming(f, cause.faults) for f in found] or [_unseen(question, cause.faults)]
    reads = [
        (reading.value, reading.stderr)
        for f in found
        if f.fault is not None and f.fault.id in cause.faults and cause.number is not None
        for reading in f.fault.reads.values()
    ]
    config = Config.read(question.checkpoint.path / "config.json")
    truth = cause.number(config, len(question.token_ids[0])) if cause.number else 0.0
    return Named(
        variant.id,
        max(namings, key=NAMINGS.index),
        " & ".join(dict.fromkeys(map(_words, found))),
        len(reads),
        # A port keeps its constants in float32.
        sum(abs(value - truth) <= max(2 * stderr, 1e-6 * abs(truth)) for value, stderr in reads),
    )


def _naming(finding: Finding, right: Sequence[str]) -> str:
    if finding.fault is None:
        return "unknown"
    if finding.fault.id in right:
        return "first"
    return "tied" if set(right) & set(finding.fault.rivals) else "wrong name"


def _unseen(question: RunSpec, faults: Sequence[str]) -> str:
    """Whether the report says of a bug that drowned that it could not have been seen."""
    power = power_of(replace(question, faults=tuple(map(by_id, faults))), Observer())
    return "invisible" if {i.fault for i in power.unseen} >= set(faults) else "unseen"


def _words(finding: Finding) -> str:
    fault = finding.fault
    if fault is None:
        return "unknown"
    numbers = [f" [{n} {r.value:.7g} ± {r.stderr:.1g}]" for n, r in fault.reads.items()]
    return " = ".join((fault.id, *fault.rivals)) + "".join(numbers)


def _diff(question: RunSpec, module: Any, dump_dtype: str, reference: Reference) -> Comparison:
    if not dump_dtype:
        return diff(question, open_candidate(module), reference=reference)
    sites = reference.working.sites
    with tempfile.TemporaryDirectory() as folder:
        narrow, wide = Path(folder) / "narrow.h5", Path(folder) / "wide.h5"
        dims = {site.name: site.dims for site in sites}
        recorded = open_candidate(module).record(question, sites, narrow)
        with recorded as dump, ArchiveWriter(wide, dump.info) as writer:
            for site in dump.entries:
                writer.add(site, dump.read(site).astype(dump_dtype), dims[site])
        return diff(question, open_candidate(wide), reference=reference)
