"""What could this run have revealed? Each fault of the catalogue is replayed, and its effect compared with the floor.

A fault whose effect is smaller than a few floors on these tokens, in this dtype, would have gone unseen; a
report that does not say so mistakes blindness for health.

A fault is visible from 3 floors on (VISIBLE): above the ratio 2 up to which an error is rounding, so that what is
called visible is found. The numbers of tokens of the head, of sites and of layers that are tried only save time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from parity.diagnose.workbench import Workbench
from parity.faults import Fault
from parity.observer import Observer
from parity.reasons import Invisible, NotTried
from parity.record.chain import kind_of
from parity.reference.floor import Yardstick
from parity.reference.one_operation import LoadedPiece
from parity.reference.pieces import EMBED, HEAD, Piece
from parity.results import Power

# A fault that would show at this many floors or more is visible.
VISIBLE = 3.0
_HEAD_TOKENS = 16
_SITES_TRIED = 4
_LARGEST_HEAD = 50_000_000


_LAYERS_TRIED = 4


@dataclass(frozen=True)
class _Trial:
    """How a fault would have shown: its largest ratio, and by how much its number was off for it."""

    ratio: float
    change: float = 0.0
    failure: str = ""


def power(bench: Workbench, catalogue: Iterable[Fault], observer: Observer, found: Collection[str] = ()) -> Power:
    """Which faults the run behind `bench` would have revealed; those that it has found it could see."""
    faults = list(catalogue)
    trials: dict[str, list[_Trial]] = {fault.id: [] for fault in faults}
    pieces, opened = _pieces(bench), set[Piece]()
    for done, piece in enumerate(pieces):
        observer.show("what this run could have seen", done, len(pieces))
        missing = [f for f in faults if f.id not in found and _worth_a_look(trials[f.id], piece)]
        if not missing:
            break
        with bench.piece(piece, tokens=_HEAD_TOKENS) as at:
            if at is not None:
                opened.add(piece)
                for fault, trial in _look(missing, at, bench):
                    trials[fault.id].append(trial)
    best = {name: max(tried, key=lambda trial: trial.ratio) for name, tried in trials.items() if tried}
    visible = [f.id for f in faults if f.id in found or (f.id in best and best[f.id].ratio >= VISIBLE)]
    hidden = [f for f in faults if f.id in best and f.id not in visible and not best[f.id].failure]
    return Power(
        visible=tuple(visible),
        invisible=tuple(_invisible(fault, best[fault.id].ratio) for fault in hidden),
        not_tried=tuple(
            _not_tried(fault, best.get(fault.id), opened, bench)
            for fault in faults
            if fault.id not in visible and fault not in hidden
        ),
        dtype=str(bench.reference.working.dtype).removeprefix("torch."),
        seen_from={
            name: trial.change * VISIBLE / trial.ratio
            for name, trial in best.items()
            if trial.change and 0 < trial.ratio < math.inf
        },
    )


def untried(catalogue: Iterable[Fault], dtype: str) -> Power:
    """What can be said of a model that cannot be run in pieces."""
    return Power((), (), tuple(NotTried(fault.id, "whole") for fault in catalogue), dtype)


def _not_tried(fault: Fault, trial: _Trial | None, opened: Collection[Piece], bench: Workbench) -> NotTried:
    if trial is not None and trial.failure:
        return NotTried(fault.id, "failed", trial.failure)
    model = bench.reference.working
    where = {p for p in model.pieces if any(bench.shows(fault, site.name) for site in model.sites_of(p))}
    if where and where <= {EMBED, HEAD} and _is_large(bench):
        return NotTried(fault.id, "large")
    # Where a piece could be run and the fault was not tried, it does not apply.
    return NotTried(fault.id, "no place" if not where or where & set(opened) else "not recorded")


def _pieces(bench: Workbench) -> list[Piece]:
    """A layer of each kind, the middle one and the ends: a fault that none of them shows is not counted as visible."""
    layers = bench.reference.working.layers
    first = {kind_of(layer): number for number, layer in reversed(list(enumerate(layers)))}
    numbers = sorted({*sorted(first.values())[:_LAYERS_TRIED], len(layers) // 2})
    return [*numbers, *(() if _is_large(bench) else (EMBED, HEAD))]


def _is_large(bench: Workbench) -> bool:
    """Whether copies of embedding and head would take more memory than all the rest."""
    config = bench.reference.working.config
    return bool(config.vocab_size * config.hidden_size > _LARGEST_HEAD)


def _worth_a_look(tried: Sequence[_Trial], piece: Piece) -> bool:
    """Faults seen already need no second look, and those of the layers none at the ends, which are large."""
    seen = any(trial.ratio >= VISIBLE for trial in tried)
    return not seen and (isinstance(piece, int) or not any(not trial.failure for trial in tried))


def _look(faults: Sequence[Fault], at: LoadedPiece, bench: Workbench) -> Iterable[tuple[Fault, _Trial]]:
    names = [name for name in at.recorded if any(bench.shows(fault, name) for fault in faults)]
    if not names:
        return
    truth = bench.compute(at, names, bench.reference.precise)
    floor = bench.compute(at, names, bench.reference.working)
    scales = {name: _Scale(at, name, truth[name], floor[name]) for name in names}
    for fault in faults:
        sites = [name for name in names if bench.shows(fault, name)][:_SITES_TRIED]
        if not sites:
            continue
        try:
            if not bench.applies(fault, at.piece):
                continue
            change, value = _change(fault, at, bench)
            ratio = _predicted(_Case(fault, value, sites, at), bench, scales)
        except Exception as error:  # a fault is a program that others may write, and no verdict hangs on it
            yield fault, _Trial(0.0, failure=f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
        else:
            yield fault, _Trial(ratio, change)


def _change(fault: Fault, at: LoadedPiece, bench: Workbench) -> tuple[float, float]:
    """By how much the fault's number is off where it is tried (0 if that has no size), and the number."""
    if fault.number is None:
        return 0.0, 0.0
    expected = bench.expected(fault, at.piece)
    value = next((v for v in fault.number.typical if v != expected), 0.0)
    return (0.0 if fault.number.discrete else abs(value - expected)), value


