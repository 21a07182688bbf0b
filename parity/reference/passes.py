"""One of the walks through the pieces that a replay makes, and how far several of them stray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parity.errors import ModelError
from parity.record.tap import Tap
from parity.reference.batch import Batch
from parity.reference.one_operation import Regime, no_regime
from parity.reference.pieces import HEAD, Piece, PiecewiseModel
from parity.reference.products import Product, Values, run_to_product, withholds
from parity.reference.sharing import Exchange, Shared, shares, sharing
from parity.reference.transfer import row_blocks


@dataclass
class Pass:
    """One walk through the pieces: what flows on from each site is `feed(site, fresh value)`.

    `start` are the hidden states that went into the last piece, `hidden` those that came out. `withheld` are large
    logits, which a pass in the precision of the truth does not compute at once. `shared` is what its layers share
    beside the hidden states; with `is_recorded` trials of single operations find it.
    """

    model: PiecewiseModel
    feed: Tap
    regime: Regime = no_regime
    may_withhold: bool = True
    values: dict[str, Tensor] = field(default_factory=dict)
    start: Tensor | None = None
    hidden: Tensor | None = None
    withheld: Product | None = None
    is_recorded: bool = False
    shared: dict[str, Shared] = field(default_factory=dict)
    exchanged: list[Exchange] = field(default_factory=list)
    _is_sharing: bool = False

    def run(self, piece: Piece, input_ids: Tensor | Batch, *, again: bool = False) -> None:
        """Compute a loaded piece from where this pass stands, or the last one once more, for token ids (b, t)."""
        self.forget()
        self.start = self.start if again else self.hidden
        self.model.prepare(input_ids)
        arguments = self.model.arguments(piece) if isinstance(piece, int) else {}
        self._is_sharing = shares(arguments)

        def run() -> Tensor:
            return self.model.run(piece, input_ids, self.start, self._tap)

        with (
            self.regime(self.model, piece),
            sharing(arguments, self.shared, self.exchanged, keep=self.is_recorded),
        ):
            whole = self.regime is not no_regime or not self.may_withhold
            if not whole and piece == HEAD and withholds(self.model, input_ids):
                self.withheld, self.hidden = run_to_product(self.model, run), None
            else:
                self.hidden = run()

    def fired(self, site: str) -> Tensor:
        """The value (any shape) of a site of the last piece. Raises ModelError where this run did not come by it."""
        if site not in self.values:
            name = type(self.model.model).__name__
            raise ModelError(f"transformers' {name} does not come by {site} in each of its runs; parity cannot follow.")
        return self.values[site]

    def at(self, site: str) -> Values:
        """The value of a site of the last piece; most are (b, t, d)."""
        return self.values[site] if self.withheld is None or site in self.values else self.withheld

    def forget(self) -> None:
        """Give back the values of the last piece, but not what flows on."""
        self.values, self.withheld = {}, None
        self.exchanged.clear()

    def _tap(self, site: str, fresh: Tensor) -> Tensor:
        # Nothing follows the last site, and it is the largest.
        onward = fresh if site == self.model.sites[-1].name else self.feed(site, fresh)
        # A replaced input is overwritten in place, so the fresh value must be kept apart.
        self.values[site] = fresh if onward is fresh else fresh.clone()
        if self._is_sharing and onward is not fresh:
            self.exchanged.append((fresh, onward))
        return onward


def mean_square(truth: Values, others: Sequence[Values]) -> Tensor:
    """How far other values are off the truth (…, features), row by row: the mean over them of the sums of squares."""
    if isinstance(truth, Tensor):
        return _mean_square(truth, others)
    blocks = row_blocks(truth.flatten(), *(other.flatten(0, -2) for other in others))
    return torch.cat([_mean_square(exact, rows) for exact, *rows in blocks]).reshape(truth.shape[:-1])


def _mean_square(truth: Tensor, others: Sequence[Any]) -> Tensor:
    squares = [torch.where(truth.isfinite(), other - truth, 0).square().sum(-1) for other in others]
    return torch.stack(squares).mean(0)
