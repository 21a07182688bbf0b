"""A dump looked at: the figures of its sites, by layer too, and what was asked for beside them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parity.dump import Dump
from parity.errors import UsageError
from parity.observer import Observer
from parity.show.statistics import Distance, SiteStatistics, distance, statistics
from parity.show.views import View, view
from parity.sites import ends_of, group_label, layer_of

if TYPE_CHECKING:
    from parity.show.lens import LensLine

# More sites than these get no pictures: a page of them would be too large to open.
MOST_VIEWS = 32


@dataclass(frozen=True)
class Looked:
    """What there is to show of a dump.

    sites      the figures, in recorded order
    asked      whether some sites were asked for by name, and
    views      these with pictures, unless they are too many
    distances  of each site to another dump, where one was given
    lens       the logit lens, where a model was given
    """

    title: str
    sites: tuple[SiteStatistics, ...]
    asked: bool = False
    views: tuple[View, ...] = ()
    distances: Mapping[str, Distance] = field(default_factory=dict)
    lens: tuple[LensLine, ...] = ()
    against: str = ""


@dataclass(frozen=True)
class LayerFigures:
    """A layer, or a site outside the layers: the figures of its output, and counts over all its sites.

    `output` is the layer's own site, None where that was not recorded; `worst` has the largest number, those of
    attention apart: scores are as large as they like, and probabilities small.
    """

    label: str
    output: SiteStatistics | None
    worst: SiteStatistics
    sites: int
    outliers: int
    dead: int
    nonfinite: int


def look(
    dump: Dump,
    wanted: str | None,
    against: Dump | None,
    lens: Sequence[LensLine],
    observer: Observer,
) -> Looked:
    """Look at all sites of a dump, or at those that `wanted` names. Raises UsageError where it names none."""
    names = chosen(dump, wanted)
    found, distances = [], {}
    for place, site in enumerate(names):
        observer.show(site, place, len(names))
        found.append(statistics(dump, site))
        if against is not None:
            distances[site] = distance(dump, against, site)
    shown = found if wanted is not None and len(found) <= MOST_VIEWS else []
    return Looked(
        title=_title(dump),
        sites=tuple(found),
        asked=wanted is not None,
        views=tuple(view(dump, one) for one in shown),
        distances=distances,
        lens=tuple(lens),
        against="" if against is None else str(against.path),
    )


def chosen(dump: Dump, wanted: str | None) -> list[str]:
    """The sites of a name: itself, `*` for anything, the end of a name (`mlp.act_fn`), or all of a layer (`layers.3`).

    Raises UsageError where there is none.
    """
    if wanted is None:
        return list(dump.entries)
    if wanted in dump.entries:
        return [wanted]
    tests: tuple[Callable[[str], bool], ...] = (
        lambda name: fnmatch.fnmatchcase(name, wanted),
        lambda name: layer_of(name) is not None and group_label(name) == wanted,
        lambda name: wanted in ends_of(name),
    )
    for test in tests:
        if found := [name for name in dump.entries if test(name)]:
            return found
    close = difflib.get_close_matches(wanted, dump.entries, n=1, cutoff=0.3)
    hint = f"Is it {close[0]}?" if close else "parity show DUMP -v lists them."
    raise UsageError(f"{dump.path}: has no site {wanted!r} among its {len(dump.entries)}. {hint}")


def by_layer(sites: Sequence[SiteStatistics]) -> list[LayerFigures]:
    """One line for each layer and each site outside the layers, in order."""
    groups: dict[str, list[SiteStatistics]] = {}
    for site in sites:
        groups.setdefault(group_label(site.site), []).append(site)
    return [
        LayerFigures(
            label=label,
            output=_output(group),
            worst=max(group, key=lambda s: (not s.of_keys, abs(s.largest.value) if s.largest else -1.0)),
            sites=len(group),
            outliers=sum(s.outlier_count for s in group),
            dead=sum(s.dead for s in group),
            nonfinite=sum(s.nonfinite for s in group),
        )
        for label, group in groups.items()
    ]


def _output(group: Sequence[SiteStatistics]) -> SiteStatistics | None:
    """The site of a layer itself; outside the layers, the last of those that share a label."""
    if layer_of(group[0].site) is None:
        return group[-1]
    return next((site for site in group if "" in ends_of(site.site)), None)


def _title(dump: Dump) -> str:
    info = dump.info
    rows = info.token_ids
    tokens = "" if not rows else f"{len(rows[0])} tokens{f' x {len(rows)}' if len(rows) > 1 else ''}"
    parts = [info.producer or "a dump that does not say its producer", info.model or "", tokens, info.dtype or ""]
    return f"{dump.path}: {', '.join(part for part in parts if part)}, {len(dump.entries)} sites"
