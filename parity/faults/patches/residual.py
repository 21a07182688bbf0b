"""The residual stream: the two sums of a decoder layer, and how they are changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity.faults.fault import Change, Scope
from parity.faults.patches.modules import attention_of, mlp_of, norms_of, together
from parity.faults.patches.norm import IN_LAYER

# (stream, what is added to it, the normalized stream that the branch read) -> their sum
Sum = Callable[[Tensor, Tensor, Tensor], Tensor]


class Sums(TorchFunctionMode):
    """The two sums of a decoder layer are computed by `attention` and `mlp`; None means as they are.

    No module and no function has these sums, but each is recognized by what it adds to: the very tensor that
    entered the layer, then the very tensor that the first of the two sums made.
    """

    def __init__(self, scope: Scope, attention: Sum | None, mlp: Sum | None) -> None:
        super().__init__()
        self.scope = scope
        self.rules: list[Sum | None] = [attention, mlp]
        self.step = 0
        self.entered: Tensor | None = None  # into the layer
        self.stream: Tensor | None = None  # what the next sum adds to
        self.read: Tensor | None = None  # what the branch at work was given
        self.branch: Tensor | None = None  # what was added last
        self.handles: list[Any] = []

    def __enter__(self) -> Sums:
        assert self.scope.layer is not None, "unreachable because these faults apply to layers only"
        self.handles = [
            self.scope.layer.register_forward_pre_hook(self._start, with_kwargs=True),
            attention_of(self.scope).register_forward_pre_hook(self._reading, with_kwargs=True),
            mlp_of(self.scope).register_forward_pre_hook(self._reading, with_kwargs=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()
        self.entered = self.stream = self.read = self.branch = None

    def _start(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.entered = self.stream = _first(args, kwargs)
        self.step = 0

    def _reading(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.read = _first(args, kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_sum = getattr(func, "__name__", "") in ("add", "__add__", "__radd__") and len(args) == 2
        if not is_sum or self.stream is None or not any(a is self.stream for a in args):
            return func(*args, **(kwargs or {}))
        branch = args[1] if args[0] is self.stream else args[0]
        if not isinstance(branch, Tensor) or branch.shape != self.stream.shape:
            return func(*args, **(kwargs or {}))
        rule, self.branch = self.rules[self.step], branch
        total = func(*args) if rule is None or self.read is None else rule(self.stream, branch, self.read)
        self.stream, self.step = (total, 1) if self.step == 0 else (None, 2)
        return total


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def is_sequential(scope: Scope) -> bool:
    """Whether attention and MLP follow each other, each added to the residual stream."""
    if attention_of(scope) is None or mlp_of(scope) is None or getattr(scope.layer, "use_parallel_residual", False):
        return False
    return sum(name in IN_LAYER for name in norms_of(scope)) >= 2


def summed(scope: Scope, attention: Sum | None = None, mlp: Sum | None = None) -> Change:
    """The sums after attention and after the MLP, (b, t, d) both, are computed so; None means as they are."""
    return together(Sums(scope, attention, mlp))
