"""Keys and values that layers share: transformers hands one dictionary to all layers, beside the hidden states.

Each pass through the pieces needs what its own layers left there, and where a candidate's keys were put in place of the
fresh ones, later layers must find the candidate's.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Shared = dict[Any, tuple[Tensor, ...]]
# A fresh value and the one that flows on in its place.
Exchange = tuple[Tensor, Tensor]


@contextmanager
def sharing(
    arguments: Mapping[str, Any], shared: dict[str, Shared], exchanged: Sequence[Exchange], *, keep: bool
) -> Iterator[None]:
    """During the block the dictionaries among a layer's arguments are those of one pass; afterwards those of before.

    With `keep` they stay. `exchanged` is filled during the block: values (b, h, t, d) put in place of fresh ones.
    """
    dictionaries = {name: value for name, value in arguments.items() if isinstance(value, UserDict)}
    before = {name: value.data for name, value in dictionaries.items()}
    for name, value in dictionaries.items():
        value.data = shared.setdefault(name, {})
    try:
        yield
    finally:
        for name, value in dictionaries.items():
            for key, tensors in value.data.items():
                value.data[key] = tuple(_onward(one, exchanged) for one in tensors)
            value.data = value.data if keep else before[name]


def shares(arguments: Mapping[str, Any]) -> bool:
    """Whether a layer with these arguments may share anything."""
    return any(isinstance(value, UserDict) for value in arguments.values())


def _onward(fresh: Tensor, exchanged: Sequence[Exchange]) -> Tensor:
    return next((onward for was, onward in exchanged if was is fresh), fresh)
