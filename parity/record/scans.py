"""Seeing inside linear attention, state spaces, short convolutions and latent attention, whose parts are not modules.

The blocks of transformers call functions that stand beside them in their file. While a block runs, those functions
are replaced by ones that tap what they take and give, and what an operation inside them makes. A value has the axes
(batch, token, …) whatever its layout is in the function; a replaced one gets the layout of the one it replaces.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Tap = Callable[[str, Tensor], Tensor]

SCAN = "scan"  # where such a site is


@dataclass(frozen=True)
class _Function:
    """What a function takes (by parameter), gives (in order) and computes inside (by operation).

    `channels_first`: its values of three axes are (batch, feature, token).
    """

    takes: dict[str, str] = field(default_factory=dict)
    gives: tuple[str, ...] = ()
    inside: dict[Callable[..., Any], str] = field(default_factory=dict)
    channels_first: bool = False


_ROTATION = _Function(gives=("q_rotated", "k_rotated"))
_FUNCTIONS = {
    "causal_conv1d_fn": _Function({"hidden_states": "conv_input"}, ("conv_output",), channels_first=True),
    "torch_chunk_gated_delta_rule": _Function({"g": "decay", "beta": "beta"}, ("state_output",)),
    "mamba2_chunk_scan": _Function(gives=("state_output",), inside={F.softplus: "dt"}),
    "mamba_selective_scan": _Function(
        gives=("state_output",), inside={F.softplus: "dt", F.silu: "gate"}, channels_first=True
    ),
}
# Where the rotated part is not all of a query or key, it is seen alone; elsewhere `q_rope` and `k_rope` are it.
_ROTATIONS = ("apply_rotary_emb", "apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")
_GATED_NORM = _Function(gives=("output",), inside={F.silu: "gate"})

VALUES = frozenset(
    value
    for function in (*_FUNCTIONS.values(), _ROTATION, _GATED_NORM)
    for value in (*function.takes.values(), *function.gives, *function.inside.values())
)


def scanning_modules(model: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """The modules that have such values inside, with the full site name of each value that one may have."""
    named = {module: name for name, module in model.named_modules() if name}
    return {
        module: {value: f"{name}.{value}" for value in VALUES}
        for module, name in named.items()
        if _is_gated_norm(module) or _functions_of(module)
    }


@contextmanager
def scan_taps(model: nn.Module, sites: dict[nn.Module, dict[str, str]], tap: Tap) -> Iterator[None]:
    """Let `tap` see the named values (b, t, …) inside the given modules of `model` during the block.

    Rotated parts of queries and keys are (b, h, t, d).
    """
    running: list[_Running] = []
    with ExitStack() as stack:
        for source in {source_of(module) for module in sites}:
            for name, function in _found_in(source):
                stack.callback(setattr, source, name, getattr(source, name))
                setattr(source, name, _tapped(name, getattr(source, name), function, running))
        for module, names in (_blocks_of_norms(model, sites) | sites).items():
            stack.enter_context(_announced(module, names, tap, running))
        yield


@dataclass(frozen=True)
class _Running:
    """A module whose forward is running: the sites inside it, and the axes (b, t) of what its block was given."""

    names: dict[str, str]
    tap: Tap
    rows: tuple[int, ...]
    functions: tuple[str, ...]

    # A compiled candidate must not compile the recorder into itself.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def see(self, value: str, tensor: Tensor, channels_first: bool = False) -> Tensor:
        """Tap a value as (b, t, …), and give back what flows on, in the layout it came in."""
        if value not in self.names:
            return tensor
        turned = channels_first and tensor.dim() == 3
        fresh = tensor.transpose(1, 2) if turned else tensor
        flat = value in _GATED_NORM_VALUES and len(self.rows) == 2 and tensor.dim() == 2
        fresh = tensor.view(*self.rows, -1, tensor.shape[-1]) if flat else fresh
        new = self.tap(self.names[value], fresh)
        if new is fresh:
            return tensor
        new = new.transpose(1, 2) if turned else new.reshape(tensor.shape)
        return torch.empty_like(tensor, dtype=new.dtype).copy_(new)


_GATED_NORM_VALUES = frozenset((*_GATED_NORM.gives, *_GATED_NORM.inside.values()))


class _Inside(TorchFunctionMode):
    """Taps the results of operations that a function keeps to itself."""

    def __init__(self, function: _Function, at: _Running) -> None:
        super().__init__()
        self.function, self.at = function, at

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        value = self.function.inside.get(func)
        return result if value is None else self.at.see(value, result, self.function.channels_first)


def _tapped(
    name: str, original: Callable[..., Any], function: _Function, running: list[_Running]
) -> Callable[..., Any]:
    """The function of this name, tapped: `original`, or what a fault has put in its place."""
    signature = inspect.signature(original)

    @wraps(original)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        if not running or name not in running[-1].functions:
            return original(*args, **kwargs)
        at, bound = running[-1], signature.bind(*args, **kwargs)
        for parameter, value in function.takes.items():
            if isinstance(given := bound.arguments.get(parameter), Tensor):
                bound.arguments[parameter] = at.see(value, given, function.channels_first)
        with _Inside(function, at) if function.inside else nullcontext():
            result = original(*bound.args, **bound.kwargs)
        return _seen(result, function, at)

    return tapped


def _seen(result: Any, function: _Function, at: _Running) -> Any:
    if isinstance(result, Tensor):
        return at.see(function.gives[0], result, function.channels_first)
    first = [at.see(value, tensor, function.channels_first) for value, tensor in zip(function.gives, result)]  # noqa: B905
    return (*first, *result[len(first) :])


@contextmanager
def _announced(module: nn.Module, names: dict[str, str], tap: Tap, running: list[_Running]) -> Iterator[None]:
    """While the module's forward runs, the functions know that it is this module that calls them."""
    original, own = module.forward, vars(module).get("forward")
    functions = tuple(name for name, _ in _functions_of(module))
    gated = _is_gated_norm(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        outer = running[-1].rows if gated and running else ()
        rows = outer or (tuple(given.shape[:2]) if given is not None else ())
        at = _Running(names, tap, rows, functions)
        running.append(at)
        try:
            if not gated:
                return original(*args, **kwargs)
            with _Inside(_GATED_NORM, at):
                result = original(*args, **kwargs)
            # With batch and tokens of its own it is a module's output like any other.
            return at.see("output", result) if result.dim() == 2 else result
        finally:
            running.pop()

    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _blocks_of_norms(model: nn.Module, sites: Collection[nn.Module]) -> dict[nn.Module, dict[str, str]]:
    """The blocks around gated norms, without sites: a norm may be given rows (b * t * h, d), its block (b, t, …)."""
    norms = {module for module in sites if _is_gated_norm(module)}
    return {block: {} for block in model.modules() if not norms.isdisjoint(block.children())} if norms else {}


def _is_gated_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNormGated")


def source_of(module: nn.Module) -> Any:
    """The transformers file of a module's class: its functions are looked up there when they are called."""
    return sys.modules[type(module).__module__]


def _found_in(source: Any) -> Iterable[tuple[str, _Function]]:
    every = {**_FUNCTIONS, **dict.fromkeys(_ROTATIONS, _ROTATION)}
    return [(name, function) for name, function in every.items() if inspect.isfunction(getattr(source, name, None))]


def _functions_of(module: nn.Module) -> list[tuple[str, _Function]]:
    """The functions that a module may call: those of rotation are of interest in latent attention alone."""
    latent = hasattr(module, "qk_rope_head_dim")
    holds_parameters = latent or any(isinstance(child, nn.Conv1d) for child in module.children())
    if not holds_parameters:
        return []
    return [(name, f) for name, f in _found_in(source_of(module)) if (f is _ROTATION) == latent]
