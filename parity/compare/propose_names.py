"""Which tensor of a foreign dump is which site: told by values, for a name may say anything.

Each tensor is laid beside every site of the reference that can have its shape, read in the site's layout. Two arrays
are as far apart as what is left of one when the best multiple of the other is taken away, ‖a − βb‖ / ‖a‖: 0 for the
same numbers, about 1 for others. A tensor that is no site as a whole may be several, side by side in its last axis.
What is not sure by far is said, not guessed: a port that is wrong early has no later site's values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.candidates.base import is_dump, open_candidate
from parity.candidates.torch_module import TorchModule
from parity.compare.align import AmbiguousLayoutError, Pair, align
from parity.compare.hidden_states import with_hidden_states
from parity.compare.recording import run_reference
from parity.dump import Array, Dump, Entry, RunInfo, open_dump, sites_of
from parity.dump.names import lookup, parse_names
from parity.errors import UsageError
from parity.observer import Observer
from parity.options import RunOptions
from parity.reference.pieces import PiecewiseModel
from parity.run_spec import RunSpec, run_spec
from parity.sites import Site, family, layer_of

# Farther apart than this is another value: bfloat16 alone, end to end, comes to a few hundredths.
_ALIKE = 0.2
# The next site must be so many times as far away.
_CLEARLY = 4.0
# The best multiple of a site that is still the site.
_FACTOR = 0.02
_NUMBER = re.compile(r"\d+")

Singles = NDArray[np.float32]


@dataclass(frozen=True)
class Match:
    """A tensor that is one site, or several side by side, `sizes` of its last axis each; `apart` is the farthest.

    `axes` are those of the tensor, where its shape leaves them open; empty otherwise.
    """

    tensor: str
    sites: tuple[str, ...]
    apart: float
    sizes: tuple[int, ...] = ()
    axes: str = ""


@dataclass(frozen=True)
class Proposal:
    """A name map as `--names` takes it, what it rests on, and what is left.

    names    from a tensor's name, with * for the layer where that fits all layers, to a site or a split
    doubts   for each tensor that is not in the map why it is not, or why it is only by its name
    unheld   the reference's sites that no tensor holds
    """

    names: Mapping[str, Any]
    matches: tuple[Match, ...]
    doubts: Mapping[str, str]
    unheld: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """A site with the reference's value: in the site's layout, and by row of tokens (rows, width)."""

    site: Site
    value: Singles
    rows: Singles | None


@dataclass(frozen=True)
class _Near:
    """A site that a tensor may be: how far apart they are, and which multiple of the site the tensor is."""

    apart: float
    factor: float
    place: _Place
    axes: str = ""


def proposal_for(spec: str, options: RunOptions, observer: Observer) -> Proposal:
    """A name map for a dump, or for the submodules of a torch module. Raises ParityError."""
    if is_dump(spec):
        with open_dump(spec) as dump:
            run = run_spec(options, dump.info)
            model = run.model()
            return propose_names(with_hidden_states(dump, model), model, run, observer)
    candidate = open_candidate(spec)
    if not isinstance(candidate, TorchModule):
        raise UsageError(
            f"{spec}: its values bear the reference's names. Give a dump, or the factory of a torch module."
        )
    run = run_spec(options, candidate.said())
    with closing(candidate):
        values = candidate.outputs(run)
    entries = {name: Entry(name, None, value.shape, value.dtype.name) for name, value in values.items()}
    return propose_names(Dump(Path(spec), RunInfo(), entries, values.__getitem__), run.model(), run, observer)


def propose_names(dump: Dump, model: PiecewiseModel, run: RunSpec, observer: Observer) -> Proposal:
    """Match the tensors of a dump of `run` with the reference's sites. Raises ParityError where the reference fails."""
    values: dict[str, Array] = {}
    sites = run_reference(run, model, observer, lambda site, value, _dims: values.update({site: value}))
    places = [_place(site, values[site.name]) for site in sites if site.name not in dump.entries]
    strangers = [entry for name, entry in dump.entries.items() if name not in values]
    found: dict[str, Match] = {}
    doubts: dict[str, str] = {}
    for done, entry in enumerate(strangers):
        observer.show(f"matching {entry.site}", done, len(strangers))
        match = _match(entry, _singles(dump.read(entry.site)), places, (model.head_dim, run.ids.shape[1]))
        if isinstance(match, Match):
            found[entry.site] = match
        else:
            doubts[entry.site] = match
    for name, others in _claimed_twice(found).items():
        doubts[name] = f"has the values of {', '.join(found[name].sites)}, as {others} has"
        del found[name]
    names = _patterns(tuple(found.values()), [entry.site for entry in strangers])
    held = {site for match in found.values() for site in match.sites} | dump.entries.keys()
    table = parse_names(names, str(dump.path))
    for name in [name for name in doubts if lookup(table, name)]:
        doubts[name] += "; named as in other layers"
        held.update(sites_of(table, name))
    return Proposal(names, tuple(found.values()), doubts, tuple(s.name for s in sites if s.name not in held))


