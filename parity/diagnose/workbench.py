"""The workbench of trials: one piece of the reference in two precisions, on the candidate's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor

from parity.faults import Fault, Scope, shows_at
from parity.faults.roles import roles_of
from parity.reference import one_operation
from parity.reference.batch import Batch
from parity.reference.compared import blank, compared_rows
from parity.reference.floor import Local, Yardstick, local_error
from parity.reference.one_operation import LoadedPiece, Regime
from parity.reference.pieces import HEAD, Piece, PiecewiseModel
from parity.reference.replay import Reference, Replayed
from parity.sites import Site

Recorded = Callable[[Site], Tensor | None]


class Workbench:
    """A reference, a candidate's record and the pieces in between: where faults are tried."""

    def __init__(self, reference: Reference, input_ids: Tensor | Batch, recorded: Recorded) -> None:
        self.reference, self.batch, self.recorded = reference, Batch.of(input_ids), recorded
        self.sites = {site.name: site for site in reference.working.sites}
        self._roles = roles_of(reference.working.model, reference.working.sites)

    @contextmanager
    def piece(self, piece: Piece, tokens: int | None = None) -> Iterator[LoadedPiece | None]:
        """A piece loaded in both precisions; None if the candidate did not record what goes into it.

        `tokens` keeps only the last ones in the head.
        """
        working, routes = self.reference.working, self.reference.routes
        source = working.source_of(piece)
        hidden = self.recorded(self.sites[source]) if source else None
        if source and hidden is None:
            yield None
            return
        batch = self.batch
        inside = {s.name: v for s in working.sites_of(piece) if (v := self.recorded(s)) is not None}
        # A choice of experts that was not recorded, but shown by what came of it.
        inside = {s.name: routes[s.name].choice for s in working.sites_of(piece) if s.name in routes} | inside
        if piece == HEAD and tokens is not None and hidden is not None:
            # Final norm and head treat every token alike, and a vocabulary is large.
            batch = batch.part(slice(None), slice(-tokens, None))
            hidden, inside = hidden[:, -tokens:], {name: value[:, -tokens:] for name, value in inside.items()}
        # Once for all trials.
        hidden = None if hidden is None else hidden.to(working.device)
        inside = {name: value.to(working.device) for name, value in inside.items()}
        with working.loaded(piece), self.reference.precise.loaded(piece):
            self.reference.prepare(self.batch)
            yield LoadedPiece(piece, batch, hidden, inside, self.reference.regime)

    def shows(self, fault: Fault, site: str) -> bool:
        """Whether a fault shows first at a site."""
        return shows_at(fault, site, self._roles[site])

    def scope(self, model: PiecewiseModel, piece: Piece, site: str | None = None, batch: Batch | None = None) -> Scope:
        """What a fault sees of a loaded piece, of which a site is in question, or all; `batch` may be a part."""
        module = None if site is None else model.model.get_submodule(self.sites[site].module)
        return replace(scope_of(model, piece), module=module, text=(batch or self.batch).text)

    def applies(self, fault: Fault, piece: Piece) -> bool:
        """Whether a fault can be had in a piece."""
        return fault.applies(self.scope(self.reference.working, piece))

    def expected(self, fault: Fault, piece: Piece, site: str | None = None) -> float:
        """The right value of the fault's number, at a site if one is in question; 0 for a fault without one."""
        return fault.number.expected(self.scope(self.reference.working, piece, site)) if fault.number else 0.0

    def compute(
        self,
        at: LoadedPiece,
        sites: Sequence[str],
        model: PiecewiseModel,
        fault: Fault | None = None,
        value: float = 0.0,
    ) -> dict[str, Tensor]:
        """What a model computes at sites of a loaded piece, with a fault or without. Most values are (b, t, d)."""

        def patch(patched: PiecewiseModel) -> AbstractContextManager[None]:
            assert fault is not None, "unreachable because the patch is passed with a fault only"
            return fault.patch(self.scope(patched, at.piece, batch=at.input_ids), value)

        values = one_operation.run(model, at, sites, patch) if fault else one_operation.run(model, at, sites)
        return {name: self._blank(name, at, value) for name, value in values.items()}

    def candidate(self, at: LoadedPiece, site: str) -> Tensor:
        """What the candidate recorded at a site of a loaded piece, (b, t, d) at most; 0 at padding."""
        return self._blank(site, at, at.recorded[site])

    def _blank(self, site: str, at: LoadedPiece, value: Tensor) -> Tensor:
        return blank(self.reference.working, self.sites[site], at.input_ids, value)

    def local(self, at: LoadedPiece, site: str, truth: Tensor, floor: Tensor, allowed: Tensor | None = None) -> Local:
        """The candidate's error at a site against any truth and floor.

        `truth` and `floor` have one shape, (b, t, d) for most sites; `allowed` (b, t) is as in Replayed.
        """
        working = self.reference.working
        replayed = self._replayed(site, at.recorded[site], truth, floor, allowed)
        return local_error(replayed, working.dtype, working.dtype, working.head_dim)

    def yardstick(self, site: str, truth: Tensor, floor: Tensor) -> Yardstick | None:
        """What many values at a site are measured by; None where they have to be measured one by one.

        `truth` and `floor` have one shape, (b, t, d) for most sites.
        """
        working = self.reference.working
        return Yardstick.of(self._replayed(site, floor, truth, floor), working.dtype, working.head_dim)

    def _replayed(
        self, site: str, candidate: Tensor, truth: Tensor, floor: Tensor, allowed: Tensor | None = None
    ) -> Replayed:
        one = self.sites[site]
        working = self.reference.working
        summands, tokens = working.summands(one, self.batch.shape[-1]), None
        if "token" in one.dims:
            tokens = truth.shape[one.dims.index("token")]  # of the head perhaps the last ones alone
        is_part = tokens is not None and tokens < self.batch.shape[1]
        some = self.batch.part(slice(None), slice(-tokens, None)) if is_part and tokens else self.batch
        text = compared_rows(working, one, some, truth.shape, truth.device)
        return replace(Replayed.on_its_own(one, candidate, truth, floor, summands, allowed), text=text)


def scope_of(model: PiecewiseModel, piece: Piece, sites: frozenset[str] | None = None) -> Scope:
    """What a fault sees of a loaded piece; `sites` are those that it may change, None for all."""
    index = piece if isinstance(piece, int) else None
    layer = None if index is None else model.layers[index]
    kwargs = {} if index is None else model.arguments(index)

    def weight(name: str) -> Tensor:
        stored: Tensor = model.checkpoint.tensor(name)
        return stored.to(model.device, model.dtype)

    return Scope(model.model, model.config, layer, index, kwargs, weight, sites=sites, calls=model.calls)


def acting(faults: Mapping[str, Fault]) -> Regime:
    """The reference with a fault at each of some sites, by the site's name, and nowhere else."""

    @contextmanager
    def changed(model: PiecewiseModel, piece: Piece) -> Iterator[None]:
        sites: dict[str, set[str]] = {}
        for site in model.sites_of(piece):
            if site.name in faults:
                sites.setdefault(faults[site.name].id, set()).add(site.name)
        with ExitStack() as stack:
            for fault in {fault.id: fault for fault in faults.values() if fault.id in sites}.values():
                stack.enter_context(fault.patch(scope_of(model, piece, frozenset(sites[fault.id])), 0.0))
            yield

    return changed
