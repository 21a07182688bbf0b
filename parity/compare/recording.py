"""The reference's plain run, recorded piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor

from parity.compare.measure import piece_name
from parity.compare.sides import sized_sites
from parity.dump import ArchiveWriter, Array, RunInfo
from parity.observer import Observer
from parity.record.arrays import to_numpy
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

    def tap(site: str, value: Tensor) -> Tensor:
        add(site, to_numpy(value), sites[site].dims)
        return value

    hidden = None
    for done, piece in enumerate(model.pieces):
        observer.show(f"recording {piece_name(piece)}", done, len(model.pieces))
        with model.loaded(piece), change(piece):
            hidden = model.run(piece, run.batch, hidden, tap)
    return list(sites.values())