# -- distances -----------------------------------------------------------------------------------------------------


def _singles(array: Array) -> Singles:
    return np.nan_to_num(array.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _place(site: Site, value: Array) -> _Place:
    singles = _singles(value)
    return _Place(site, singles, _by_rows(site, singles))


def _by_rows(site: Site, value: Singles) -> Singles | None:
    """The value with a row (n, width) for each token, heads side by side; None where it has no tokens."""
    order = [i for i, dim in enumerate(site.dims) if dim in ("batch", "token")]
    if len(order) < 2:
        return None
    moved = value.transpose(*order, *(i for i in range(value.ndim) if i not in order))
    return moved.reshape(moved.shape[0] * moved.shape[1], -1)


def _near(array: Singles, place: _Place, against: Singles, axes: str = "") -> _Near:
    one, other = array.ravel(), against.ravel()
    length, size = float(np.linalg.norm(one)), float(np.linalg.norm(other))
    if not length or not size:
        return _Near(1.0, 0.0, place, axes)
    factor = float(one @ other) / size**2
    return _Near(float(np.linalg.norm(one - factor * other)) / length, factor, place, axes)


def _whole(entry: Entry, array: Singles, places: Sequence[_Place], sizes: tuple[int | None, int]) -> list[_Near]:
    """The sites that a whole tensor may be, nearest first."""
    found = []
    for place in places:
        if array.size == place.value.size:
            pairs = list(_readings(entry, place.site, *sizes))
            found += [
                _near(pair.read(array), place, place.value, " ".join(pair.axes) if len(pairs) > 1 else "")
                for pair in pairs
            ]
    return sorted(found, key=lambda near: near.apart)


def _readings(entry: Entry, site: Site, head_dim: int | None, token: int) -> Iterator[Pair]:
    try:
        pairs = [align(entry, site, head_dim, token)]
    except AmbiguousLayoutError as error:
        declared = (replace(entry, dims=tuple(reading.split())) for reading in error.gap.readings)
        pairs = [align(one, site, head_dim, token) for one in declared]
    yield from (pair for pair in pairs if isinstance(pair, Pair))


# -- decisions -----------------------------------------------------------------------------------------------------


def _match(entry: Entry, array: Singles, places: Sequence[_Place], sizes: tuple[int | None, int]) -> Match | str:
    """What a tensor is, or why that is not sure."""
    whole = _whole(entry, array, places, sizes)
    if whole and not (why := _doubt(whole)):
        return Match(entry.site, (whole[0].place.site.name,), whole[0].apart, axes=whole[0].axes)
    parts = _parts(array, places)
    if parts:
        names, widths = tuple(near.place.site.name for near, _ in parts), tuple(width for _, width in parts)
        return Match(entry.site, names, max(near.apart for near, _ in parts), widths)
    return why if whole else f"no site of the reference can have its shape {entry.shape}"


def _doubt(ranked: Sequence[_Near]) -> str:
    """Why the first of some sites is not surely the one; empty if it is."""
    best = ranked[0]
    name = best.place.site.name
    if best.apart > _ALIKE:
        return f"no site has its values: the nearest, {name}, is {best.apart:.2g} apart"
    rival = next((near for near in ranked[1:] if near.place is not best.place or near.axes != best.axes), None)
    if rival is not None and rival.apart < _CLEARLY * best.apart + 1e-6:
        other = rival.place.site.name if rival.place is not best.place else f"{name} read as {rival.axes}"
        return f"may be {name} or {other}: {best.apart:.2g} and {rival.apart:.2g} apart; more tokens may tell"
    if abs(best.factor - 1) > _FACTOR:
        return f"is {name} times {best.factor:.4g}"
    return ""


def _parts(array: Singles, places: Sequence[_Place]) -> list[tuple[_Near, int]]:
    """The sites that lie side by side in the last axis, with the width of each; empty if that is not so."""
    width, found, start = array.shape[-1] if array.ndim else 0, list[tuple[_Near, int]](), 0
    rows = array.reshape(-1, width) if width else array
    while start < width:
        fits = [
            _near(rows[:, start : start + p.rows.shape[1]], p, p.rows)
            for p in places
            if p.rows is not None and len(p.rows) == len(rows) and p.rows.shape[1] <= width - start
        ]
        fits.sort(key=lambda near: near.apart)
        if not fits or _doubt(fits):
            return []
        assert fits[0].place.rows is not None, "unreachable because only sites with rows are tried"
        found.append((fits[0], fits[0].place.rows.shape[1]))
        start += found[-1][1]
    return found if len(found) > 1 else []


def _claimed_twice(found: Mapping[str, Match]) -> dict[str, str]:
    """The tensors that hold a site which another holds as well, nearer or earlier, and that other."""
    owner: dict[str, str] = {}
    twice: dict[str, str] = {}
    for name, match in sorted(found.items(), key=lambda item: item[1].apart):
        taken = [owner[site] for site in match.sites if site in owner]
        if taken:
            twice[name] = taken[0]
        else:
            owner |= dict.fromkeys(match.sites, name)
    return twice


# -- patterns ------------------------------------------------------------------------------------------------------


def _patterns(matches: Sequence[Match], tensors: Sequence[str]) -> dict[str, Any]:
    """The matches as a name map; those of layers as one pattern, if no tensor that fits it is something else."""
    groups: dict[tuple[str, tuple[str, ...], tuple[int, ...]], list[Match]] = {}
    for match in matches:
        for pattern in _starred(match):
            groups.setdefault((pattern, tuple(map(family, match.sites)), match.sizes), []).append(match)
    left = {match.tensor: match for match in matches}
    names: dict[str, Any] = {}
    for (pattern, sites, sizes), members in sorted(groups.items(), key=lambda item: -len(item[1])):
        fits = {name for name in tensors if _fits(pattern, name)}
        known = {match.tensor for match in matches} & fits
        if len(members) > 1 and known == {match.tensor for match in members} and known <= left.keys():
            names[pattern] = _target(sites, sizes)
            left = {name: match for name, match in left.items() if name not in known}
    return names | {name: _target(match.sites, match.sizes) for name, match in left.items()}


def _starred(match: Match) -> Iterator[str]:
    """The tensor's name with * for each number in turn that is the layer of all its sites."""
    layers = {layer_of(site) for site in match.sites}
    for number in _NUMBER.finditer(match.tensor):
        if layers == {int(number[0])}:
            yield f"{match.tensor[: number.start()]}*{match.tensor[number.end() :]}"


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch("[0-9]+".join(map(re.escape, pattern.split("*"))), name) is not None


def _target(sites: Sequence[str], sizes: Sequence[int]) -> Any:
    return {"split": list(sites), "sizes": list(sizes)} if sizes else sites[0]
