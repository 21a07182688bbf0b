"""Roles: what a site is in any decoder, whatever its modules are called. Faults say where they show by name or role."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from parity.faults.fault import ANY_ACTIVATION, ANY_NORM, IN_ATTENTION, ROPE_TABLES, STREAM_SUM
from parity.faults.patches.modules import adds_to_residual, is_activation, is_norm, makes_tables, says_norm
from parity.record.scans import SCAN, source_of
from parity.sites import Site, layer_of, without_call

_TAKEN = (".q_rope", ".k_rope")


def roles_of(model: Any, sites: Iterable[Site]) -> Mapping[str, frozenset[str]]:
    """The roles of each site of a model, by the site's name."""
    attentions = tuple(name for name, module in model.named_modules() if _is_attention(module))
    return {site.name: frozenset(_roles(model.get_submodule(site.module), site, attentions)) for site in sites}


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and not says_norm(module)


def _is_inside(site: Site, attentions: tuple[str, ...]) -> bool:
    """Whether a value stands between the modules of an attention."""
    if site.where == SCAN:
        return site.module in attentions
    return site.where == "input" and any(site.module.startswith(f"{name}.") for name in attentions)


def _roles(module: nn.Module, site: Site, attentions: tuple[str, ...]) -> Iterator[str]:
    if site.where == "output" and is_norm(module):
        yield ANY_NORM
    if layer_of(site.name) is None:
        if site.where == "output" and makes_tables(module):
            yield ROPE_TABLES
        return
    if site.where == "output" and is_activation(module):
        yield ANY_ACTIVATION
    # Values that no module gave were made by arithmetic: what a norm takes is a sum, if the norm is behind one.
    if adds_to_residual(module) if site.where == "output" else site.where == "input" and is_norm(module):
        yield STREAM_SUM
    if _is_inside(site, attentions):
        yield IN_ATTENTION
    # Where nothing rotates them, queries and keys are values of their own only if something else is done to them.
    is_taken = site.where == "attention" and without_call(site.name).endswith(_TAKEN)
    if is_taken and not hasattr(source_of(module), "apply_rotary_pos_emb"):
        yield IN_ATTENTION
