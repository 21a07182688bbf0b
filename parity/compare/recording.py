"""A run on disk: the reference's plain one, recorded piece by piece, or a candidate's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from parity.candidates.base import Candidate, require_calls
from parity.candidates.torch_module import TorchModule
from parity.compare.measure import piece_name
from parity.compare.sides import sized_sites
from parity.dump import ArchiveWriter, Array, Dump, RunInfo
from parity.observer import Observer
from parity.record.outbox import Outbox
from parity.reference.pieces import Piece, PiecewiseModel
from parity.run_spec import RunSpec, versions
from parity.sites import Dims, Site


def _unchanged(_piece: Piece) -> AbstractContextManager[None]:
    return nullcontext()


def record_reference(
    run: RunSpec,
    path: Path,
    model: PiecewiseModel,
    observer: Observer,
    change: Callable[[Piece], AbstractContextManager[None]] = _unchanged,
) -> list[Site]:
    """Record the reference's plain run to an HDF5 dump, and return its sites.

    `change(piece)` is held while a loaded piece runs: the place for a fault.
    """
    with ArchiveWriter(path, reference_info(run)) as writer:
        return run_reference(run, model, observer, writer.add, change)


def record_candidate(run: RunSpec, candidate: Candidate, model: PiecewiseModel, path: Path) -> tuple[str, ...]:
    """Record an open candidate to an HDF5 dump, and return the sites that it lacks. Raises ParityError."""
    require_calls(candidate, run)
    with closing(candidate):
        if isinstance(candidate, TorchModule):
            with candidate.record(run, model.sites, path) as dump:
                return _lacking(dump, model)
        with (
            tempfile.TemporaryDirectory(prefix="parity-") as folder,  # what a runtime of its own leaves beside
            candidate.record(run, model.sites, Path(folder) / "recorded.h5") as dump,
            ArchiveWriter(path, info_of(dump, candidate, run)) as writer,
        ):
            for site, entry in dump.entries.items():
                writer.add(site, dump.read(site), entry.dims)
            return _lacking(dump, model)


def _lacking(dump: Dump, model: PiecewiseModel) -> tuple[str, ...]:
    return tuple(site.name for site in model.sites if site.name not in dump.entries)


def info_of(dump: Dump, candidate: Candidate, run: RunSpec) -> RunInfo:
    """What a candidate's dump says of its run, or, where it does not, what it was asked for."""
    return dump.info if dump.info.producer else replace(run.info(candidate.name), attention=None)


def reference_info(run: RunSpec) -> RunInfo:
    """The metadata of a run of the reference."""
    return run.info(f"transformers {versions()['transformers']}")


def run_reference(
    run: RunSpec,
    model: PiecewiseModel,
    observer: Observer,
    add: Callable[[str, Array, Dims], None],
    change: Callable[[Piece], AbstractContextManager[None]] = _unchanged,
) -> list[Site]:
    """Run the reference, hand the array (any shape) of each site and the names of its axes to `add`; its sites."""
    sites = {site.name: site for site in sized_sites(model, run)}

    outbox = Outbox(lambda array, site: add(site, array, sites[site].dims))

    def tap(site: str, value: Tensor) -> Tensor:
        outbox.add(value, site)
        return value

    hidden = None
    for done, piece in enumerate(model.pieces):
        observer.show(f"recording {piece_name(piece)}", done, len(model.pieces))
        with model.loaded(piece), change(piece):
            hidden = model.run(piece, run.batch, hidden, tap)
    outbox.flush()
    return list(sites.values())
