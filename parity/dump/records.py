"""The nouns of a dump: RunInfo, Entry, Dump."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from parity.dump.tokens import TokenIds, check_calls, check_padding, token_rows
from parity.errors import DumpError

Array = npt.NDArray[Any]

MOST_AXES = 16
LONGEST_AXIS = 1 << 40
UNNAMED = "_"
"""The name of an axis that nothing aligns on."""

DTYPES: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")},
    **{name: np.dtype(name) for name in ("float16", "float32", "float64")},
    **{name: np.dtype(name) for name in ("int64", "int32", "int16", "int8", "uint8", "bool")},
}
"""The dtypes that a dump can hold, by the name that torch gives them."""


_NO_TEXTS = ("token_ids", "versions", "notes", "calls", "attention_mask", "position_ids")


@dataclass(frozen=True)
class RunInfo:
    """What was run: which question this dump answers. None where the dump does not say."""

    producer: str | None = None
    """The program that ran, with its version."""
    model: str | None = None
    fingerprint: str | None = None
    """Hash of the weights."""
    token_ids: TokenIds | None = None
    """One row for each sequence of the batch, all of one length."""
    dtype: str | None = None
    """The dtype that the run worked in."""
    device: str | None = None
    attention: str | None = None
    prompt: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    created: str | None = None
    """ISO 8601."""
    notes: tuple[str, ...] = ()
    calls: tuple[int, ...] | None = None
    """How many tokens each call of the model took: (9, 1, 1) is a prompt of 9 and two tokens decoded after it."""
    attention_mask: TokenIds | None = None
    """1 for each token that is text, 0 for padding; None if all are text, or if the dump does not say."""
    position_ids: TokenIds | None = None
    """The position of each token as the model was given it; None if text was counted from 0."""

    def __post_init__(self) -> None:
        if self.token_ids is not None:
            token_rows(self.token_ids)  # a ragged batch is not a batch
        check_padding(self.attention_mask, self.position_ids, self.token_ids)
        if self.calls is not None:
            check_calls(self.calls, self.token_ids)
        texts = {name: value for name, value in vars(self).items() if name not in _NO_TEXTS}
        texts |= {f"notes[{i}]": note for i, note in enumerate(self.notes)}
        for name, value in texts.items():
            if not isinstance(value, str | None):
                raise DumpError(f"the run's {name} is not text — found {value!r:.60} — write a string")


def run_info(run: Mapping[str, Any]) -> RunInfo:
    """The RunInfo that parity wrote as JSON. Raises KeyError, TypeError and DumpError for one it did not write."""
    names = ("token_ids", "attention_mask", "position_ids")
    rows = {name: None if (found := run.get(name)) is None else token_rows(found) for name in names}
    calls = run.get("calls")
    calls = None if calls is None else tuple(calls)
    return RunInfo(**{**run, **rows, "notes": tuple(run["notes"]), "calls": calls})


@dataclass(frozen=True)
class Entry:
    """What is known of a site's array without reading it."""

    site: str
    dims: tuple[str, ...] | None
    """A name for each axis, "_" for one without; None if the dump does not say."""
    shape: tuple[int, ...]
    dtype: str
    """A key of DTYPES."""

    def __post_init__(self) -> None:
        check_kind(f"site {self.site!r}", self.dtype, self.shape)
        if self.dims is None:
            return
        if not all(isinstance(dim, str) for dim in self.dims):
            raise DumpError(f"site {self.site!r} has dims {self.dims!r:.60} — not all are text — name every axis")
        if len(self.dims) != len(self.shape):
            raise DumpError(
                f"site {self.site!r} has dims '{' '.join(self.dims)}' but shape {self.shape} — "
                f"{len(self.dims)} names for {len(self.shape)} axes — name every axis, '_' if it has no name"
            )
        named = [dim for dim in self.dims if dim != UNNAMED]
        if len(set(named)) != len(named):
            raise DumpError(
                f"site {self.site!r} has dims '{' '.join(self.dims)}' — a name stands for two axes — "
                "rename one of them, or call it '_'"
            )


class Dump:
    """One recorded run, opened for reading; a context manager.

    `entries` keeps the recorded order. What can be opened is whole: an incomplete dump is a DumpError.
    """

    def __init__(
        self,
        path: Path,
        info: RunInfo,
        entries: Mapping[str, Entry],
        load: Callable[[str], Array],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = path
        self.info = info
        self.entries = dict(entries)
        self._load = load
        self._close = close
        self._closed = False

    def read(self, site: str) -> Array:
        """The array recorded at a site: read-only, a view of the file wherever the format allows.

        The array stays valid after `close`. It has any shape, which `entries` says.
        """
        if self._closed:
            raise ValueError(f"{self.path}: read from a closed dump")
        if site not in self.entries:
            close = difflib.get_close_matches(site, self.entries, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "its sites are the keys of `entries`"
            raise DumpError(f"{self.path}: has no site {site!r} — it has {len(self.entries)} others — {hint}")
        array = np.asarray(self._load(site)).view()
        array.flags.writeable = False
        return array

    def close(self) -> None:
        """Let go of the file. Closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Dump({str(self.path)!r}, {len(self.entries)} sites)"


def check_kind(what: str, dtype: Any, shape: tuple[Any, ...]) -> None:
    """Raise DumpError unless an array can have this dtype and shape; `what` begins the message."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DumpError(f"{what} has dtype {dtype!s:.40} — a dump holds {', '.join(DTYPES)} — cast it first")
    if len(shape) > MOST_AXES or not all(type(size) is int and 0 <= size <= LONGEST_AXIS for size in shape):
        raise DumpError(
            f"{what} has the shape {shape!s:.80} — sizes are 0 to {LONGEST_AXIS}, on at most {MOST_AXES} axes — "
            "correct its shape"
        )


def dtype_name(dtype: np.dtype[Any], what: str) -> str:
    """The name that a dump gives to a numpy dtype; `what` begins the DumpError's message if it has none."""
    if dtype.name not in DTYPES:
        raise DumpError(f"{what} has dtype {dtype.name} — a dump holds {', '.join(DTYPES)} — cast it first")
    return dtype.name
