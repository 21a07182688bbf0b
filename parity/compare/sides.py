"""What is compared: a run, the reference's answer to it, and what the candidate recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from parity.candidates.base import Candidate
from parity.compare.align import AmbiguousLayoutError, Pair, align
from parity.dump import Dump
from parity.reasons import Gap
from parity.record.arrays import to_torch
from parity.record.discover import with_sizes
from parity.reference.pieces import PiecewiseModel
from parity.reference.replay import Reference
from parity.results import Check
from parity.run_spec import RunSpec
from parity.sites import Dims, Site, family


@dataclass(frozen=True)
class Sides:
    """The two sides of a comparison, ready to be measured.

    `pairs` says for each of the reference's sites how the candidate's array is read, or why there is none.
    """

    run: RunSpec
    reference: Reference
    dump: Dump
    pairs: dict[str, Pair | Gap]
    name: str
    checks: tuple[Check, ...] = ()

    def recorded(self, site: Site) -> Tensor | None:
        """The candidate's activation in the reference's layout; None where it has none."""
        pair = self.pairs[site.name]
        return to_torch(pair.read(self.dump.read(site.name))) if isinstance(pair, Pair) else None


def sized_sites(model: PiecewiseModel, run: RunSpec) -> tuple[Site, ...]:
    """The model's sites with the sizes of a run."""
    batch, token = run.ids.shape
    return with_sizes(model.sites, batch, token)


def pair_up(dump: Dump, candidate: Candidate, model: PiecewiseModel, run: RunSpec) -> dict[str, Pair | Gap]:
    """Every site of the reference with the candidate's array, or with the reason why there is none.

    Raises AmbiguousLayoutError where shapes leave a layout open that neither dump nor candidate can tell.
    """

    def pairs(axes: dict[str, Dims]) -> dict[str, Pair | Gap]:
        found = {site.name: _pair(dump, site, axes, model.head_dim, token) for site in sized_sites(model, run)}
        hidden = [site for site in found if site not in dump.entries and family(site) in candidate.not_observable]
        return found | {site: Gap("not observable") for site in hidden}

    token = run.ids.shape[1]
    try:
        return pairs({})
    except AmbiguousLayoutError:
        return pairs(candidate.axes(run, model.sites))


def _pair(dump: Dump, site: Site, axes: dict[str, Dims], head_dim: int | None, token: int) -> Pair | Gap:
    entry = dump.entries.get(site.name)
    if entry is None:
        return Gap("not recorded")
    return align(replace(entry, dims=entry.dims or axes.get(site.name)), site, head_dim, token)
