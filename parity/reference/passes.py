"""One of the walks through the pieces that a replay makes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from parity.record.tap import Tap
from parity.reference.one_operation import Regime, no_regime
from parity.reference.pieces import HEAD, Piece, PiecewiseModel
from parity.reference.products import Product, Values, run_to_product, withholds


@dataclass
class Pass:
    """One walk through the pieces: what flows on from each site is `feed(site, fresh value)`.

    `start` are the hidden states that went into the last piece, `hidden` those that came out. `withheld` are large
    logits, which a pass in the precision of the truth does not compute at once.
    """

    model: PiecewiseModel
    feed: Tap
    regime: Regime = no_regime
    may_withhold: bool = True
    values: dict[str, Tensor] = field(default_factory=dict)
    start: Tensor | None = None
    hidden: Tensor | None = None
    withheld: Product | None = None

    def run(self, piece: Piece, input_ids: Tensor, *, again: bool = False) -> None:
        """Compute a loaded piece from where this pass stands, or the last one once more, for token ids (b, t)."""
        self.forget()
        self.start = self.start if again else self.hidden

        def run() -> Tensor:
            return self.model.run(piece, input_ids, self.start, self._tap)

        with self.regime(self.model, piece):
            whole = self.regime is not no_regime or not self.may_withhold
            if not whole and piece == HEAD and withholds(self.model, input_ids):
                self.withheld, self.hidden = run_to_product(self.model, run), None
            else:
                self.hidden = run()

    def at(self, site: str) -> Values:
        """The value of a site of the last piece; most are (b, t, d)."""
        return self.values[site] if self.withheld is None or site in self.values else self.withheld

    def forget(self) -> None:
        """Give back the values of the last piece, but not what flows on."""
        self.values, self.withheld = {}, None

    def _tap(self, site: str, fresh: Tensor) -> Tensor:
        # Nothing follows the last site, and it is the largest.
        onward = fresh if site == self.model.sites[-1].name else self.feed(site, fresh)
        # A replaced input is overwritten in place, so the fresh value must be kept apart.
        self.values[site] = fresh if onward is fresh else fresh.clone()
        return onward
