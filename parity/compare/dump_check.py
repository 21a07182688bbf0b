"""Is a dump well-formed and complete, and what does each missing site cost? Runs no model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from parity import words
from parity.compare.align import AmbiguousLayoutError, Pair, align
from parity.compare.hidden_states import with_hidden_states
from parity.dump import Dump
from parity.dump_coverage import DumpCheck, FamilyCheck, SiteState
from parity.reasons import Gap
from parity.record.discover import COSTLY, with_sizes
from parity.reference.pieces import PiecewiseModel
from parity.results import Check
from parity.sites import Site, branch, family, layer_of

_NUMBER = re.compile(r"\d+")


def check(dump: Dump, model: PiecewiseModel, batch: int, token: int) -> DumpCheck:
    """Compare a dump's names and shapes with what a run of (batch, token) ids of the model has."""
    dump = with_hidden_states(dump, model)
    sites = with_sizes(model.sites, batch, token)
    head_dim = model.head_dim
    states = {site.name: _state(dump, site, head_dim, token) for site in sites}
    groups: dict[tuple[str, SiteState, str], list[Site]] = {}
    for position, site in enumerate(sites):
        state, detail = states[site.name]
        if state == "missing":
            detail = _cost(position, sites, states)
        groups.setdefault((family(site.name), state, detail), []).append(site)
    families = tuple(
        FamilyCheck(name, state, tuple(n for s in group if (n := layer_of(s.name)) is not None), len(group), detail)
        for (name, state, detail), group in groups.items()
    )
    known = {site.name for site in sites}
    unknown = tuple(name for name in dump.entries if name not in known)
    missing = [name for name, (state, _) in states.items() if state == "missing"]
    near = {name: close for name in unknown if (close := nearest(name, missing))}
    return DumpCheck(families, unknown, near)


def name_checks(dump: Dump, pairs: Mapping[str, Pair | Gap]) -> list[Check]:
    """Whether every array of a dump was understood: what was not, may be a site that is missing elsewhere."""
    checks = []
    misshapen = [(site, pair) for site, pair in pairs.items() if isinstance(pair, Gap) and pair.kind == "misshapen"]
    if misshapen:
        site, pair = misshapen[0]
        more = f" (and {len(misshapen) - 1} more)" if len(misshapen) > 1 else ""
        checks.append(Check("recorded shapes", False, f"{site}: {words.gap(pair)}{more}. parity check has them all."))
    unknown = [name for name in dump.entries if name not in pairs and not name.endswith(COSTLY)]
    if unknown:
        missing = [site for site, pair in pairs.items() if isinstance(pair, Gap)]
        close = nearest(unknown[0], missing)
        hint = f"; is it {close}? Map it with --names." if close else ", and was not compared."
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        detail = f"the reference has no {unknown[0]}{more}{hint}"
        checks.append(Check("recorded names", not missing, detail))
    return checks


def nearest(name: str, missing: Iterable[str]) -> str:
    """The missing site whose name is most like this one and has the same number; empty if none is."""
    numbers = _NUMBER.findall(name)
    alike = [site for site in missing if not numbers or _NUMBER.findall(site) == numbers]
    return next(iter(difflib.get_close_matches(name, alike, n=1, cutoff=0.3)), "")


def _state(dump: Dump, site: Site, head_dim: int | None, token: int) -> tuple[SiteState, str]:
    entry = dump.entries.get(site.name)
    if entry is None:
        return "missing", ""
    try:
        found = align(entry, site, head_dim, token)
    except AmbiguousLayoutError as error:
        declared = f"{family(site.name)!r}: {error.gap.readings[0]!r}"
        return "ambiguous", f"{words.gap(error.gap)}. Declare its axes in the dump: parity.dims = {{{declared}}}."
    return ("misshapen", words.gap(found)) if isinstance(found, Gap) else ("present", " ".join(found.steps))


def _cost(position: int, sites: Sequence[Site], states: dict[str, tuple[SiteState, str]]) -> str:
    """What is lost: a missing site's operation is judged together with the next one that was recorded."""
    own = branch(sites[position].name)
    readers = (s for s in sites[position + 1 :] if branch(s.name) in (own, "") or not own)
    later = next((s for s in readers if states[s.name][0] == "present"), None)
    if later is None:
        return "nothing after it is recorded, so its operation is not judged at all"
    return f"its operation is judged only through {family(later.name)}"
