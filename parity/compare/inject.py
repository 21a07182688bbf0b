"""The reference with a fault in it, as a candidate: for demonstrations, and for trying one's own checks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from parity.candidates.base import Candidate
from parity.compare.recording import record_reference
from parity.diagnose.idle_faults import refuse_idle
from parity.diagnose.power import power
from parity.diagnose.workbench import Workbench
from parity.dump import Dump, open_dump
from parity.errors import UsageError
from parity.faults import Injection
from parity.observer import Observer
from parity.record.arrays import to_torch
from parity.reference.pieces import Piece
from parity.reference.replay import Reference
from parity.results import Power
from parity.run_spec import RunSpec
from parity.sites import Site


class Injected(Candidate):
    """The reference with a fault in a layer, or in all (or in the ends, if that is where it shows)."""

    pads = True

    def __init__(self, inject: Injection, reference: Reference, observer: Observer) -> None:
        model = reference.working.checkpoint.name
        self.name = f"{model} with {inject}"
        self._inject, self._reference, self._observer = inject, reference, observer

    def record(self, run: RunSpec, sites: Sequence[Site], path: Path) -> Dump:
        """Record the reference's run with the fault in it. Raises UsageError if it applies nowhere."""
        model, inject, planted = self._reference.working, self._inject, list[Piece]()
        bench = Workbench(self._reference, run.batch, lambda _site: None)

        def change(piece: Piece) -> AbstractContextManager[None]:
            wanted = not isinstance(piece, int) or inject.layer in (None, piece)
            shows = any(bench.shows(inject.fault, site.name) for site in model.sites_of(piece))
            if not (wanted and shows and bench.applies(inject.fault, piece)):
                return nullcontext()
            planted.append(piece)
            return inject.fault.patch(bench.scope(model, piece), inject.value)

        model.prepare(run.batch)
        record_reference(run, path, model, self._observer, change)
        if not planted:
            raise UsageError(
                f"fault {inject.fault.id!r} does not apply to {model.checkpoint.name} in the layers asked for."
            )
        return open_dump(path)


def power_of(run: RunSpec, observer: Observer) -> Power:
    """Which faults a run would reveal, judged on the reference's own activations."""
    reference = Reference(run.model())
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        path = Path(folder) / "reference.h5"
        record_reference(run, path, reference.working, observer)
        with open_dump(path) as dump:
            bench = Workbench(reference, run.batch, lambda site: to_torch(dump.read(site.name)))
            refuse_idle(run.faults, bench)
            return power(bench, run.faults, observer)
