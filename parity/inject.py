"""The reference with a fault in it, as a candidate: for demonstrations, and for trying one's own checks."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from parity.compare import Progress, diff_dump, record_reference, reference_for, silent
from parity.diagnose import Bench
from parity.dump import ArchiveWriter, open_dump
from parity.errors import UsageError
from parity.faults import Fault, Injection, shows_at
from parity.power import power
from parity.question import Question
from parity.record.arrays import to_numpy, to_torch
from parity.record.discover import with_sizes
from parity.reference.pieces import EMBED
from parity.reference.replay import Reference
from parity.results import Comparison, Power


def diff_injected(question: Question, inject: Injection, progress: Progress = silent) -> Comparison:
    """Compare the reference with itself, with a fault planted: a demonstration, or a trial of one's own checks."""
    reference = reference_for(question)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        path = Path(folder) / "injected.h5"
        layers = range(len(reference.working.layers)) if inject.layer is None else [inject.layer]
        record_injected(question, reference, inject.fault, inject.value, layers, path)
        with open_dump(path) as dump:
            return diff_dump(question, dump, reference, progress, name=f"{question.checkpoint.name} with {inject}")


def power_of(question: Question, progress: Progress = silent) -> Power:
    """Which faults a run on this question would reveal, judged on the reference's own activations."""
    reference = reference_for(question)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        path = Path(folder) / "reference.h5"
        record_reference(question, path, progress, reference.working)
        with open_dump(path) as dump:
            # The layers' arguments are prepared in passing; the precise twin needs its own.
            with reference.precise.loaded(EMBED):
                reference.precise.embed(question.ids, lambda _site, value: value)
            bench = Bench(reference, question.ids, lambda site: to_torch(dump.read(site.name)))
            return power(bench, question.faults, lambda done, total: progress("trying faults", done, total))


def record_injected(
    question: Question, reference: Reference, fault: Fault, value: float, layers: Collection[int], path: Path
) -> None:
    """Record the reference with a fault in the given layers (or in the ends, if that is where it shows)."""
    model = reference.working
    sites = {site.name: site for site in with_sizes(model.sites, *question.ids.shape)}
    bench = Bench(reference, question.ids, lambda _site: None)
    planted = 0
    with ArchiveWriter(path, question.info(f"{question.checkpoint.name} with {fault.id}")) as writer:

        def tap(site: str, value: Tensor) -> Tensor:
            writer.add(site, to_numpy(value), sites[site].dims)
            return value

        hidden = None
        for piece in model.pieces:
            wanted = piece in layers if isinstance(piece, int) else True
            with model.loaded(piece):
                here = wanted and any(shows_at(fault, s.name) for s in model.sites_of(piece))
                here = here and bench.applies(fault, piece)
                with fault.patch(bench.scope(model, piece), value) if here else nullcontext():
                    hidden = model.run(piece, question.ids, hidden, tap)
            planted += here
    if not planted:
        raise UsageError(f"fault {fault.id!r} does not apply to {question.checkpoint.name} in the layers asked for.")
