"""Values leave the device in their order, as they were when they were given, and not too many at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parity.record import outbox
from parity.record.outbox import Outbox


@dataclass
class Late:
    """A copy that arrives only when it is waited for, or let through."""

    value: Tensor
    there: Tensor
    arrived: bool = False

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.there.copy_(self.value)
        self.arrived = True


class OnDevice(Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


class Slow(Outbox):
    """An outbox whose copies are late."""

    def __init__(self, take: Any) -> None:
        super().__init__(take)
        self.late: list[Late] = []

    def _sent(self, value: Tensor) -> tuple[Tensor, Late]:
        plain = value.as_subclass(Tensor)
        self.late.append(Late(plain.clone(), torch.full_like(plain, torch.nan)))
        return self.late[-1].there, self.late[-1]


def filled(number: float) -> Tensor:
    return torch.full((4,), float(number)).as_subclass(OnDevice)


def test_on_the_cpu_a_value_is_handed_over_as_it_comes() -> None:
    taken: list[tuple[str, float]] = []
    box = Outbox(lambda array, name: taken.append((name, float(array[0]))))
    value = torch.ones(3)
    box.add(value, "a")
    value += 1
    box.add(value, "b")
    assert taken == [("a", 1.0), ("b", 2.0)]


def test_what_is_late_is_waited_for_and_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MOST", 40)  # bytes: two values of 16 fit
    taken: list[tuple[str, list[float]]] = []
    box = Slow(lambda array, name: taken.append((name, np.unique(array).tolist())))
    box.add(filled(1), "a")
    box.add(filled(2), "b")
    assert not taken
    box.add(filled(3), "c")  # too many: the first is waited for
    assert taken == [("a", [1.0])]
    box.late[1].synchronize()
    box.late[2].arrived = False
    box.add(filled(4), "d")
    assert taken == [("a", [1.0]), ("b", [2.0])]
    box.add(torch.full((4,), 5.0), "e")  # from the CPU, behind those that are still on their way
    assert taken[2:] == [("c", [3.0]), ("d", [4.0]), ("e", [5.0])]
    box.add(filled(6), "f")
    box.flush()
    assert taken[-1] == ("f", [6.0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_value_is_what_it_was_when_it_was_given() -> None:
    taken: list[np.ndarray[Any, Any]] = []
    box = Outbox(lambda array: taken.append(array.copy()))
    value = torch.zeros(1 << 22, device="cuda")
    for number in range(40):
        value.fill_(number)
        box.add(value.view(1 << 11, -1).T)
        value.fill_(-1)
    box.flush()
    assert [np.unique(array).tolist() for array in taken] == [[float(number)] for number in range(40)]
