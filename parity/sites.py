"""Names: sites, families, layers, axes. One vocabulary for code, dumps and reports.

A site carries the name of the transformers module whose output it is, which is also its name in the
checkpoint (`model.layers.3.self_attn.q_proj`). Values that no module returns stand beside where they
arise: `self_attn.q_rope`, `k_rope`, `scores`, `probs`, `context`; `resid_mid`; `mlp.product`; `conv_output`,
`decay`, `beta`, `dt`, `gate`, `state_output` in linear attention and state spaces; `q_rotated`, `k_rotated`; `cache_k`,
`cache_v` in runs of several calls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_LAYER_NUMBER = re.compile(r"(?:(?<=^)|(?<=\.))(\d+)(?=\.|$)")

_NUMBER = re.compile(r"\d+")

Dims = tuple[str, ...]

# A dim may name two axes that lie flattened in one: "head*head_dim".
FLATTENED = "*"


# What attention read of a cache, call by call: sites of a run in several calls, which a candidate need not have.
CACHED = ("cache_k", "cache_v")
CALL = "call"  # their axis of calls

# A module that is called again in one forward pass has a site for each call: `qk_norm`, `qk_norm#1`.
_CALL = "#"


@dataclass(frozen=True)
class Site:
    """A named place in the forward pass.

    `dims` are the axis names of the reference's own layout, `shape` the sizes in one run, `dtype` as torch
    spells it. `where` tells how the value is reached: a module's `output`, a module's `input`, `attention`
    (inside the attention function of `module`) or `scan` (inside another function that it calls).
    `overwritten` says that the model later writes into the value.
    """

    name: str
    dims: Dims
    shape: tuple[int, ...]
    dtype: str
    module: str
    where: str = "output"
    overwritten: bool = False


def numbered(name: str, call: int) -> str:
    """The site of a module's call: its plain name for the first (0), `name#1` for the next."""
    return f"{name}{_CALL}{call}" if call else name


def without_call(site: str) -> str:
    """The site's name without the number of its call."""
    return site.partition(_CALL)[0]


def is_cached(site: str) -> bool:
    """Whether a site is what attention read of a cache."""
    return without_call(site).rpartition(".")[2] in CACHED


@lru_cache(maxsize=1 << 16)
def ends_of(site: str) -> frozenset[str]:
    """All that a site's name ends in at a dot, itself included; the empty end is a layer's own output."""
    parts = without_call(site).split(".")
    is_layer = len(parts) > 1 and _NUMBER.fullmatch(parts[-1]) is not None
    return frozenset(".".join(parts[start:]) for start in range(len(parts))) | ({""} if is_layer else set())


def family(site: str) -> str:
    """The site's name with `*` for the layer number: what a bug in all layers has in common.

    >>> family("model.layers.3.self_attn.q_rope")
    'model.layers.*.self_attn.q_rope'
    """
    return _LAYER_NUMBER.sub("*", site, count=1)


def layer_of(site: str) -> int | None:
    """The layer number in a site's name, or None outside the layers."""
    found = _LAYER_NUMBER.search(site)
    return int(found.group(1)) if found else None


def short(site: str) -> str:
    """The site's name inside its layer, or the whole name outside the layers.

    >>> short("model.layers.3.self_attn.q_rope"), short("model.layers.3"), short("lm_head")
    ('self_attn.q_rope', 'output', 'lm_head')
    """
    found = _LAYER_NUMBER.search(site)
    return site[found.end() + 1 :] or "output" if found else site


_BRANCHES = {"q": "q", "k": "k", "v": "v", "gate": "gate", "up": "up"}
_STREAM = ("output", "resid_mid")


def branch(site: str) -> str:
    """The side branch of its layer that a site lies on: q, k, v, gate, up, or "" for the trunk.

    What lies on one branch is not read on another; the trunk reads them all.

    >>> branch("model.layers.3.self_attn.q_rope"), branch("model.layers.3.mlp.act_fn"), branch("model.layers.3")
    ('q', 'gate', '')
    """
    last = site.rsplit(".", 1)[-1]
    return "gate" if last == "act_fn" else _BRANCHES.get(last.split("_")[0], "")


def is_stream(site: str) -> bool:
    """Whether all that comes later is computed from this site: the residual stream, or anything between layers."""
    return layer_of(site) is None or short(site) in _STREAM


def group_label(site: str) -> str:
    """What a per-layer table calls the row that this site belongs to.

    >>> group_label("model.layers.3.mlp.act_fn"), group_label("model.embed_tokens")
    ('layers.3', 'embed_tokens')
    """
    found = _LAYER_NUMBER.search(site)
    if not found:
        return site.rsplit(".", 1)[-1]
    return ".".join(site[: found.end()].split(".")[-2:])
