"""Measuring waits for the device a few times for a whole piece, and never looks at a number in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from parity.compare.metrics import counting_ulps, measuring
from parity.reference import transfer
from parity.reference.floor import measuring_local
from parity.reference.replay import Replayed
from parity.reference.transfer import Task, row_blocks, run_together
from parity.sites import Site

B16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def waits(task: Callable[[torch.device], Task[object]]) -> int:
    """How often a task asks for numbers. It runs beside itself on the meta device, where there is none to look at."""
    real, blind = task(torch.device("cpu")), task(torch.device("meta"))
    asked = 0
    wanted, unseen = next(real), next(blind)
    while True:
        asked += 1
        assert unseen.device.type == "meta"
        assert unseen.shape == wanted.shape
        answer = wanted.double().numpy()
        try:
            wanted = real.send(answer)
        except StopIteration:
            with pytest.raises(StopIteration):
                blind.send(answer)
            return asked
        unseen = blind.send(answer)


def site(working: torch.dtype, spoilt: float = 0.0) -> Replayed:
    """A site (1, 7, 24) with rounding errors, and one number that is what it should not be."""
    wide = F64 if working is F32 else F32
    truth = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(1), dtype=wide)
    rounded = (truth * (1 + 1e-3)).to(working)
    if spoilt:
        rounded[0, 3, 5] = spoilt
    named = Site("model.layers.0.mlp", "mlp", "output", ("batch", "token", "hidden"), (1, 7, 24))
    return Replayed(named, rounded, truth, rounded.clone(), truth, truth.to(working), truth * (1 + 1e-9), 24)


def on(device: torch.device, given: Replayed) -> Replayed:
    names = ("own", "ideal", "candidate", "truth", "floor", "jitter")
    return Replayed(given.site, **{n: getattr(given, n).to(device) for n in names}, summands=given.summands)


@pytest.mark.parametrize(("spoilt", "most"), [(0.0, 1), (math.nan, 2), (-math.inf, 2)])
@pytest.mark.parametrize("working", [B16, F32])
def test_local_error_is_asked_for_once_or_twice_where_a_number_is_not_finite(
    working: torch.dtype, spoilt: float, most: int
) -> None:
    given = site(working, spoilt)
    assert waits(lambda device: measuring_local(on(device, given), working, working, None)) == most


@pytest.mark.parametrize(("spoilt", "most"), [(0.0, 1), (math.nan, 3), (1e30, 2)])
def test_metrics_and_ulps_are_asked_for_no_more_than_care_takes(spoilt: float, most: int) -> None:
    given = site(B16, spoilt)
    assert given.candidate is not None
    c, r = given.candidate, given.floor
    assert waits(lambda device: measuring(c.to(device), r.to(device))) == most
    assert waits(lambda device: counting_ulps(c.to(device), r.to(device))) == 1 + math.isnan(spoilt)


def test_what_many_tasks_ask_for_travels_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    fetched = transfer._fetched

    def counted(wanted: Sequence[Tensor]) -> object:
        rounds.append(len(wanted))
        return fetched(wanted)

    monkeypatch.setattr(transfer, "_fetched", counted)

    def adding(number: float) -> Task[float]:
        first = yield torch.tensor([number])
        if number > 1:
            return float(first[0])
        second = yield torch.full((2, 3), number)
        assert second.shape == (2, 3)
        return float(first[0] + second.sum())

    def knowing() -> Task[float]:
        return -1.0
        yield torch.zeros(1)

    assert run_together([adding(1.0), adding(2.0), knowing(), adding(0.5)]) == [7.0, 2.0, -1.0, 3.5]
    assert rounds == [3, 2]
    assert run_together([]) == []


def test_blocks_are_all_rows_once() -> None:
    numbers = torch.arange(1000).reshape(250, 4)
    small, device = numbers.repeat(1, 9000), torch.empty(250, 4, device="meta")
    assert len(list(row_blocks(small))) > 1
    assert torch.equal(torch.cat([block for (block,) in row_blocks(small)]), small)
    assert [tuple(block.shape) for (block,) in row_blocks(device)] == [(250, 4)], "a device wants much at a time"
    assert [tuple(block.shape) for (block,) in row_blocks(torch.empty(0, 4))] == [(0, 4)]
