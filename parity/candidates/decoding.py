"""How a module is run: with a mask and positions where a batch is padded, and in several calls with its own cache.

A port takes a padded batch by `forward(input_ids, attention_mask=None, position_ids=None)`. The mask is of int64,
1 for text and 0 for padding, (b, s): the tokens of earlier calls stand in it too, so that s is t in the first call.
The positions (b, t) are those of the tokens at hand; a port without this parameter counts them itself. Neither is
given where no row is padded.

A port offers its cache by a method `new_cache()`, which returns an empty one, and by `forward(input_ids, cache=None)`,
which continues what the cache holds and puts its own keys and values into it. transformers' models take and return
theirs as `past_key_values` (or `cache_params`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parity.errors import CandidateError
from parity.reference.batch import Batch

_OF_TRANSFORMERS = ("past_key_values", "cache_params")
# What one call is given: the token ids first, all else by name.
Given = Mapping[str, Tensor]


def calls_of(module: nn.Module, batch: Batch, calls: Sequence[int], device: torch.device) -> list[Given]:
    """What each call of a module is given, of calls of so many tokens. Raises CandidateError if it takes no mask."""
    takes = inspect.signature(module.forward).parameters
    anything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values())
    if batch.text is not None and "attention_mask" not in takes and not anything:
        raise CandidateError(
            f"the candidate takes no mask, and the batch is padded: forward takes {', '.join(takes)}. "
            "Give it forward(input_ids, attention_mask=None), or run prompts of one length."
        )
    return list(_given(batch, calls, device, anything or "position_ids" in takes))


def _given(batch: Batch, calls: Sequence[int], device: torch.device, counts: bool) -> Iterator[Given]:
    seen = 0
    for size in calls:
        part = batch.part(slice(None), slice(seen, seen + size))
        seen += size
        given = {"input_ids": part.ids.to(device)}
        if batch.text is not None:
            given["attention_mask"] = batch.text[:, :seen].to(device, torch.long)
        if part.positions is not None and counts:
            given["position_ids"] = part.positions.to(device)
        yield given


def calling(module: nn.Module, count: int) -> Callable[[Given], Any]:
    """What runs a module on what each of `count` calls is given. Raises CandidateError if it has no cache for it."""
    if count == 1:
        return lambda given: _plain(module, given)
    takes = inspect.signature(module.forward).parameters
    if "cache" in takes and callable(new_cache := getattr(module, "new_cache", None)):
        own = new_cache()
        return lambda given: _plain(module, given, cache=own)
    theirs = next((name for name in _OF_TRANSFORMERS if name in takes), None)
    if theirs is None:
        raise CandidateError(
            f"the candidate has no cache that parity knows, and is to run in {count} calls: "
            f"forward takes {', '.join(takes)}. Give it forward(input_ids, cache=None) and new_cache()."
        )
    return _with_cache(module, theirs)


def _plain(module: nn.Module, given: Given, **more: Any) -> Any:
    ids, *_ = given.values()
    return module(ids, **{name: value for name, value in given.items() if name != "input_ids"}, **more)


def _with_cache(module: nn.Module, name: str) -> Callable[[Given], Any]:
    cache: Any = None
    seen = 0
    counts = "position_ids" in inspect.signature(module.forward).parameters

    def call(given: Given) -> Any:
        nonlocal cache, seen
        ids = given["input_ids"]
        # As `generate` does: not every model can count by its cache.
        positions = torch.arange(seen, seen + ids.shape[1], device=ids.device).expand(ids.shape)
        seen += ids.shape[1]
        more = {"position_ids": positions} if counts and "position_ids" not in given else {}
        output = _plain(module, given, **{name: cache}, use_cache=True, **more)
        cache = getattr(output, name, None)
        if cache is None:
            raise CandidateError(
                f"the candidate's forward takes {name}, but returns none. Return it beside the logits, or do without."
            )
        return output

    return call
