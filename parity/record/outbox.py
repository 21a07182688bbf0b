"""Values on their way to the host: from a GPU they travel while the model goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from parity.record.arrays import to_numpy

# So many bytes may be on their way before the model has to wait.
MOST = 256 << 20


class Arrival(Protocol):
    """When a value is on the host, as torch's events say it."""

    def query(self) -> bool:
        """Whether it is there."""
        ...

    def synchronize(self) -> None:
        """Wait until it is there."""
        ...


class Outbox:
    """Hands values (any shape) to `take(array, *others)`, in the order in which they came; `flush` before the end.

    On the CPU each is handed over as it comes. On a GPU it is copied, for the model may write into what it gave, and
    sent to pinned memory on a stream of its own; it is handed over once it has arrived.
    """

    def __init__(self, take: Callable[..., None]) -> None:
        self._take = take
        self._under_way: deque[tuple[Tensor, Arrival, tuple[Any, ...]]] = deque()
        self._bytes = 0
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def add(self, value: Tensor, *others: Any) -> None:
        """Hand over a value (any shape), now or later; `others` go with it."""
        if value.device.type != "cuda":
            self.flush()
            self._take(to_numpy(value), *others)
            return
        self._under_way.append((*self._sent(value), others))
        self._bytes += value.nbytes
        while self._under_way and (self._bytes > MOST or self._under_way[0][1].query()):
            self._hand_over()

    def flush(self) -> None:
        """Wait for all that is on its way, and hand it over."""
        while self._under_way:
            self._hand_over()

    def _hand_over(self) -> None:
        value, arrival, others = self._under_way.popleft()
        arrival.synchronize()
        self._bytes -= value.nbytes
        self._take(to_numpy(value), *others)

    def _sent(self, value: Tensor) -> tuple[Tensor, Arrival]:
        stream = self._streams.get(value.device) or torch.cuda.Stream(value.device)  # type: ignore[no-untyped-call]
        self._streams[value.device] = stream
        kept = value.detach().clone(memory_format=torch.contiguous_format)
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            there = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
            there.copy_(kept, non_blocking=True)
            kept.record_stream(stream)  # its memory is not given away before the copy is made
            return there, stream.record_event()
