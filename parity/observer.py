"""Who watches a run: what is being done now, how far it is, where the time went, and what failed on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from parity.reasons import Stage, Trouble
from parity.troubles import surviving

Show = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


def _nobody(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Observer:
    """`show` is told the progress; `seconds` adds up the time of each stage by its name.

    `troubles` are the stages that failed.
    """

    show: Show = _nobody
    seconds: dict[str, float] = field(default_factory=dict)
    troubles: list[Trouble] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes to the stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def surviving(self, stage: Stage, about: str = "") -> AbstractContextManager[None]:
        """Go on behind the block if it fails, and note that (see parity.troubles)."""
        return surviving(self.troubles, stage, about)
