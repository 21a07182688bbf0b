"""The one mechanism: `tap(site, value) -> value`.

A tap that returns its argument records; a tap that returns something else replaces what flows on.
`tapping` brings one tap to every site of a torch module and takes it away again, whatever happens.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parity.record.attention import attention_taps
from parity.record.experts import GIVEN, IN_ROUTER, routing_taps
from parity.record.scans import SCAN, scan_taps
from parity.sites import Site, numbered, without_call

Tap = Callable[[str, Tensor], Tensor]
_WRAPPER = "_orig_mod"


@contextmanager
def tapping(
    model: nn.Module,
    sites: Iterable[Site],
    tap: Tap,
    *,
    every_call: bool = False,
    calls: Sequence[int] | None = None,
) -> Iterator[None]:
    """Bring `tap` to the sites of `model` for the duration of the block, which is one forward pass.

    Outputs are tapped by forward hooks, inputs by forward pre-hooks, values inside attention by the
    attention function of `parity.record.attention` (the model must have been built with it), those inside
    state spaces and the like as `parity.record.scans` says, those of a mixture of experts as
    `parity.record.experts` says. Further calls of a module are tapped where they are among the sites, or with
    `every_call` in any case, under their numbers. `calls` are those that one pass over all tokens stands for.
    Of a value that the model writes into later the tap gets a copy, and the model gets one of what the tap gives.
    """
    sites = list(sites)
    known = {site.name for site in sites}
    tap = _protected(tap, {site.name for site in sites if site.overwritten})
    each_call = _numbering(tap, None if every_call else known)
    hooked: set[tuple[str, str]] = set()
    routers: list[Site] = []
    inside: dict[str, dict[nn.Module, dict[str, str]]] = {"attention": {}, SCAN: {}}
    with ExitStack() as stack:
        for site in sites:
            module = _submodule(model, site.module)
            if site.where in (*IN_ROUTER, *GIVEN):
                routers.append(site)
            elif site.where in inside:
                name = without_call(site.name)
                inside[site.where].setdefault(module, {})[name.rsplit(".", 1)[-1]] = name
            elif (name := without_call(site.name), site.where) not in hooked:
                hooked.add((name, site.where))
                stack.callback(_hook(module, name, site.where, each_call))
        stack.enter_context(attention_taps(inside["attention"], each_call, calls))
        stack.enter_context(scan_taps(model, inside[SCAN], each_call))
        stack.enter_context(routing_taps(model, routers, tap))
        yield


def _submodule(model: nn.Module, name: str) -> nn.Module:
    """As `get_submodule`, which looks at every step whether what it finds is a module."""
    found: nn.Module | None = model
    for part in name.split(".") if name else ():
        found = None if found is None else found._modules.get(part)
    return model.get_submodule(name) if found is None else found


def _protected(tap: Tap, overwritten: Collection[str]) -> Tap:
    if not overwritten:
        return tap

    def protected(site: str, value: Tensor) -> Tensor:
        if site not in overwritten:
            return tap(site, value)
        kept = value.clone()
        new = tap(site, kept)
        return value if new is kept else new.clone()

    return protected


def _numbering(tap: Tap, known: set[str] | None) -> Tap:
    """A tap for one pass: each call of a module goes to the site of its number, if that is known (None: all are)."""
    calls = Counter[str]()

    def tapped(name: str, value: Tensor) -> Tensor:
        site = numbered(name, calls[name])
        calls[name] += 1
        return tap(site, value) if known is None or site in known else value

    return tapped


def _hook(module: nn.Module, site: str, where: str, tap: Tap) -> Callable[[], None]:
    """Tap a module's input or output; returns what takes the tap away."""
    if where == "input":
        return module.register_forward_pre_hook(_input_hook(site, tap), with_kwargs=True).remove
    return module.register_forward_hook(_output_hook(site, tap)).remove


def first_tensor(output: Any) -> Tensor | None:
    """The activation in what a module returned: the tensor itself, its `logits`, or the first of a tuple.

    It may have any shape.
    """
    output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def without_wrappers(name: str) -> str:
    """The name of a module or parameter without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != _WRAPPER) if _WRAPPER in name else name


def _output_hook(site: str, tap: Tap) -> Callable[[nn.Module, Any, Any], Any]:
    return lambda _module, _args, output: _tapped(site, tap, output)


# A compiled candidate must not compile the recorder into itself.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _tapped(site: str, tap: Tap, output: Any) -> Any:
    value = first_tensor(output)
    if value is None:
        return None
    new = tap(site, value)
    if new is value:
        return None
    return (new, *output[1:]) if isinstance(output, tuple) else new


def _input_hook(site: str, tap: Tap) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        new = tap(site, value)
        if new is not value:
            # The caller may hold this very tensor as its residual, so the value itself must change.
            value.copy_(new)

    return hook


@contextmanager
def quiet_torch() -> Iterator[None]:
    """No gradients and no chatter from libraries while a model runs."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
