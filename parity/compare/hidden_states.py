"""Names that transformers itself gives to values: `hidden_states.N` of `output_hidden_states=True`.

`hidden_states.0` is what the first layer takes, `hidden_states.N` what the next takes, and the last one is not what
the last layer returns but what the final norm makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from parity.dump import Dump
from parity.dump.names import Target, rename
from parity.reference.pieces import HEAD, PiecewiseModel

_NAME = re.compile(r"hidden_states[._/\[](\d+)\]?")


def with_hidden_states(dump: Dump, model: PiecewiseModel) -> Dump:
    """The same dump with its hidden states under the names of sites; one whose site is there already stays as it is.

    Raises DumpError if two of them have the same number.
    """
    places = _places(model)
    found = {name: int(match[1]) for name in dump.entries if (match := _NAME.fullmatch(name))}
    names = {name: Target((places[n],)) for name, n in found.items() if places.get(n, name) not in dump.entries}
    return rename(dump, names) if names else dump


def _places(model: PiecewiseModel) -> Mapping[int, str]:
    """The site of each number, where it is one."""
    if not model.is_cut:
        return {}
    sources = {layer: model.source_of(layer) for layer in range(len(model.layers))}
    last = model.source_of(HEAD)
    behind = [site.name for site in model.sites_of(HEAD)]
    normed = behind[0] if len(behind) > 1 else last  # the head alone comes after the layers: there is no norm
    return {n: site for n, site in (sources | {len(model.layers): normed}).items() if site is not None}