@dataclass(frozen=True)
class _Case:
    """A fault with a number, tried at some sites of a loaded piece."""

    fault: Fault
    value: float
    sites: Sequence[str]
    at: LoadedPiece


@dataclass
class _Scale:
    """A site's truth and floor, and the yardstick that is made of them when a fault first needs it."""

    at: LoadedPiece
    site: str
    truth: Tensor
    floor: Tensor
    yardstick: Yardstick | None = None
    is_made: bool = False

    def ratio(self, faulty: Tensor, bench: Workbench) -> float:
        """The ratio of a candidate with this value (b, t, d); infinite if it is not finite where it should be."""
        if not self.is_made:
            self.yardstick, self.is_made = bench.yardstick(self.site, self.truth, self.floor), True
        quick = None if self.yardstick is None else self.yardstick.ratio(faulty)
        if quick is not None:
            return quick
        local = bench.local(replace(self.at, recorded={self.site: faulty}), self.site, self.truth, self.floor)
        return math.inf if local.nonfinite else local.ratio


def _predicted(case: _Case, bench: Workbench, scales: Mapping[str, _Scale]) -> float:
    """The ratio that a candidate with this fault would have had, at the site where it is largest."""
    at, fault = case.at, case.fault
    # What only rounds differently equals the reference in the precision of the truth.
    model = bench.reference.working if fault.only_rounds else bench.reference.precise
    faulty = bench.compute(at, case.sites, model, fault, case.value)
    largest = 0.0
    for site in case.sites:
        largest = max(largest, scales[site].ratio(faulty[site], bench))
        if largest >= VISIBLE and fault.number is None:
            break
    return largest


def _invisible(fault: Fault, ratio: float) -> Invisible:
    if ratio == 0:
        return Invisible(fault.id, "no effect", needs=fault.needs)
    return Invisible(fault.id, "drowns", ratio)
