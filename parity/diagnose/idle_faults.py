"""A user's own fault that changes nothing could never be the cause: that is said, not passed over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from parity.diagnose.workbench import Workbench
from parity.errors import UsageError
from parity.faults import CATALOGUE, Fault
from parity.reference.one_operation import LoadedPiece
from parity.reference.pieces import PiecewiseModel

_HEAD_TOKENS = 16
# What a fault does where it applies: something, nothing, or nothing that higher precision leaves of it.
_Effect = Literal["some", "none", "undone"]


def refuse_idle(faults: Iterable[Fault], bench: Workbench) -> None:
    """Raise UsageError for a fault, other than the catalogue's, that changes nothing at any site where it was tried.

    A fault that needs something of a run (`needs`) may rightly change nothing in one that lacks it.
    """
    known = {fault.id for fault in CATALOGUE}
    waiting = [fault for fault in faults if fault.id not in known and not fault.needs]
    idle: dict[str, _Effect] = {}
    for piece in bench.reference.working.pieces:
        if not waiting:
            return
        with bench.piece(piece, tokens=_HEAD_TOKENS) as at:
            if at is not None:
                effects = {fault.id: _effect(fault, at, bench) for fault in waiting}
                waiting = [fault for fault in waiting if effects[fault.id] != "some"]
                # What is undone at one site and nothing at another is undone.
                idle |= {id: e for id, e in effects.items() if e and idle.get(id) != "undone"}
    for fault in waiting:
        if fault.id in idle:
            raise UsageError(_sentence(fault, idle[fault.id], bench))


def _effect(fault: Fault, at: LoadedPiece, bench: Workbench) -> _Effect | None:
    """What the fault does in a piece; None where it cannot be tried."""
    names = [name for name in at.recorded if bench.shows(fault, name)]
    if not names or not bench.applies(fault, at.piece):
        return None
    expected = bench.expected(fault, at.piece)
    value = next((v for v in fault.number.typical if v != expected), 0.0) if fault.number else 0.0

    def changes(model: PiecewiseModel) -> bool:
        plain, faulty = bench.compute(at, names, model), bench.compute(at, names, model, fault, value)
        return any(not torch.equal(plain[n].nan_to_num(), faulty[n].nan_to_num()) for n in names)

    working, precise = bench.reference.working, bench.reference.precise
    try:
        if changes(working if fault.only_rounds else precise):
            return "some"
        return "undone" if not fault.only_rounds and changes(working) else "none"
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
        # It cannot be had in these shapes, which is not to change nothing.
        return None


def _sentence(fault: Fault, effect: _Effect, bench: Workbench) -> str:
    working, precise = (str(m.dtype).removeprefix("torch.") for m in (bench.reference.working, bench.reference.precise))
    if effect == "undone":
        return (
            f"fault {fault.id!r} changes the reference in {working}, but not in {precise}, in which it is tried. If it "
            "casts, cast inside as_written() of parity.faults.patches.numbers; if it only rounds otherwise, set "
            "only_rounds=True."
        )
    return (
        f"fault {fault.id!r} changes nothing at {', '.join(end or 'the output of a layer' for end in fault.sites)}, "
        "though it applies. See that its patch changes what is computed there, or say in `needs` what a run must have."
    )
