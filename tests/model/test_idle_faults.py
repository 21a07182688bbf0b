"""A user's own fault that changes nothing is refused; one that does something, or needs what a run lacks, is not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional as F

from parity.compare.inject import power_of
from parity.errors import UsageError
from parity.faults import Fault, Scope
from parity.faults.fault import Change
from parity.faults.patches.modules import activation_of, forward
from parity.faults.patches.numbers import as_written
from parity.observer import Observer
from parity.reference.checkpoint import find
from parity.run_spec import RunSpec


def activation(compute: Callable[[Tensor], Tensor]) -> Callable[[Scope, float], Change]:
    return lambda scope, _number: forward(activation_of(scope), compute)


def in_half(x: Tensor) -> Tensor:
    return F.silu(x).half().to(x.dtype)


def really_in_half(x: Tensor) -> Tensor:
    with as_written():
        return in_half(x)


IDLE = Fault(
    id="mine",
    title="title",
    sites=("act_fn",),
    fix="fix",
    patch=lambda _scope, _number: nullcontext(),
    applies=lambda scope: activation_of(scope) is not None,
)
UNDONE = replace(IDLE, patch=activation(in_half))


@pytest.fixture
def tried(checkpoint: Callable[..., Path]) -> Callable[[Fault], Any]:
    path = checkpoint("qwen3")
    return lambda fault: power_of(RunSpec(find(str(path)), ((5, 17, 3, 120),), "float32", faults=(fault,)), Observer())


def test_a_patch_that_changes_nothing_is_refused(tried: Callable[[Fault], Any]) -> None:
    with pytest.raises(UsageError, match="'mine' changes nothing at act_fn"):
        tried(IDLE)


def test_a_cast_that_the_wider_pass_undoes_is_refused(tried: Callable[[Fault], Any]) -> None:
    with pytest.raises(UsageError, match=r"in float32, but not in float64.*as_written"):
        tried(UNDONE)


@pytest.mark.parametrize(
    "fault",
    [
        replace(IDLE, patch=activation(F.relu)),
        replace(IDLE, patch=activation(really_in_half)),
        replace(UNDONE, only_rounds=True),
        replace(IDLE, needs="a longer prompt"),
        replace(IDLE, applies=lambda _scope: False),
        replace(IDLE, sites=("no_such_site",)),
    ],
    ids=["another formula", "a cast as written", "only rounds", "needs more", "does not apply", "not recorded"],
)
def test_others_are_tried(fault: Fault, tried: Callable[[Fault], Any]) -> None:
    tried(fault)
