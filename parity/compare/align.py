"""Two runs side by side: which activation belongs to which site, and how its axes must be read.

A dump declares its own layout; alignment permutes, splits and merges axes to reach the reference's, and
says so. Where a dump declares nothing, a layout is taken only if the sizes leave one possibility.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity import words
from parity.dump import Entry
from parity.dump.records import UNNAMED
from parity.errors import IncomparableError
from parity.reasons import Gap
from parity.sites import CALL, FLATTENED, Dims, Site

# Names with a meaning of their own; any other name that a dump gives an axis ("hidden", "vocab") is its feature axis.
_UNSPLIT = "+"  # in place of FLATTENED where the sizes of the parts are not known
_KNOWN = {"batch", "token", "key", "head", "head_dim", "expert", CALL}
_SYNONYMS = {"kv_head": "head", "query": "token", "seq": "token"}


@dataclass(frozen=True)
class Pair:
    """An activation of the candidate that belongs to `site`, and how to read it.

    `axes` names the candidate's axes in its own order, flattened axes with `*` between their names.
    """

    site: Site
    axes: Dims
    atoms: tuple[tuple[str, int], ...]

    @property
    def steps(self) -> tuple[str, ...]:
        """What alignment does to the candidate's array, in words; empty where nothing is done."""
        mine = tuple(axis.replace(_UNSPLIT, FLATTENED) for axis in self.axes)
        return () if mine == self.site.dims else (f"{' '.join(mine)} → {' '.join(self.site.dims)}",)

    def read(self, array: NDArray[Any]) -> NDArray[Any]:
        """The candidate's array in the layout of the reference: a view wherever numpy can give one.

        It goes in with any shape and comes out in the site's, (b, t, d) for most.
        """
        size = dict(self.atoms)
        order = [atom for axis in self.axes for atom in axis.split(FLATTENED)]
        missing = [atom for atom, _ in self.atoms if atom not in order]
        whole = array.reshape([1] * len(missing) + [size[atom] for atom in order])
        order = missing + order
        moved = np.transpose(whole, [order.index(atom) for atom, _ in self.atoms])
        return moved.reshape(self.site.shape)


class AmbiguousLayoutError(IncomparableError):
    """The sizes allow more than one reading of an activation whose axes are not declared: `gap` has them."""

    def __init__(self, site: str, gap: Gap) -> None:
        super().__init__(
            f"{site}: {words.gap(gap)}. Declare its axes in the dump: parity.dims = {{{site!r}: {gap.readings[0]!r}}}."
        )
        self.gap = gap


def align(entry: Entry, site: Site, head_dim: int | None, token: int | None = None) -> Pair | Gap:
    """Read `entry` as `site`.

    `head_dim` and `token` let flattened axes of heads and of a batch's tokens be split.
    Raises AmbiguousLayoutError where several layouts
    fit and none is declared; a shape that fits no layout is a Gap.
    """
    atoms = _atoms(site, {"head_dim": head_dim, "token": token})
    readings = _distinct(entry.shape, entry.dims, atoms)
    if not readings:
        axes, sizes = tuple(axis for axis, _ in atoms), tuple(size for _, size in atoms)
        return Gap("misshapen", entry.shape, dims=entry.dims or (), axes=axes, sizes=sizes)
    if len(readings) > 1:
        choices = tuple(" ".join(axes) for axes in readings)
        raise AmbiguousLayoutError(site.name, Gap("ambiguous", entry.shape, readings=choices))
    return Pair(site, readings[0], atoms)


def _atoms(site: Site, inner: dict[str, int | None]) -> tuple[tuple[str, int], ...]:
    """The site's axes with every flattened one split, if the sizes are known."""
    atoms: list[tuple[str, int]] = []
    for dim, size in zip(site.dims, site.shape, strict=True):
        first, _, second = dim.partition(FLATTENED)
        known = inner.get(second)
        if second and known and size % known == 0:
            atoms += [(first, size // known), (second, known)]
        else:
            atoms.append((dim.replace(FLATTENED, _UNSPLIT), size))
    return tuple(atoms)


def _readings(stored: tuple[int, ...], declared: Dims | None, size: dict[str, int]) -> Iterator[Dims]:
    """Every layout of the atoms that has the stored shape and agrees with the axes that are declared."""
    for axes in _groupings(tuple(size)):
        for order in permutations(axes):
            shape = tuple(math.prod(size[atom] for atom in axis.split(FLATTENED)) for axis in order)
            if shape == stored and _agrees(order, declared):
                yield order


def _groupings(atoms: Dims) -> Iterator[Dims]:
    """The atoms as axes: batch left out or not, heads flattened or not, batch and token flattened or not.

    A batch that is left out must have size 1, which the check of shapes against sizes sees to.
    """
    for heads in (False, True):
        for tokens in (False, True):
            for batch in (True, False):
                axes = [a for a in atoms if batch or a != "batch"]
                pairs = ([("head", "head_dim")] if heads else []) + ([("batch", "token")] if tokens else [])
                if all(first in axes and second in axes for first, second in pairs):
                    yield _merged(axes, pairs)


def _merged(axes: list[str], pairs: list[tuple[str, str]]) -> Dims:
    for first, second in pairs:
        axes = [f"{first}{FLATTENED}{second}" if a == first else a for a in axes if a != second]
    return tuple(axes)


def _agrees(order: Dims, declared: Dims | None) -> bool:
    if declared is None:
        return True
    return len(declared) == len(order) and all(map(_same_axis, declared, order))


def _same_axis(declared: str, axis: str) -> bool:
    if declared == UNNAMED:
        return True
    names = [_SYNONYMS.get(name, name) for name in declared.split(FLATTENED)]
    if len(names) == 1 and names[0] not in _KNOWN:
        return axis in ("feature", f"head{FLATTENED}head_dim", f"head{_UNSPLIT}head_dim")
    return FLATTENED.join(names) == axis.replace(_UNSPLIT, FLATTENED)


@lru_cache(maxsize=1024)  # what one layer has, all layers have
def _distinct(stored: tuple[int, ...], declared: Dims | None, sizes: tuple[tuple[str, int], ...]) -> tuple[Dims, ...]:
    """One of each set of readings that give the same numbers: axes of size 1 may stand anywhere."""
    seen: dict[Dims, Dims] = {}
    size = dict(sizes)
    for axes in _readings(stored, declared, size):
        atoms = [atom for axis in axes for atom in axis.split(FLATTENED)]
        if any(size[name] > 1 and name not in atoms for name in size):
            continue
        seen.setdefault(tuple(atom for atom in atoms if size[atom] > 1), axes)
    return tuple(seen.values())
