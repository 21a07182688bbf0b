"""What could this run have revealed? Each fault of the catalogue is replayed, and its effect compared with the floor.

A fault whose effect is smaller than a few floors on these tokens, in this dtype, would have gone unseen; a
report that does not say so mistakes blindness for health.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from parity.diagnose.workbench import Workbench
from parity.faults import Fault, shows_at
from parity.observer import Observer
from parity.reasons import Invisible, NotTried
from parity.reference.one_operation import LoadedPiece
from parity.reference.pieces import EMBED, HEAD, Piece
from parity.results import Power

# A fault that would show at this many floors or more is visible.
VISIBLE = 3.0
_HEAD_TOKENS = 16
_SITES_TRIED = 4
_LARGEST_HEAD = 50_000_000


@dataclass(frozen=True)
class _Sight:
    """The largest ratio that a fault would have had so far."""

    ratio: float
    applies: bool


def power(bench: Workbench, catalogue: Iterable[Fault], observer: Observer, found: Collection[str] = ()) -> Power:
    """Which faults the run behind `bench` would have revealed; those that it has found it could see."""
    faults = list(catalogue)
    seen = {fault.id: _Sight(VISIBLE if fault.id in found else 0.0, applies=fault.id in found) for fault in faults}
    pieces = _pieces(bench)
    for done, piece in enumerate(pieces):
        observer.show("what this run could have seen", done, len(pieces))
        missing = [fault for fault in faults if _worth_a_look(seen[fault.id], piece)]
        if not missing:
            break
        with bench.piece(piece, tokens=_HEAD_TOKENS) as at:
            if at is not None:
                for fault, sight in _look(missing, at, bench):
                    before = seen[fault.id]
                    seen[fault.id] = _Sight(max(before.ratio, sight.ratio), before.applies or sight.applies)
    known = [fault for fault in faults if seen[fault.id].applies]
    untried = [fault for fault in faults if _is_large(bench) and _shows_only_at_ends(fault, bench)]
    return Power(
        visible=tuple(fault.id for fault in known if seen[fault.id].ratio >= VISIBLE),
        invisible=tuple(_invisible(fault, seen[fault.id].ratio) for fault in known if seen[fault.id].ratio < VISIBLE),
        not_tried=tuple(NotTried(fault.id, "large") for fault in untried),
        dtype=str(bench.reference.working.dtype).removeprefix("torch."),
    )


def _shows_only_at_ends(fault: Fault, bench: Workbench) -> bool:
    model = bench.reference.working
    inside = any(shows_at(fault, site.name) for site in model.sites_of(0))
    return not inside and any(shows_at(fault, site.name) for end in (EMBED, HEAD) for site in model.sites_of(end))


def _pieces(bench: Workbench) -> list[Piece]:
    """The first and the middle layer and the ends: a fault that none of them shows is not counted as visible."""
    return [*sorted({0, len(bench.reference.working.layers) // 2}), *(() if _is_large(bench) else (EMBED, HEAD))]


def _is_large(bench: Workbench) -> bool:
    """Whether copies of embedding and head would take more memory than all the rest."""
    config = bench.reference.working.config
    return bool(config.vocab_size * config.hidden_size > _LARGEST_HEAD)


def _worth_a_look(sight: _Sight, piece: Piece) -> bool:
    """Faults seen already need no second look, and those of the layers none at the ends, which are large."""
    return sight.ratio < VISIBLE and (isinstance(piece, int) or not sight.applies)


def _look(faults: Sequence[Fault], at: LoadedPiece, bench: Workbench) -> Iterable[tuple[Fault, _Sight]]:
    names = [name for name in at.recorded if any(shows_at(fault, name) for fault in faults)]
    if not names:
        return
    truth = bench.compute(at, names, bench.reference.precise)
    floor = bench.compute(at, names, bench.reference.working)
    for fault in faults:
        sites = [name for name in names if shows_at(fault, name)][:_SITES_TRIED]
        if not sites or not bench.applies(fault, at.piece):
            continue
        value = (
            next((v for v in fault.number.typical if v != bench.expected(fault, at.piece)), 0.0)
            if fault.number
            else 0.0
        )
        yield fault, _Sight(_predicted(fault, value, sites, at, bench, truth, floor), applies=True)


def _predicted(
    fault: Fault,
    value: float,
    sites: Sequence[str],
    at: LoadedPiece,
    bench: Workbench,
    truth: dict[str, Tensor],
    floor: dict[str, Tensor],
) -> float:
    """The ratio that a candidate with this fault would have had, at the site where it is largest."""
    # What only rounds differently equals the reference in the precision of the truth.
    model = bench.reference.working if fault.only_rounds else bench.reference.precise
    try:
        faulty = bench.compute(at, sites, model, fault, value)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
        return 0.0
    largest = 0.0
    for site in sites:
        local = bench.local(LoadedPiece(at.piece, at.input_ids, at.hidden, faulty), site, truth[site], floor[site])
        largest = max(largest, float("inf") if local.nonfinite else local.ratio)
        if largest >= VISIBLE:
            break
    return largest


def _invisible(fault: Fault, ratio: float) -> Invisible:
    if ratio == 0:
        return Invisible(fault.id, "no effect", needs=fault.needs)
    return Invisible(fault.id, "drowns", ratio)
