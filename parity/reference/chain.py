"""Can a model be cut into its layers? It can where they are a plain chain: each called once, on what the last gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from parity.record.tap import first_tensor


def find_layers(model: Any) -> list[nn.Module]:
    """The decoder layers: the longest list of modules that the backbone holds, if it holds any."""
    lists = [list(m) for m in model.base_model.children() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


@dataclass
class Chain:
    """Which layers were called, each with the hidden states it took and gave."""

    calls: list[tuple[int, Tensor | None, Tensor | None]]
    shares_state: bool = False

    def is_whole(self, count: int) -> bool:
        """Whether each layer was called once, in order, on what the one before it gave, and shares nothing else."""
        links = zip(self.calls, self.calls[1:], strict=False)
        in_order = [number for number, _, _ in self.calls] == list(range(count))
        return in_order and not self.shares_state and all(gave is took for (_, _, gave), (_, took, _) in links)


@contextmanager
def watch_chain(layers: list[nn.Module]) -> Iterator[Chain]:
    """Watch how the layers are called: a model can be cut where they are a plain chain."""
    chain = Chain([])

    def hook_of(number: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            took = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            chain.calls.append((number, took, first_tensor(output)))
            # What a layer can write into, a later one may read from.
            chain.shares_state |= any(isinstance(v, (dict, list)) and bool(v) for v in (*args, *kwargs.values()))

        return hook

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(hook_of(number), with_kwargs=True).remove)
        yield chain
