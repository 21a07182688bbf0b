"""Tables of the terminal: where they are too wide, columns of less use go, and names stay whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

_BETWEEN = 2


@dataclass(frozen=True)
class Head:
    """The head of a column.

    is_name  text, to the left; numbers stand to the right
    stays    is never left out
    folds    goes on in the next line where even the columns that stay are too wide
    """

    title: str
    is_name: bool = False
    stays: bool = False
    folds: bool = False


def fitted(heads: Sequence[Head], rows: Sequence[Sequence[Text]], width: int) -> Table:
    """The rows as a table of at most `width` characters, without the last columns that need not stay."""
    needed = [max(len(head.title), *(row[i].cell_len for row in rows), 0) + _BETWEEN for i, head in enumerate(heads)]
    kept = list(range(len(heads)))
    for i in reversed(range(len(heads))):
        if sum(needed[k] for k in kept) - _BETWEEN <= width:
            break
        if not heads[i].stays:
            kept.remove(i)
    made = Table(box=None, pad_edge=False, header_style="bold")
    for i in kept:
        head = heads[i]
        made.add_column(
            head.title,
            justify="left" if head.is_name else "right",
            no_wrap=not head.folds,
            overflow="fold",
            min_width=4,
        )
    for row in rows:
        made.add_row(*(row[i] for i in kept))
    return made
