"""The reference's own taps for a candidate whose classes are transformers': what lies between its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from parity.record.experts import IN_ROUTER
from parity.record.scans import SCAN
from parity.record.tap import without_wrappers
from parity.sites import Site

_BETWEEN = ("input", "attention", SCAN, *IN_ROUTER)


def places_of(module: nn.Module) -> dict[str, str]:
    """Where each submodule is found, by its name without wrappers; of a compiled one it is the wrapper."""
    places: dict[str, str] = {}
    for path, _ in module.named_modules():
        places.setdefault(without_wrappers(path), path)
    return places


def between_modules(module: nn.Module, sites: Sequence[Site], places: Mapping[str, str]) -> list[Site]:
    """Those of `sites` inside of or between modules (inputs, attention, routers, …) whose code is transformers' own.

    A port's own class may compute something else at such a place, or nothing: there a name means nothing.
    A compiled model is left alone, because a tap there would take apart what the compiler has fused.
    """
    if is_compiled(module):
        return []
    return [site for site in sites if site.where in _BETWEEN and _is_stock(module, places, site)]


def _is_stock(module: nn.Module, places: Mapping[str, str], site: Site) -> bool:
    """Whether the code that makes the value is a class of transformers."""
    owner = site.module.rpartition(".")[0] if site.where == "input" else site.module
    if site.module not in places or owner not in places:
        return False
    while isinstance(module.get_submodule(owner), (nn.ModuleList, nn.ModuleDict)):
        owner = owner.rpartition(".")[0]  # a list calls nothing
    if site.where in IN_ROUTER and "forward" in vars(module.get_submodule(owner)):
        return False
    return type(module.get_submodule(owner)).__module__.startswith("transformers.models.")


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile, or a module's own `compile`, has had its hands on any part of it."""
    parts = list(module.named_modules())
    return any(path != without_wrappers(path) or part._compiled_call_impl is not None for path, part in parts)
