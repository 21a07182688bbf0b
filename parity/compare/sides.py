"""What is compared: a run, the reference's answer to it, and what the candidate recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from parity.candidates.base import Candidate
from parity.compare.align import AmbiguousLayoutError, Pair, align
from parity.diagnose.workbench import acting
from parity.dump import Dump, give_back
from parity.errors import IncomparableError, UsageError
from parity.faults import Fault
from parity.reasons import Gap
from parity.record.arrays import to_torch
from parity.record.discover import with_sizes
from parity.reference.compared import blank
from parity.reference.pieces import Piece, PiecewiseModel
from parity.reference.replay import Reference
from parity.results import Check
from parity.run_spec import RunSpec
from parity.sites import CALL, Dims, Site, family, is_cached


@dataclass(frozen=True)
class Sides:
    """The two sides of a comparison, ready to be measured.

    `pairs` says for each of the reference's sites how the candidate's array is read, or why there is none; `regimes` in
    which accepted regime the reference computes at which site; `left_out` why some pieces are not measured.
    """

    run: RunSpec
    reference: Reference
    dump: Dump
    pairs: dict[str, Pair | Gap]
    name: str
    checks: tuple[Check, ...] = ()
    regimes: Mapping[str, Fault] = field(default_factory=dict)
    left_out: Mapping[Piece, str] = field(default_factory=dict)

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of the model that are measured."""
        return [piece for piece in self.reference.working.pieces if piece not in self.left_out]

    def gap(self, site: str) -> Gap | None:
        """Why a site has no measurement; None if it has one."""
        pair, piece = self.pairs[site], self.reference.working.piece_of(site)
        if isinstance(pair, Gap):
            return pair
        return Gap("left out", detail=self.left_out[piece]) if piece in self.left_out else None

    def is_absent(self, site: str) -> bool:
        """Whether a site is one that a candidate need not have, and it has not."""
        gap = self.pairs[site]
        return is_cached(site) and isinstance(gap, Gap) and gap.kind == "not recorded"

    def recorded(self, site: Site) -> Tensor | None:
        """The candidate's activation in the reference's layout; (b, t, d) for most; None where it has none."""
        pair = self.pairs[site.name]
        if not isinstance(pair, Pair):
            return None
        stored = self.dump.read(site.name)
        value = to_torch(pair.read(stored))
        is_read = is_cached(site.name)  # or hidden, and then it may be anything
        batch, model = self.run.batch, self.reference.working
        value = blank(model, site, batch, value) if is_read else batch.tamed(site.dims, value)
        give_back(stored)
        return value

    def within(self, regimes: Mapping[str, Fault]) -> Sides:
        """The same sides with the reference in these regimes too, by site."""
        at = {**self.regimes, **regimes}
        return replace(self, reference=self.reference.within(acting(at), frozenset(at)), regimes=at)


def sized_sites(model: PiecewiseModel, run: RunSpec) -> tuple[Site, ...]:
    """The model's sites with the sizes of a run."""
    batch, token = run.ids.shape
    return with_sizes(model.sites, batch, token, len(run.calls))


def not_asked_for(model: PiecewiseModel, run: RunSpec) -> dict[Piece, str]:
    """The pieces that `--layers` leaves out, and why: the ends are always measured. Raises UsageError."""
    if run.options.layers is None:
        return {}
    numbers = {int(number) for number in run.options.layers.split(",")}
    name, most = model.checkpoint.name, len(model.layers) - 1
    if not model.is_cut:
        raise UsageError(f"--layers: {name} cannot be run in pieces. Leave it out.")
    if max(numbers) > most:
        raise UsageError(f"--layers: {name} has no layer {max(numbers)}. Give some of 0 … {most}.")
    others = [piece for piece in model.pieces if isinstance(piece, int) and piece not in numbers]
    return dict.fromkeys(others, "its layer is not among those of --layers")


def pair_up(dump: Dump, candidate: Candidate, model: PiecewiseModel, run: RunSpec) -> dict[str, Pair | Gap]:
    """Every site of the reference with the candidate's array, or with the reason why there is none.

    Raises AmbiguousLayoutError where shapes leave a layout open that neither dump nor candidate can tell.
    """

    def pairs(axes: dict[str, Dims]) -> dict[str, Pair | Gap]:
        found = {site.name: _pair(dump, site, axes, model.head_dim, token) for site in sized_sites(model, run)}
        hidden = [site for site in found if site not in dump.entries and family(site) in candidate.not_observable]
        return found | {site: Gap("not observable") for site in hidden}

    token = run.ids.shape[1]
    _require_all_calls(dump, model, run)
    try:
        return pairs({})
    except AmbiguousLayoutError:
        return pairs(candidate.axes(run, model.sites))


def _require_all_calls(dump: Dump, model: PiecewiseModel, run: RunSpec) -> None:
    """Raise IncomparableError if a dump has the arrays of one call and the token ids of several.

    That is so where the first site has the rows of fewer tokens, and fits otherwise.
    """
    batch, token = run.ids.shape
    sites = [s for s in model.sites if s.name in dump.entries and "token" in s.dims and CALL not in s.dims]
    if not sites or token == 1:
        return
    entry, site = dump.entries[sites[0].name], sites[0]

    def fits(tokens: int) -> bool:
        sized = with_sizes((site,), batch, tokens)[0]
        try:
            return isinstance(align(entry, sized, model.head_dim, tokens), Pair)
        except AmbiguousLayoutError:
            return True

    fewer = [] if fits(token) else [size for size in sorted(set(entry.shape)) if size < token and fits(size)]
    if fewer:
        raise IncomparableError(
            f"{dump.path}: has {token} token ids but the arrays of one call on {fewer[0]} "
            f"({site.name} has shape {entry.shape}). Join the arrays of all calls along the token axis, or write each "
            "as NAME@0, NAME@1, … with parity.calls (dumps/README.md)."
        )


def _pair(dump: Dump, site: Site, axes: dict[str, Dims], head_dim: int | None, token: int) -> Pair | Gap:
    entry = dump.entries.get(site.name)
    if entry is None:
        return Gap("not recorded")
    return align(replace(entry, dims=entry.dims or axes.get(site.name)), site, head_dim, token)
