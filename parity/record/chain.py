"""Can a model be cut into its layers? It can where they are a plain chain: each called once, on what the last gave."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parity.record.tap import first_tensor

_SWITCH = (bool, int, float, str)


def find_layers(model: Any) -> list[nn.Module]:
    """The decoder layers: the longest list of modules in the text decoder that is not itself part of such a list."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    nested = {inner for outer in lists for element in outer for inner in element.modules()}
    return max((list(module) for module in lists if module not in nested), key=len, default=[])


def container_of(model: nn.Module, layers: list[nn.Module]) -> str:
    """What a model calls the list that holds its layers: `layers`, `h`, …; empty without layers."""
    names = (name for name, module in model.named_modules() if layers and module is layers[0])
    return next(names, ".").split(".")[-2]


@dataclass(frozen=True)
class LayerCall:
    """What transformers passed to a layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Link:
    """One call of a layer: what it took, the site that this value has, what it gave, and in how long a tuple."""

    number: int
    took: Tensor | None
    source: str | None
    gave: Tensor | None
    returned: int


@dataclass
class Chain:
    """How the layers were called, in order."""

    links: list[Link] = field(default_factory=list)
    shares_state: bool = False
    end: str | None = None  # the site of what the last layer gave

    def is_whole(self, count: int) -> bool:
        """Whether each layer was called once, in order, on what the one before it gave, and shares nothing else."""
        pairs = zip(self.links, self.links[1:], strict=False)
        in_order = [link.number for link in self.links] == list(range(count))
        return in_order and not self.shares_state and all(one.gave is other.took for one, other in pairs)

    @property
    def sources(self) -> tuple[str | None, ...]:
        """The site that each layer's hidden states come from, and last that of what the last layer gave."""
        return (*(link.source for link in self.links), self.end)


@contextmanager
def watch_chain(layers: list[nn.Module], name_of: Callable[[Tensor], str | None]) -> Iterator[Chain]:
    """Watch how the layers are called; `name_of` knows which site a value is. Values are hidden states (b, t, d)."""
    chain = Chain()
    sources: dict[int, str | None] = {}
    beside: dict[int, Tensor] = {}  # what layers gave beside the hidden states, by its identity

    def hooks_of(number: int) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            took = taken(args, kwargs)
            sources[number] = None if took is None else name_of(took)

        def after(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            gave = first_tensor(output)
            returned = len(output) if isinstance(output, tuple) else 0
            chain.links.append(Link(number, taken(args, kwargs), sources[number], gave, returned))
            chain.end = None if gave is None else name_of(gave)
            # What a layer can write into, a later one may read from; or it is handed on.
            given = (*args, *kwargs.values())
            chain.shares_state |= any(isinstance(v, (dict, list)) and bool(v) for v in given)
            chain.shares_state |= any(id(v) in beside for v in given)
            beside.update({id(v): v for v in tree_leaves(output) if isinstance(v, Tensor) and v is not gave})

        return before, after

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            before, after = hooks_of(number)
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after, with_kwargs=True).remove)
        yield chain


def taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among a module's arguments: the first tensor. They are (b, t, d)."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def by_name(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a layer is called with beside the hidden states (b, t, d), all of it by name where its names are known."""
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    named = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return (args, kwargs) if len(args) > len(named) else ((), dict(zip(named, args, strict=False)) | kwargs)


@contextmanager
def stubbed(layers: list[nn.Module], chain: Chain, stub: Callable[[int, Tensor, LayerCall], Tensor]) -> Iterator[None]:
    """Every layer answers with `stub(index, hidden, other arguments)` in place of its own forward."""

    def forward_of(index: int) -> Callable[..., Any]:
        more = (None,) * (chain.links[index].returned - 1)

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            answer = stub(index, hidden, LayerCall(*by_name(layers[index], args, kwargs)))
            return (answer, *more) if chain.links[index].returned else answer

        return forward

    try:
        for index, layer in enumerate(layers):
            layer.forward = forward_of(index)
        yield
    finally:
        for layer in layers:
            del layer.forward


def kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """All that tells one layer from another but its number: classes, sizes and switches of its modules."""
    return tuple(
        (
            name,
            type(module),
            tuple(p.shape for p in module._parameters.values() if p is not None),
            tuple((k, v) for k, v in vars(module).items() if k != "layer_idx" and isinstance(v, _SWITCH)),
        )
        for name, module in layer.named_modules()
    )
