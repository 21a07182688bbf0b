"""Work on a device that asks for its results once for all, and memory taken in blocks.

To look at a number of a GPU is to wait for it, so measurements are generators: each yields a small tensor of what it
must know and gets it back as numpy; what all of them yield travels together.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parity.reference.products import Product, Values

T = TypeVar("T")
Floats = NDArray[np.float64]
Task = Generator[Tensor, Floats, T]

# Elements for each thread: a handful of float32 temporaries of this size fit a usual L2 cache.
_IN_CACHE = 1 << 15
# A GPU wants much at a time: as float32, so many elements are 32 MB.
_ON_DEVICE = 1 << 23
# So many numbers of a product are computed together, for each of its blocks reads all of its weight.
_OF_PRODUCT = 1 << 24


def run_together(tasks: Sequence[Task[T]]) -> list[T]:
    """What each task returns. In each round all tasks that are left get what they have yielded, in one transfer."""
    results: dict[int, T] = {}
    asked: dict[int, Tensor] = {}

    def go_on(number: int, answer: Floats | None) -> None:
        try:
            asked[number] = tasks[number].send(cast(Floats, answer))
        except StopIteration as end:
            results[number] = end.value

    for number in range(len(tasks)):
        go_on(number, None)
    while asked:
        numbers, wanted = list(asked), list(asked.values())
        asked.clear()
        for number, answer in zip(numbers, _fetched(wanted), strict=True):
            go_on(number, answer)
    return [results[number] for number in range(len(tasks))]


def _fetched(wanted: Sequence[Tensor]) -> Iterator[Floats]:
    """The tensors in float64 on the host."""
    whole = torch.cat([x.reshape(-1).double() for x in wanted]).cpu().numpy()
    ends = np.cumsum([x.numel() for x in wanted])
    for part, x in zip(np.split(whole, ends[:-1]), wanted, strict=True):
        yield part.reshape(tuple(x.shape))


def row_blocks(*tensors: Values) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all tensors (n, width), as many at a time as suit the device; one empty block of no rows."""
    rows, width = tensors[0].shape
    if any(isinstance(x, Product) for x in tensors):
        step = max(1, _OF_PRODUCT // width)
        for start in range(0, rows, step):
            yield from row_blocks(*(x[start : start + step] for x in tensors))
        return
    many = _ON_DEVICE if tensors[0].device.type != "cpu" else _IN_CACHE * torch.get_num_threads()
    step = max(1, many // max(width, 1))
    for start in range(0, max(rows, 1), step):
        yield tuple(x[start : start + step] for x in tensors)
