"""A module run in several calls, with the cache that it has itself.

A port offers its cache by a method `new_cache()`, which returns an empty one, and by `forward(input_ids, cache=None)`,
which continues what the cache holds and puts its own keys and values into it. transformers' models take and return
theirs as `past_key_values` (or `cache_params`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parity.errors import CandidateError

_OF_TRANSFORMERS = ("past_key_values", "cache_params")


def calling(module: nn.Module, parts: Sequence[Tensor]) -> Callable[[Tensor], Any]:
    """What runs a module on one of `parts` (b, t) after the other. Raises CandidateError if it has no cache for it."""
    if len(parts) == 1:
        return module
    takes = inspect.signature(module.forward).parameters
    if "cache" in takes and callable(new_cache := getattr(module, "new_cache", None)):
        own = new_cache()
        return lambda ids: module(ids, cache=own)
    theirs = next((name for name in _OF_TRANSFORMERS if name in takes), None)
    if theirs is None:
        raise CandidateError(
            f"the candidate has no cache that parity knows, and is to run in {len(parts)} calls: "
            f"forward takes {', '.join(takes)}. Give it forward(input_ids, cache=None) and new_cache()."
        )
    return _with_cache(module, theirs)


def _with_cache(module: nn.Module, name: str) -> Callable[[Tensor], Any]:
    cache: Any = None
    seen = 0
    counts = "position_ids" in inspect.signature(module.forward).parameters

    def call(ids: Tensor) -> Any:
        nonlocal cache, seen
        # As `generate` does: not every model can count by its cache.
        positions = torch.arange(seen, seen + ids.shape[1], device=ids.device).expand(ids.shape)
        seen += ids.shape[1]
        output = module(ids, **{name: cache}, use_cache=True, **({"position_ids": positions} if counts else {}))
        cache = getattr(output, name, None)
        if cache is None:
            raise CandidateError(
                f"the candidate's forward takes {name}, but returns none. Return it beside the logits, or do without."
            )
        return output

    return call
