"""Does padding leave text alone in the reference itself? What a padded batch is compared with rests on it.

transformers hides padding by a mask, and each row should come out as when it is run alone. Where it does not (padding
leaks into a convolution or a state, or a long row changes how short ones are rotated), nobody can tell what is right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parity.reference.batch import Batch
from parity.reference.pieces import PiecewiseModel
from parity.reference.replay import Reference
from parity.reference.self_check import pieces_to_check
from parity.results import Check

# The rows that are looked at: those with most padding.
_ROWS = 2
# How far a token may be off, relative to its size, in the precision of the truth: far above rounding there.
_LEAKS = {torch.float64: 1e-6, torch.float32: 1e-3}


def padding_check(reference: Reference, batch: Batch) -> list[Check]:
    """Whether rows of a padded batch come out as when run alone, in the precision of the truth; nothing to others.

    Looks at all of a small model, and of a large one at the first layer of each kind.
    """
    if batch.text is None:
        return []
    few = batch.text.sum(1).argsort(stable=True)[:_ROWS].sort().values
    some = Batch(batch.ids[few], batch.text[few], None if batch.positions is None else batch.positions[few])
    together, limit = _end(reference.precise, some), _LEAKS[reference.precise.dtype]
    for row, number in enumerate(few.tolist()):
        text = batch.text[number].to(together.device)
        apart = _apart(together[row][text], _end(reference.precise, some.alone(row))[0])
        if not apart <= limit:
            detail = (
                f"transformers itself computes row {number} otherwise than alone (by {apart:.1g} of a token's size)"
            )
            return [Check("padding in the reference", False, detail, vital=True)]
    return [Check("padding in the reference", True, "rows come out as when run alone", vital=True)]


def _end(model: PiecewiseModel, batch: Batch) -> Tensor:
    """What the last piece that is looked at gives for a batch (b, t, features)."""
    hidden: Tensor | None = None
    for piece in pieces_to_check(model):
        with model.loaded(piece):
            hidden = model.run(piece, batch, hidden, lambda _site, value: value)
    assert hidden is not None, "unreachable because a model has pieces"
    return hidden


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest relative difference of a token (n, features)."""
    size = other.norm(dim=-1).clamp_min(1e-30)
    return float(((one - other).norm(dim=-1) / size).max())
