"""The first stage: replay the reference on the candidate's inputs, and measure every site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parity.candidates.dump_file import working_dtype
from parity.compare.align import Pair
from parity.compare.metrics import Metrics, measure_arrays, ulp_histogram
from parity.compare.next_token import Ending, ending
from parity.compare.sides import Sides
from parity.observer import Observer
from parity.record.arrays import to_numpy
from parity.reference.floor import Local, local_error
from parity.reference.pieces import Piece
from parity.reference.replay import Replayed
from parity.run_spec import DTYPES


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
    """Measure all sites, with one piece of the model in memory at a time."""
    model = sides.reference.working
    storage = Storage.of(sides)
    sites: dict[str, MeasuredSite] = {}
    end = Ending()
    replayed = sides.reference.replay(sides.run.ids, sides.recorded, sides.run.options.noise)
    for done, piece in enumerate(model.pieces):
        observer.show(f"replaying {piece_name(piece)}", done, len(model.pieces))
        with observer.timed("replay"):
            _, values = next(replayed)
        with observer.timed("measure"):
            for value in values:
                pair = sides.pairs[value.site.name]
                if isinstance(pair, Pair):
                    sites[value.site.name] = _measured(value, pair, sides, storage)
                if value.site.name == model.sites[-1].name:
                    end = ending(value, sides.run.checkpoint)
    return Measured(sites, end)


def piece_name(piece: Piece) -> str:
    """What progress calls a piece of the model."""
    return f"layer {piece}" if isinstance(piece, int) else piece


def _measured(site: Replayed, pair: Pair, sides: Sides, storage: Storage) -> MeasuredSite:
    assert site.candidate is not None, "unreachable because pairs are read before the replay"
    model = sides.reference.working
    metrics = measure_arrays(to_numpy(site.candidate), to_numpy(site.plain))
    local = local_error(site, model.dtype, storage.dtype_of(site.candidate), model.head_dim)
    # A masked score may be any large negative number: how far apart two of them are says nothing.
    telling = not local.bit_equal and not site.site.name.endswith(".scores")
    ulps = ulp_histogram(to_numpy(site.candidate), to_numpy(site.floor)) if telling else None
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

    def dtype_of(self, candidate: Tensor) -> torch.dtype:
        """The dtype whose grid the numbers of a candidate's activation lie on. `candidate` may have any shape."""
        narrow = (torch.bfloat16, torch.float16)
        if candidate.dtype in narrow:
            return candidate.dtype if self.only in (None, candidate.dtype) else self.working
        if self.working in narrow:
            return self.working
        fitting = [d for d in narrow if torch.equal(candidate.to(d).to(candidate.dtype), candidate)]
        return fitting[0] if fitting and self.only in (None, fitting[0]) else self.working
