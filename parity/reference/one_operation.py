"""One operation at a time: a piece run only as far as the sites in question, on the candidate's own inputs.

What the replay would replace need not be computed: a matrix product whose output the candidate recorded is
answered by the record, and the pass ends as soon as the last wanted site has been seen. Trying a fault at an
operation so costs a small part of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from parity.reference.batch import Batch
from parity.reference.pieces import Piece, PiecewiseModel
from parity.sites import without_call

Patch = Callable[[PiecewiseModel], AbstractContextManager[None]]
# How the reference itself is changed in a piece: it rounds as an accepted regime does.
Regime = Callable[[PiecewiseModel, Piece], AbstractContextManager[None]]


def no_regime(_model: PiecewiseModel, _piece: Piece) -> AbstractContextManager[None]:
    """The reference as it is."""
    return nullcontext()


@dataclass(frozen=True)
class LoadedPiece:
    """A loaded piece, what goes into it and what the candidate recorded inside it.

    `hidden` (b, t, hidden) are the candidate's hidden states before the piece; None for the embedding. The reference
    computes in the `regime`.
    """

    piece: Piece
    input_ids: Batch
    hidden: Tensor | None
    recorded: Mapping[str, Tensor]
    regime: Regime = no_regime


class _SeenAllError(Exception):
    """Ends a pass that has shown what it was run for."""


def _unchanged(_model: PiecewiseModel) -> AbstractContextManager[None]:
    return nullcontext()


def run(
    model: PiecewiseModel, at: LoadedPiece, wanted: Collection[str], patch: Patch = _unchanged
) -> dict[str, Tensor]:
    """What the model computes at the wanted sites of a loaded piece, with `patch` applied to it meanwhile.

    Most values are (b, t, d).
    """
    values: dict[str, Tensor] = {}

    def tap(site: str, fresh: Tensor) -> Tensor:
        if site in wanted:
            values[site] = fresh.clone()
            if len(values) == len(wanted):
                raise _SeenAllError
        if site not in at.recorded:
            return fresh
        return at.recorded[site].to(fresh.device, fresh.dtype)

    hidden = None if at.hidden is None else at.hidden.to(model.device, model.dtype)
    with at.regime(model, at.piece), patch(model), _answered(model, at, wanted), suppress(_SeenAllError):
        model.run(at.piece, at.input_ids, hidden, tap)
    return values


@contextmanager
def _answered(model: PiecewiseModel, at: LoadedPiece, wanted: Collection[str]) -> Iterator[None]:
    """Matrix products that nobody asks for answer with what the candidate recorded."""
    sites = model.sites_of(at.piece)
    # One that is called again has more than one answer.
    again = {site.module for site in sites if site.name != without_call(site.name)}
    with ExitStack() as stack:
        for site in sites:
            if site.module in again or site.where != "output" or site.name in wanted or site.name not in at.recorded:
                continue
            module = model.model.get_submodule(site.module)
            # A patched product is part of the question; a subclass may return more than its product.
            if type(module).forward is nn.Linear.forward and "forward" not in vars(module):
                value = at.recorded[site.name].to(model.device, model.dtype)
                stack.enter_context(_answering(module, value.clone() if site.overwritten else value))
        yield


@contextmanager
def _answering(module: nn.Module, value: Tensor) -> Iterator[None]:
    def answer(*_args: Any, **_kwargs: Any) -> Tensor:
        return value

    module.forward = answer
    try:
        yield
    finally:
        del module.forward
