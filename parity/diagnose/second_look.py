"""A second look at sites in doubt: does a legal way of computing them explain what the candidate has?

In float32 first the nearest of the known orders of summation, then whatever order there may be, within what it may be
off by. In narrower dtypes no order shows, but operations between two recorded sites round one after another, and what
their errors add up to is no sample of many: one score that is rounded the other way moves a whole row. Nor is the one
draw of jitter a sample where a row has a massive channel: its inputs may have been rounded when they were recorded. How
far each row strays is measured by rounding or jitter at random, again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parity.diagnose.flips import allowed_by_flips
from parity.diagnose.workbench import Workbench
from parity.reference import one_operation
from parity.reference.floor import Local, local_error
from parity.reference.legal_ways import WAYS, straying, summing
from parity.reference.one_operation import LoadedPiece
from parity.reference.passes import mean_square

# Passes whose sums, products, tables or values are moved at random; each says of every row how far off it may be.
_DRAWS = 4
# No legal way leads farther, in units of the floor: a plain loop of 65,536 terms may be off by 65 unit roundoffs, and a
# floor is at least 0.3 of one.
FARTHEST = 256.0
ANY = "sums in an order of its own"
RECORDED = "within what the rounding of its recorded inputs makes of single rows"
FLIPPED = "within what the regime's own rounding does the other way"
ADDED_UP = "within what the roundings of operations that were not recorded add up to"

InDoubt = Callable[[str, Local], bool]


def second_look(
    measured: Mapping[str, Local], in_doubt: InDoubt, bench: Workbench, spanning: Collection[str]
) -> dict[str, Local]:
    """The sites in doubt for which a legal way leaves no doubt, measured against that way.

    `spanning` are those behind which operations lie that were not recorded: in dtypes narrower than float32, only of
    them is more asked anew than single rows.
    """
    model = bench.reference.working
    doubtful = [n for n, local in measured.items() if in_doubt(n, local) and local.ratio <= FARTHEST]
    if model.dtype is not torch.float32:
        rows = _single_rows([name for name in doubtful if name not in spanning], measured, in_doubt, bench)
        return rows | _across_pieces([name for name in doubtful if name in spanning], ADDED_UP, in_doubt, bench)
    if not model.is_cut or not doubtful:
        return {}
    cleared: dict[str, Local] = {}
    across: list[str] = []
    for piece in dict.fromkeys(model.piece_of(name) for name in doubtful):
        names = [name for name in doubtful if model.piece_of(name) == piece]
        with bench.piece(piece) as at:
            if at is None:
                across += names
            else:
                cleared |= _cleared(at, names, measured, in_doubt, bench)
    return cleared | _across_pieces(across, ANY, in_doubt, bench)


def _single_rows(
    names: Sequence[str], measured: Mapping[str, Local], in_doubt: InDoubt, bench: Workbench
) -> dict[str, Local]:
    """The sites that only single rows speak against, and that none does where jitter is drawn anew."""
    names = [name for name in names if not in_doubt(name, replace(measured[name], row_ratio=0.0))]
    # Where a regime rounds coarsely, the smallest move may flip it, and jitter would excuse anything.
    names = [name for name in names if name not in bench.reference.changed]
    cleared: dict[str, Local] = {}
    for name, found in _strayed(names, bench, jitter=True):
        anew = replace(measured[name], row_ratio=found.row_ratio, worst_tokens=found.worst_tokens, way=RECORDED)
        if not in_doubt(name, anew):
            cleared[name] = anew
    return cleared


def _across_pieces(names: Collection[str], about: str, in_doubt: InDoubt, bench: Workbench) -> dict[str, Local]:
    """The sites that leave no doubt where a way of their own is tried all along."""
    ways = ((name, replace(found, way=about)) for name, found in _strayed(names, bench))
    return {name: found for name, found in ways if not in_doubt(name, found)}


def _strayed(names: Collection[str], bench: Workbench, *, jitter: bool = False) -> Iterator[tuple[str, Local]]:
    """The sites, each row allowed what it strays by: all of the replay once more, up to the last of them."""
    if not names:
        return
    reference, working = bench.reference, bench.reference.working
    routes, wanted = dict(reference.routes), {working.piece_of(name) for name in names}
    for _, sites in reference.replay(bench.batch, bench.recorded, ways=_DRAWS, wanted=wanted, jitter=jitter):
        for site in sites:
            if site.site.name in names:
                yield site.site.name, local_error(site, working.dtype, working.dtype, working.head_dim)
    # The routers of the pieces that were left out are judged by the replay before.
    reference.routes.update(routes)


def _cleared(
    at: LoadedPiece, names: Sequence[str], measured: Mapping[str, Local], in_doubt: InDoubt, bench: Workbench
) -> dict[str, Local]:
    """The nearest known way of each site, or one of its own, where that leaves no doubt."""
    truth, floor = (bench.compute(at, names, model) for model in (bench.reference.precise, bench.reference.working))
    cleared: dict[str, Local] = {}
    for about, ways in _attempts(at, names, truth, bench):
        for name in ways.keys() - (cleared if about == ANY else {}):
            old, (other, allowed) = measured[name], ways[name]
            own_error = floor[name].to(truth[name]) - truth[name]
            found = bench.local(at, name, other, other + own_error, allowed)
            found = replace(found, way=about, inherited_rel=old.inherited_rel, total_ratio=old.total_ratio)
            nearest = name not in cleared or found.local_rel < cleared[name].local_rel
            if nearest and not in_doubt(name, found):
                cleared[name] = found
    return cleared


# The truth in another way, and the square of how far each row may be off it, where that is not known.
Other = tuple[Tensor, Tensor | None]


def _attempts(
    at: LoadedPiece, names: Sequence[str], truth: Mapping[str, Tensor], bench: Workbench
) -> Iterator[tuple[str, dict[str, Other]]]:
    """One way after another: what it is called, and what it makes of the sites."""
    precise, names = bench.reference.precise, list(names)
    for way in WAYS:
        values = one_operation.run(precise, at, names, summing(way))
        # What has no sum in it is the same in every way.
        yield way.about, {n: (v, None) for n, v in values.items() if not torch.equal(v, truth[n])}
    inside = [name for name in names if name in bench.reference.changed]
    if inside:
        flips = allowed_by_flips(at, {name: truth[name] for name in inside}, bench)
        yield FLIPPED, {name: (truth[name], flips[name]) for name in inside}
    strayed = [one_operation.run(precise, at, names, straying(at.piece, seed)) for seed in range(_DRAWS)]
    yield ANY, {name: (truth[name], mean_square(truth[name], [one[name] for one in strayed])) for name in names}
