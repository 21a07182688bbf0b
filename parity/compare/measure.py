"""The first stage: replay the reference on the candidate's inputs, and measure every site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parity.candidates.dump_file import working_dtype
from parity.compare.align import Pair
from parity.compare.metrics import Metrics, counting_ulps, measuring
from parity.compare.next_token import DRAWS, Ending, ending
from parity.compare.sides import Sides
from parity.observer import Observer
from parity.reference.floor import Local, measuring_local
from parity.reference.pieces import Piece
from parity.reference.replay import Replayed
from parity.reference.transfer import Task, run_together
from parity.run_spec import DTYPES

_NARROW = (torch.bfloat16, torch.float16)
_SAMPLE = 4096


@dataclass(frozen=True)
class MeasuredSite:
    """A site after measuring, before it is judged: the run's rounding mode is known only at the end."""

    pair: Pair
    metrics: Metrics
    local: Local
    ulps: tuple[int, ...] | None
    dtype: str


@dataclass(frozen=True)
class Measured:
    """Every site that both sides have, by name in order of execution, and what the logits say."""

    sites: Mapping[str, MeasuredSite]
    ending: Ending


def measure(sides: Sides, observer: Observer) -> Measured:
    """Measure all sites that are not left out, with one piece of the model in memory at a time."""
    model = sides.reference.working
    storage = Storage.of(sides)
    sites: dict[str, MeasuredSite] = {}
    end = Ending()
    wanted = sides.pieces
    replayed = sides.reference.replay(sides.run.batch, sides.recorded, sides.run.options.noise, wanted=wanted)
    for done, piece in enumerate(wanted):
        observer.show(f"replaying {piece_name(piece)}", done, len(wanted))
        with observer.timed("replay"):
            _, values = next(replayed)
        with observer.timed("measure"):
            sites |= _measured(values, sides, storage)
            if values and values[-1].site.name == model.sites[-1].name:
                with observer.surviving("next token"):
                    end = ending(values[-1], sides.run.batch, sides.run.checkpoint, observer)
        del values  # they would be in memory beside the next piece's
    del replayed
    with observer.surviving("next token"):
        end = _second_look(end, sides, observer)
    return Measured(sites, end)


def _measured(values: Sequence[Replayed], sides: Sides, storage: Storage) -> dict[str, MeasuredSite]:
    """The sites of a piece that both sides have."""
    pairs = {v.site.name: pair for v in values if isinstance(pair := sides.pairs[v.site.name], Pair)}
    tasks = [_measuring(v, pairs[v.site.name], sides, storage) for v in values if v.site.name in pairs]
    return dict(zip(pairs, run_together(tasks), strict=True))


def _second_look(end: Ending, sides: Sides, observer: Observer) -> Ending:
    """The ending again, with the noise of each flipped token measured, where the reference's does not explain it."""
    if end.next_token is None or not end.next_token.unexplained_flips or sides.run.options.noise >= DRAWS:
        return end
    with observer.timed("flipped tokens"):
        last = sides.reference.working.pieces[-1:]
        (_, values), *_ = sides.reference.replay(sides.run.batch, sides.recorded, DRAWS, wanted=last)
    return replace(end, next_token=ending(values[-1], sides.run.batch, sides.run.checkpoint, observer).next_token)


def piece_name(piece: Piece) -> str:
    """What progress calls a piece of the model."""
    return f"layer {piece}" if isinstance(piece, int) else piece


def _measuring(site: Replayed, pair: Pair, sides: Sides, storage: Storage) -> Task[MeasuredSite]:
    assert site.candidate is not None, "unreachable because pairs are read before the replay"
    model, candidate = sides.reference.working, site.compared(site.candidate)
    metrics = yield from measuring(candidate, site.compared(site.plain))
    grid = yield from storage.finding_dtype(candidate)
    local = yield from measuring_local(site, model.dtype, grid, model.head_dim)
    # A masked score may be any large negative number: how far apart two of them are says nothing.
    telling = not local.bit_equal and not site.site.name.endswith(".scores")
    ulps = (yield from counting_ulps(candidate, site.compared(site.floor))) if telling else None
    return MeasuredSite(pair, metrics, local, ulps, sides.dump.entries[site.site.name].dtype)


@dataclass(frozen=True)
class Storage:
    """On which grid a candidate's numbers may lie: its own dtype's, or a narrower one that was dumped in a wider.

    `only` is the dtype that all of the dump must be stored in for a narrower grid to be no error; None if any will do.
    """

    working: torch.dtype
    only: torch.dtype | None

    @classmethod
    def of(cls, sides: Sides) -> Storage:
        """In float32, one site on a narrower grid is a narrower operation, all of them a narrower port."""
        working = sides.reference.working.dtype
        return cls(working, DTYPES[working_dtype(sides.dump)] if working is torch.float32 else None)

    def finding_dtype(self, candidate: Tensor) -> Task[torch.dtype]:
        """The dtype whose grid the numbers of a candidate's activation lie on. `candidate` may have any shape."""
        if candidate.dtype in _NARROW:
            return candidate.dtype if self.only in (None, candidate.dtype) else self.working
        if self.working in _NARROW:
            return self.working
        # A few numbers show that most sites fit no narrower grid.
        for some in (candidate.flatten()[:_SAMPLE], candidate):
            fits = yield torch.stack([(some.to(d).to(some.dtype) == some).all() for d in _NARROW])
            if not fits.any():
                return self.working
        fitting = _NARROW[int(fits.argmax())]
        return fitting if self.only in (None, fitting) else self.working
