"""The reference with a fault in it, as a candidate: for demonstrations, and for trying one's own checks."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from parity.compare.pipeline import Progress, diff_dump, record_reference, reference_for, silent
from parity.compare.run_spec import Question
from parity.diagnose.match import Bench
from parity.diagnose.power import power
from parity.dump import open_dump
from parity.errors import UsageError
from parity.faults import Injection, shows_at
from parity.record.arrays import to_torch
from parity.reference.pieces import Piece
from parity.reference.replay import Reference
from parity.results import Comparison, Power


def diff_injected(question: Question, inject: Injection, progress: Progress = silent) -> Comparison:
    """Compare the reference with itself, with a fault planted: a demonstration, or a trial of one's own checks."""
    reference = reference_for(question)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        path = Path(folder) / "injected.h5"
        _record_injected(question, reference, inject, path, progress)
        with open_dump(path) as dump:
            return diff_dump(question, dump, reference, progress, name=f"{question.checkpoint.name} with {inject}")


def power_of(question: Question, progress: Progress = silent) -> Power:
    """Which faults a run on this question would reveal, judged on the reference's own activations."""
    reference = reference_for(question)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        path = Path(folder) / "reference.h5"
        record_reference(question, path, progress, reference.working)
        with open_dump(path) as dump:
            bench = Bench(reference, question.ids, lambda site: to_torch(dump.read(site.name)))
            return power(bench, question.faults, lambda done, total: progress("trying faults", done, total))


def _record_injected(
    question: Question, reference: Reference, inject: Injection, path: Path, progress: Progress
) -> None:
    """Record the reference with a fault in a layer or in all (or in the ends, if that is where it shows)."""
    model, fault = reference.working, inject.fault
    bench = Bench(reference, question.ids, lambda _site: None)
    planted = list[Piece]()

    def plant(piece: Piece) -> AbstractContextManager[None]:
        wanted = not isinstance(piece, int) or inject.layer in (None, piece)
        shows = any(shows_at(fault, site.name) for site in model.sites_of(piece))
        if not (wanted and shows and bench.applies(fault, piece)):
            return nullcontext()
        planted.append(piece)
        return fault.patch(bench.scope(model, piece), inject.value)

    # The plain run is recorded, of a model whose pieces run with the fault in them.
    model.prepare(question.ids)
    record_reference(question, path, progress, model, plant)
    if not planted:
        raise UsageError(f"fault {fault.id!r} does not apply to {question.checkpoint.name} in the layers asked for.")
