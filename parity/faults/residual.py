"""The residual stream: what is added to it, what to, and who reads it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity.faults.fault import Fault, Number, Scope
from parity.faults.norm_changes import IN_LAYER
from parity.faults.parts import attention_of, forward, mlp_of, norms_of, plain, together, truncated, wide

MID, OUT = ("resid_mid",), ("",)
Change = AbstractContextManager[None]
# (stream, what is added to it, the normalized stream that the branch read) -> their sum
Sum = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Sums(TorchFunctionMode):
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

    def __enter__(self) -> _Sums:
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


def _sums(attention: Sum | None = None, mlp: Sum | None = None) -> Callable[[Scope], Change]:
    return lambda scope: together(_Sums(scope, attention, mlp))


def _scaled(scope: Scope, gain: float) -> Change:
    """Each branch `gain` times as large as the reference adds it."""
    change: Sum = lambda stream, branch, _read: stream + branch * gain  # noqa: E731
    return together(_Sums(scope, change, change))


def _input_added(scope: Scope) -> Change:
    sums = _Sums(scope, None, None)
    sums.rules[1] = lambda stream, branch, _read: (stream if sums.entered is None else sums.entered) + branch
    return together(sums)


def cut_sums(scope: Scope) -> Change:
    """Both sums cut to bfloat16 rather than rounded."""

    def cut(stream: Tensor, branch: Tensor, _read: Tensor) -> Tensor:
        return truncated(stream.to(wide(stream.dtype)) + branch).to(stream.dtype)

    return together(_Sums(scope, cut, cut))


def _mlp_reads(pick: Callable[[_Sums], Tensor | None]) -> Callable[[Scope], Change]:
    """The MLP's norm (or the MLP, where nothing normalizes its input) reads another tensor than the stream."""

    def change(scope: Scope) -> Change:
        sums, norms = _Sums(scope, None, None), norms_of(scope)
        names = ("pre_feedforward_layernorm", "post_attention_layernorm")
        normed = "input_layernorm" in norms
        reader = next(norms[n] for n in names if n in norms) if normed else mlp_of(scope)
        before: Callable[[Tensor], Tensor] = reader.forward

        def forwarded(x: Tensor) -> Tensor:
            other = pick(sums)
            return before(x if other is None else other)

        return together(sums, forward(reader, forwarded))

    return change


def _reads_normed(scope: Scope) -> bool:
    return is_sequential(scope) and "input_layernorm" in norms_of(scope)


READERS = ("post_attention_layernorm", "pre_feedforward_layernorm", "gate_proj", "up_proj", "mlp")

FAULTS: tuple[Fault, ...] = (
    Fault(
        "residual-dropped-attention",
        "attention's output replaces the residual stream; the reference adds it",
        MID,
        "add the layer's input to attention's output",
        "",
        "",
        plain(_sums(attention=lambda stream, branch, read: branch.clone())),
        is_sequential,
    ),
    Fault(
        "residual-dropped-mlp",
        "the MLP's output replaces the residual stream; the reference adds it",
        OUT,
        "add the stream after attention to the MLP's output",
        "",
        "",
        plain(_sums(mlp=lambda stream, branch, read: branch.clone())),
        is_sequential,
    ),
    Fault(
        "residual-doubled-attention",
        "the layer's input is added twice to attention's output",
        MID,
        "add the residual once: some fused kernels already do",
        "",
        "",
        plain(_sums(attention=lambda stream, branch, read: stream + branch + stream)),
        is_sequential,
    ),
    Fault(
        "residual-doubled-mlp",
        "the residual stream is added twice to the MLP's output",
        OUT,
        "add the residual once: some fused kernels already do",
        "",
        "",
        plain(_sums(mlp=lambda stream, branch, read: stream + branch + stream)),
        is_sequential,
    ),
    Fault(
        "attention-ignored",
        "attention's output is never added to the residual stream",
        MID,
        "add attention's output to the layer's input",
        "",
        "",
        plain(_sums(attention=lambda stream, branch, read: stream.clone())),
        is_sequential,
    ),
    Fault(
        "mlp-ignored",
        "the MLP's output is never added to the residual stream",
        OUT,
        "add the MLP's output to the stream after attention",
        "",
        "",
        plain(_sums(mlp=lambda stream, branch, read: stream.clone())),
        is_sequential,
    ),
    Fault(
        "residual-normed-attention",
        "the normalized input is added to attention's output; the reference adds the input itself",
        MID,
        "keep the layer's input before normalizing it",
        "",
        "",
        plain(_sums(attention=lambda stream, branch, read: read + branch)),
        _reads_normed,
    ),
    Fault(
        "residual-normed-mlp",
        "the normalized stream is added to the MLP's output; the reference adds the stream itself",
        OUT,
        "keep the stream before normalizing it",
        "",
        "",
        plain(_sums(mlp=lambda stream, branch, read: read + branch)),
        _reads_normed,
    ),
    Fault(
        "residual-input-mlp",
        "the layer's input is added to the MLP's output; the reference adds the stream after attention",
        OUT,
        "take the residual anew after attention",
        "",
        "",
        plain(_input_added),
        is_sequential,
    ),
    Fault(
        "residual-multiplier",
        "what attention and MLP add to the residual stream carries another factor",
        (*MID, *OUT),
        "multiply by residual_multiplier of config.json, or by nothing where there is none",
        "exllamav3#218",
        "",
        _scaled,
        is_sequential,
        Number("factor", lambda _s: 1.0, (0.5, 2.0)),
    ),
    Fault(
        "mlp-parallel",
        "the MLP reads the layer's input, beside attention; in the reference it follows attention",
        READERS,
        "give the MLP's norm the stream to which attention has been added",
        "",
        "",
        plain(_mlp_reads(lambda sums: sums.entered)),
        is_sequential,
    ),
    Fault(
        "mlp-of-attention",
        "the MLP reads attention's output alone; in the reference the residual stream",
        READERS,
        "give the MLP's norm the stream to which attention has been added",
        "",
        "",
        plain(_mlp_reads(lambda sums: sums.branch)),
        is_sequential,
    ),
)
