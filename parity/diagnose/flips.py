"""What a regime's own rounding may do the other way: a number next to the border of two of its steps.

In float32 two right implementations differ in the last bits. A regime rounds such numbers coarsely, so that one of them
in thousands falls on the other side, and its row is off by a whole step. How far, is measured by computing the regime
again and again with sums that stray as they may in float32; each row is allowed the farthest that it strayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from parity.diagnose.workbench import Workbench
from parity.faults import Fault
from parity.reference import one_operation
from parity.reference.legal_ways import straying
from parity.reference.one_operation import LoadedPiece
from parity.reference.pieces import PiecewiseModel

# A number that fell on the other side does so in about every third pass.
_DRAWS = 16


def allowed_by_flips(
    at: LoadedPiece, truth: Mapping[str, Tensor], bench: Workbench, fault: Fault | None = None
) -> dict[str, Tensor]:
    """The square of how far each row of some sites may be off the truth, (…) for values (…, features).

    In the regime of the piece, with a fault on top of it if one is given.
    """
    found: dict[str, Tensor] = {}
    for seed in range(_DRAWS):

        @contextmanager
        def patch(model: PiecewiseModel, seed: int = seed) -> Iterator[None]:
            with _fault(fault, model, at, bench), straying(at.piece, seed)(model):
                yield

        names: Sequence[str] = list(truth)
        for name, value in one_operation.run(bench.reference.precise, at, names, patch).items():
            square = torch.where(truth[name].isfinite(), value - truth[name], 0).square().sum(-1)
            found[name] = torch.maximum(found[name], square) if name in found else square
    return found


@contextmanager
def _fault(fault: Fault | None, model: PiecewiseModel, at: LoadedPiece, bench: Workbench) -> Iterator[None]:
    if fault is None:
        yield
        return
    change: AbstractContextManager[None] = fault.patch(bench.scope(model, at.piece), 0.0)
    with change:
        yield
