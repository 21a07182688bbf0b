"""Token ids: what every dump must share with the one it is compared to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parity.dump.files import whole_or_nothing, writing
from parity.errors import DumpError

TokenIds = tuple[tuple[int, ...], ...]

MOST = 1 << 22  # ids: no model reads as many


def token_rows(value: Any) -> TokenIds:
    """A batch of token ids, from a list of rows or one bare row. Raises DumpError if it is ragged."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DumpError(f"token ids are not a list — found {value!r:.60} — give [[1, 2, 3]], one list for each row")
    rows = [value] if value and not isinstance(value[0], Sequence) else value
    for row in rows:
        if not isinstance(row, Sequence) or not all(type(token) is int for token in row):
            raise DumpError(f"token ids are not integers — found {row!r:.60} — give [[1, 2, 3]], one list for each row")
    if (count := sum(map(len, rows))) > MOST:
        raise DumpError(f"token ids are too many — found {count}, at most {MOST} — record a part of the run")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise DumpError(
            f"token ids are ragged — rows of {' and '.join(map(str, lengths))} ids — "
            "pad the batch as the model saw it, or record each row as a run of its own"
        )
    return tuple(tuple(row) for row in rows)


def check_calls(calls: Any, token_ids: TokenIds | None) -> None:
    """Raise DumpError unless `calls` are numbers of tokens that add up to those of a row."""
    if not isinstance(calls, Sequence) or not calls or not all(type(call) is int and call > 0 for call in calls):
        raise DumpError(f"calls are not numbers of tokens — found {calls!r:.60} — write parity.calls = [9, 1, 1]")
    if token_ids and sum(calls) != len(token_ids[0]):
        raise DumpError(
            f"calls do not add up — {sum(calls)} tokens in {len(calls)} calls, {len(token_ids[0])} token ids — "
            "write the ids and the arrays of all calls, one after the other, and in parity.calls how many each took"
        )


def check_padding(mask: Any, positions: Any, token_ids: TokenIds | None) -> None:
    """Raise DumpError unless a mask and positions (None without) have a number for each token id, of fitting kind."""
    for what, rows, fits in (("attention_mask", mask, _is_bit), ("position_ids", positions, _is_position)):
        if rows is None:
            continue
        if token_ids is None or [len(row) for row in rows] != [len(row) for row in token_ids]:
            raise DumpError(
                f"{what} does not fit the token ids — {len(rows)} rows of {len(rows[0]) if rows else 0}, "
                f"{len(token_ids or ())} of {len(token_ids[0]) if token_ids else 0} ids — write a number for each id"
            )
        bad = next((number for row in rows for number in row if not fits(number)), None)
        if bad is not None:
            raise DumpError(f"{what} holds {bad} — {_PADDING[what]}")
    if mask is not None and not all(map(any, mask)):
        raise DumpError("attention_mask has a row without text — each has a token that is not padding — leave it out")


_PADDING = {
    "attention_mask": "a token is text (1) or padding (0) — write the mask with an entry for each token, not a bias",
    "position_ids": "positions count from 0 — write those that the model was given",
}


def _is_bit(number: int) -> bool:
    return number in (0, 1)


def _is_position(number: int) -> bool:
    return 0 <= number <= MOST


def write_tokens(path: Path | str, token_ids: TokenIds) -> None:
    """Write token ids as text for a port to read: one line for each row, ids separated by spaces."""
    path = Path(path)
    with whole_or_nothing(path) as temporary, writing(path):
        temporary.write_text("".join(" ".join(map(str, row)) + "\n" for row in token_ids))
