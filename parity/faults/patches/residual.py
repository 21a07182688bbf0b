"""The residual stream: the sums of a decoder layer, what its parts give, and how these are changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity.faults.fault import Change, Scope
from parity.faults.patches.modules import adds_to_residual, attention_of, forward, mlp_of, says_norm, together
from parity.record.tap import first_tensor

# (stream, what is added to it, the normalized stream that the branch read) -> their sum
Sum = Callable[[Tensor, Tensor, Tensor], Tensor]
# The rule for a sum of the layer by its number; None for one that stays as it is.
Rules = Callable[[int], Sum | None]

_IN_PLACE = ("add_", "__iadd__")
_ADDS = ("add", "__add__", "__radd__", *_IN_PLACE)
# What leaves the stream as it is but for its dtype, its shape or a factor.
_KEEPS = ("to", "float", "type", "view", "reshape", "contiguous", "mul", "__mul__", "__rmul__")
_PARALLEL = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")


class Outputs:
    """What some modules of a layer give while it runs, as it flows on: their hooks come after those that tap."""

    def __init__(self, layer: nn.Module, modules: Iterable[nn.Module]) -> None:
        self.layer, self.modules = layer, list(modules)
        self.last: dict[nn.Module, Tensor | None] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> Outputs:
        self.handles = [self.layer.register_forward_pre_hook(self._start)]
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.last.clear()

    def _start(self, _layer: nn.Module, _args: Any) -> None:
        self.handles += [module.register_forward_hook(self._keep) for module in self.modules]

    def _keep(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.last[module] = first_tensor(output)

    def has(self, value: Any) -> bool:
        """Whether a value (any shape) is the very tensor that one of the modules gave last."""
        return any(value is last for last in self.last.values())


class Sums(TorchFunctionMode):
    """The sums of a decoder layer on the residual stream are computed by rules.

    No module and no function has these sums, but each is recognized by what it adds to: the very tensor that
    entered the layer or the branch, or a cast, a view or a multiple of it, then what the sum before made.
    """

    def __init__(self, scope: Scope, rules: Rules) -> None:
        super().__init__()
        assert scope.layer is not None, "unreachable because these faults apply to layers only"
        self.layer, self.rules = scope.layer, rules
        self.step = 0
        self.entered: Tensor | None = None  # into the layer
        self.stream: list[Tensor] = []  # what the next sum adds to, in all its forms
        self.read: Tensor | None = None  # what the branch at work was given
        self.branch: Tensor | None = None  # what was added last
        self.handles: list[Any] = []

    def __enter__(self) -> Sums:
        parts = [m for m in self.layer.children() if not says_norm(m) and any(True for _ in m.parameters())]
        self.handles = [self.layer.register_forward_pre_hook(self._start, with_kwargs=True)]
        self.handles += [part.register_forward_pre_hook(self._reading, with_kwargs=True) for part in parts]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()
        self.entered = self.read = self.branch = None
        self.stream = []

    def _start(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.entered, self.step, self.read = _first(args, kwargs), 0, None
        self.stream = [] if self.entered is None else [self.entered]
        # A part may add to the stream itself, and what it gives may be exchanged by a tap: the hook comes after that.
        for part in self.layer.children():
            self.handles.append(part.register_forward_hook(self._adding))

    def _reading(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        given = _first(args, kwargs)
        if given is not None and self.entered is not None and given.shape == self.entered.shape:
            self.read = given
            # Where the norm comes before the residual is taken, the normalized stream is what a branch is added to.
            self.stream += [] if self._is_stream(given) else [given]

    def _adding(self, module: nn.Module, _args: Any, output: Any) -> None:
        gave = first_tensor(output)
        if gave is not None and adds_to_residual(module):
            self.stream = [gave]

    def _is_stream(self, value: Any) -> bool:
        return any(value is one for one in self.stream)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        mine = [a for a in args if self._is_stream(a)]
        if not mine:
            return func(*args, **kwargs)
        branch = next((a for a in args if isinstance(a, Tensor) and a is not mine[0]), None)
        if branch is None:
            result = func(*args, **kwargs)
            self.stream += [result] if name in _KEEPS and isinstance(result, Tensor) else []
            return result
        if name not in _ADDS or kwargs or branch.shape != mine[0].shape:
            return func(*args, **kwargs)
        rule, self.branch = self.rules(self.step), branch
        read = mine[0] if self.read is None else self.read
        total = func(*args) if rule is None else rule(mine[0], branch, read)
        total = args[0].copy_(total) if name in _IN_PLACE else total
        self.stream, self.step = [total], self.step + 1
        return total


class Addend(TorchFunctionMode):
    """What a module of the layer gives is multiplied by a factor wherever it is added to something of its shape."""

    def __init__(self, scope: Scope, module: nn.Module, factor: float) -> None:
        super().__init__()
        assert scope.layer is not None, "unreachable because these faults apply to layers only"
        self.outputs, self.factor = Outputs(scope.layer, [module]), factor

    def __enter__(self) -> Addend:
        self.outputs.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self.outputs.__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name not in _ADDS or not any(self.outputs.has(a) for a in args):
            return func(*args, **kwargs)
        total = torch.add(*(a * self.factor if self.outputs.has(a) else a for a in args), **kwargs)
        return args[0].copy_(total) if name in _IN_PLACE else total


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def is_parallel(scope: Scope) -> bool:
    """Whether attention and MLP stand side by side, and what they give is added to the stream together."""
    if attention_of(scope) is None or mlp_of(scope) is None:
        return False
    said = any(getattr(owner, name, False) for owner in (scope.layer, scope.config) for name in _PARALLEL)
    return said or len(norms_around(scope)) < 2


def is_sequential(scope: Scope) -> bool:
    """Whether attention and MLP follow each other, each added to the residual stream."""
    return attention_of(scope) is not None and mlp_of(scope) is not None and not is_parallel(scope)


def norms_around(scope: Scope) -> dict[str, nn.Module]:
    """The norms that the layer itself calls, by name; those inside its parts are not among them."""
    return {} if scope.layer is None else {n: m for n, m in scope.layer.named_children() if says_norm(m)}


def summed(scope: Scope, attention: Sum | None = None, mlp: Sum | None = None) -> Change:
    """The sums after attention and after the MLP, (b, t, d) both, are computed so; None means as they are."""
    return together(Sums(scope, {0: attention, 1: mlp}.get))


def has_norm_behind(scope: Scope) -> bool:
    """Whether a norm of the layer stands behind attention or MLP, rather than before it."""
    norms = norms_around(scope)
    return len(norms) > 2 or (bool(norms) and all(name.startswith("post") for name in norms))


@contextmanager
def before_norm(scope: Scope, factor: float) -> Iterator[None]:
    """What parts of the layer give, (b, t, d), is multiplied by a factor where a norm takes it."""
    assert scope.layer is not None, "unreachable because this fault applies to layers only"
    norms = norms_around(scope).values()
    outputs = Outputs(scope.layer, (m for m in scope.layer.children() if not says_norm(m)))

    def reading(norm: nn.Module) -> Change:
        plain = norm.forward
        return forward(norm, lambda x, *more: plain(x * factor if outputs.has(x) else x, *more))

    with outputs, together(*map(reading, norms)):
        yield
