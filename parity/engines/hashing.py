"""`parity record --hash`: what a run computes is hashed as it comes, and no array of it is kept."""

from __future__ import annotations

import tempfile
from contextlib import closing
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from parity.candidates.base import Candidate, require_calls
from parity.candidates.recording import Call
from parity.candidates.torch_module import TorchModule
from parity.compare.recording import info_of, reference_info, run_reference
from parity.dump import RunInfo
from parity.dump.calls import call_name
from parity.dump.hashes import HashSink
from parity.observer import Observer
from parity.record.arrays import to_numpy
from parity.reference.pieces import PiecewiseModel
from parity.run_spec import RunSpec

RETURNED = "returned logits"
"""What a module returned, beside what its head gave."""


def record_hashes(
    run: RunSpec, candidate: Candidate | None, model: PiecewiseModel, path: Path, observer: Observer
) -> tuple[str, ...]:
    """Write the hashes of a run of the reference, or of a candidate, and return the sites that it lacks.

    Of a candidate in a runtime of its own the arrays are on disk for the time of the run. Raises ParityError.
    """
    sink = HashSink()
    if candidate is None:
        run_reference(run, model, observer, sink.add)
        sink.write(path, reference_info(run))
        return ()
    require_calls(candidate, run)
    with closing(candidate):
        info, seen = _of_candidate(run, candidate, model, sink)
    sink.write(path, info)
    return tuple(site.name for site in model.sites if site.name not in seen)


def _of_candidate(
    run: RunSpec, candidate: Candidate, model: PiecewiseModel, sink: HashSink
) -> tuple[RunInfo, set[str]]:
    """The metadata of the run, and the sites that were seen."""
    if isinstance(candidate, TorchModule):
        return run.info(candidate.name), _of_module(run, candidate, model, sink)
    with (
        tempfile.TemporaryDirectory(prefix="parity-") as folder,
        candidate.record(run, model.sites, Path(folder) / "recorded.h5") as dump,
    ):
        sink.add_all(dump)
        return info_of(dump, candidate, run), set(dump.entries)


def _of_module(run: RunSpec, module: TorchModule, model: PiecewiseModel, sink: HashSink) -> set[str]:
    seen: set[str] = set()
    numbers = {start: number for number, start in enumerate([0, *accumulate(run.calls)][:-1])}
    cached = {site.name for site in model.sites if site.where == "attention"} if len(run.calls) > 1 else set()

    def name(site: str, call: int) -> str:
        return call_name(site, call) if len(run.calls) > 1 else site

    def hashed(site: str, start: int, tokens: int, value: Tensor) -> Tensor:
        call = numbers[start]
        own = Call(call, tokens, start + tokens).inside_attention(site, value) if site in cached else value
        sink.add(name(site, call), to_numpy(own))
        seen.add(site)
        return value

    for call, logits in enumerate(module.fed(run, model.sites, hashed)):
        sink.add(name(RETURNED, call), to_numpy(logits))
    return seen
