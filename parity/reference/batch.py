"""A batch: token ids, which of them are text and which padding, and the positions of the tokens.

Padding is run, as an engine runs it, and never compared: what stands in a padded row means nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_FLAT = "batch*token"
Rows = Sequence[Sequence[int]]
Whole = tuple[tuple[int, ...], ...]  # of one length


@dataclass(frozen=True)
class Batch:
    """Token ids (b, t).

    text       (b, t) true where a token is text, false where it is padding; None if all are text
    positions  (b, t) as the model is given them; None if it counts the tokens itself
    calls      how many tokens each call of a candidate takes, where these are several
    """

    ids: Tensor
    text: Tensor | None = None
    positions: Tensor | None = None
    calls: tuple[int, ...] = ()

    @classmethod
    def of(cls, ids: Tensor | Batch) -> Batch:
        """Token ids (b, t) without padding as a batch; a batch as it is."""
        return ids if isinstance(ids, Batch) else cls(ids)

    @classmethod
    def of_rows(cls, ids: Rows, mask: Rows | None, positions: Rows | None) -> Batch:
        """A batch from rows of equal length; a mask without padding, and positions 0, 1, 2, …, are as none."""
        text = None if mask is None else torch.tensor(mask, dtype=torch.bool)
        text = None if text is None or bool(text.all()) else text
        where = None if positions is None else torch.tensor(positions, dtype=torch.long)
        if where is None and text is not None:
            where = counted(text)
        if text is None and where is not None and torch.equal(where, torch.arange(where.shape[1]).expand_as(where)):
            where = None
        return cls(torch.tensor(ids, dtype=torch.long), text, where)

    @property
    def shape(self) -> torch.Size:
        """Rows and tokens."""
        return self.ids.shape

    def numel(self) -> int:
        """How many tokens there are, padding included."""
        return self.ids.numel()

    def same_as(self, other: Batch) -> bool:
        """Whether both hold the same numbers, in whichever calls."""
        return all(_equal(getattr(self, name), getattr(other, name)) for name in ("ids", "text", "positions"))

    def part(self, rows: slice, tokens: slice) -> Batch:
        """Some rows and tokens."""
        parts = (None if x is None else x[rows, tokens] for x in (self.ids, self.text, self.positions))
        ids, text, positions = parts
        assert ids is not None, "unreachable because every batch has ids"
        return Batch(ids, text, positions)

    def followed_by(self, tokens: Tensor) -> Batch:
        """The batch with one more token of text (b) in every row; text is counted from 0."""
        ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        text = None if self.text is None else torch.cat([self.text, torch.ones_like(self.text[:, :1])], dim=1)
        return Batch(ids, text, None if text is None else counted(text))

    def alone(self, row: int) -> Batch:
        """The text of one row (1, n), without padding; positions are counted by the model."""
        ids = self.ids[row] if self.text is None else self.ids[row][self.text[row]]
        return Batch(ids[None])

    def starting(self, rows: int, tokens: int) -> Batch:
        """The first rows and tokens; the last tokens where a row would be without text."""
        few = self.part(slice(rows), slice(tokens))
        has_text = few.text is None or bool(few.text.any(1).all())
        return few if has_text else self.part(slice(rows), slice(-tokens, None))

    def arguments(self, model: nn.Module, device: torch.device | str) -> dict[str, Tensor]:
        """What a model of transformers is called with: ids, and mask and positions (b, t) where it needs them."""
        given = {"input_ids": self.ids.to(device)}
        takes = inspect.signature(model.forward).parameters
        if self.text is not None:
            given["attention_mask"] = self.text.to(device, torch.long)
        if self.positions is not None and "position_ids" in takes:
            given["position_ids"] = self.positions.to(device)
        return given

    # -- values of a run on the batch ------------------------------------------------------------------------

    def rows(self, dims: Sequence[str], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor | None:
        """Which rows of a value (…, d) of this shape are text: booleans (…); None where all rows are."""
        known = self._along(dims[:-1], shape[:-1], device)
        return None if known is None else known.expand(tuple(shape[:-1]))

    def last(self) -> Tensor:
        """The number of the last token of text of each row (b)."""
        if self.text is None:
            return torch.full((self.ids.shape[0],), self.ids.shape[1] - 1)
        return self.ids.shape[1] - 1 - self.text.flip(1).int().argmax(1)

    def blank(self, dims: Sequence[str], value: Tensor) -> Tensor:
        """The value (any shape, of these axes) with zeros in place of what belongs to padding."""
        known = self._along(dims, value.shape, value.device)
        return value if known is None else torch.where(known, value, torch.zeros((), dtype=value.dtype).to(value))

    def tamed(self, dims: Sequence[str], value: Tensor) -> Tensor:
        """The value (any shape) with zeros where padding is not finite: times no probability it would spread."""
        known = self._along(dims, value.shape, value.device)
        return value if known is None else torch.where(known | value.isfinite(), value, torch.zeros_like(value))

    def _along(self, dims: Sequence[str], shape: Sequence[int], device: torch.device | str) -> Tensor | None:
        """`text` with an axis for each of the dims, of size 1 where it has none; None without padding or tokens."""
        if self.text is None:
            return None
        text = self.text.to(device)
        if _FLAT in dims:
            return text.reshape([shape[i] if dim == _FLAT else 1 for i, dim in enumerate(dims)])
        if "batch" not in dims or "token" not in dims:
            return None
        if dims.index("batch") > dims.index("token"):
            text = text.T
        return text.reshape([shape[i] if dim in ("batch", "token") else 1 for i, dim in enumerate(dims)])


def counted(text: Tensor) -> Tensor:
    """Positions (b, t) that count the tokens of text (b, t) alone, from 0; padding has that of the text before it."""
    return (text.long().cumsum(-1) - 1).clamp_min(0)


def padded(rows: Rows, side: str, pad: int, tail: int = 0) -> tuple[Whole, Whole | None]:
    """Rows of equal length, and their mask; no mask if they are of one length already.

    `side` is where shorter rows are filled up with the id `pad`: left or right. The last `tail` tokens of each, which
    are decoded after the others, stay at the end.
    """
    longest = max(map(len, rows))
    if all(len(row) == longest for row in rows):
        return tuple(map(tuple, rows)), None
    ids, mask = [], []
    for row in rows:
        fill, kept = longest - len(row), len(row) - (tail if side == "right" else 0)
        start = 0 if side == "left" else kept
        ids.append((*row[:start], *(pad,) * fill, *row[start:]))
        mask.append((*(1,) * start, *(0,) * fill, *(1,) * (len(row) - start)))
    return tuple(ids), tuple(mask)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.cpu(), other.cpu())
