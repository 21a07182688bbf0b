"""Linear attention, state spaces and short convolutions: decay, time step, state, convolution, gated norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.faults.fault import TWO_TOKENS, Change, Fault, Scope, attribute, fault, weight
from parity.faults.patches.modules import forward
from parity.faults.patches.router import Swapped
from parity.record.scans import source_of

_DELTA_RULE = "torch_chunk_gated_delta_rule"
# Where the time step shows: in linear attention as the decay that is made of it.
_STEP = ("decay", "dt")
_CONVOLUTION = ("conv_output",)
_STATE = ("state_output",)


def _block(scope: Scope) -> Any:
    """The module of the layer that has a convolution over tokens; None if there is none."""
    parts = scope.layer.modules() if scope.layer is not None else ()
    return next((m for m in parts if any(isinstance(child, nn.Conv1d) for child in m.children())), None)


def _convolution(scope: Scope) -> Any:
    return next((child for child in _children(scope) if isinstance(child, nn.Conv1d)), None)


def _children(scope: Scope) -> list[nn.Module]:
    block = _block(scope)
    return list(block.children()) if block is not None else []


def _has(scope: Scope, name: str) -> bool:
    return isinstance(getattr(_block(scope), name, None), nn.Parameter)


def _calls(scope: Scope, *functions: str) -> str | None:
    """Which of these functions stands in the file of the block, and so is what it calls."""
    block = _block(scope)
    found = (name for name in functions if block is not None and hasattr(source_of(block), name))
    return next(found, None) if _has(scope, "A_log") else None


def _within(scope: Scope, name: str, instead: Callable[..., Any]) -> Change:
    """In the block, the torch function of this name is `instead(function, args, kwargs)`."""
    block = _block(scope)
    plain = block.forward

    def compute(*args: Any, **kwargs: Any) -> Any:
        with Swapped(name, instead):
            return plain(*args, **kwargs)

    return forward(block, compute)


def _calling(scope: Scope, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    """The function of this name that the block calls gets changed keyword arguments."""
    source = source_of(_block(scope))
    original = getattr(source, name)

    @wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **change(kwargs))

    return attribute(source, name, called)


def _first(_func: Callable[..., Any], args: Any, _kwargs: Any) -> Any:
    return args[0]


# -- decay and time step -------------------------------------------------------------------------------------


@fault(
    id="scan-softplus-missing",
    title="the time step is used as the projection gives it; the reference takes its softplus",
    sites=_STEP,
    fix="apply softplus to the time step plus its bias",
    applies=lambda s: _has(s, "A_log"),
)
def scan_softplus_missing(scope: Scope) -> Change:
    return _within(scope, "softplus", _first)


@fault(
    id="scan-step-bias-missing",
    title="the bias of the time step is left out",
    sites=_STEP,
    fix="add dt_bias to the time step before softplus",
    applies=lambda s: _has(s, "dt_bias"),
)
def scan_step_bias_missing(scope: Scope) -> Change:
    block = _block(scope)
    return weight(block, "dt_bias", torch.zeros_like(block.dt_bias))


@fault(
    id="scan-decay-missing",
    title="the state of linear attention does not decay",
    sites=("decay",),
    fix="multiply the state by exp(g), g = -exp(A_log) * softplus(a + dt_bias)",
    applies=lambda s: _calls(s, _DELTA_RULE) is not None,
)
def scan_decay_missing(scope: Scope) -> Change:
    return _within(scope, "softplus", lambda _func, args, _kwargs: torch.zeros_like(args[0]))


@fault(
    id="scan-a-log-as-it-is",
    title="the decay rate is A_log itself; the reference takes its exponential",
    sites=("decay", "state_output"),
    fix="use A = -exp(A_log)",
    applies=lambda s: _has(s, "A_log"),
)
def scan_a_log_as_it_is(scope: Scope) -> Change:
    raw = _block(scope).A_log.detach()

    def exponential(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        value = args[0]
        is_raw = value.shape == raw.shape and torch.equal(value.to(raw.dtype), raw)
        return value if is_raw else func(*args, **kwargs)

    return _within(scope, "exp", exponential)


# -- linear attention ----------------------------------------------------------------------------------------


@fault(
    id="delta-beta-unbounded",
    title="beta is used as the projection gives it; the reference takes its sigmoid",
    sites=("beta",),
    fix="apply sigmoid to beta",
    applies=lambda s: _calls(s, _DELTA_RULE) is not None,
)
def delta_beta_unbounded(scope: Scope) -> Change:
    return _within(scope, "sigmoid", _first)


@fault(
    id="delta-qk-not-normalized",
    title="queries and keys of linear attention are not normalized",
    sites=_STATE,
    fix="divide q and k of each head by their length",
    applies=lambda s: _calls(s, _DELTA_RULE) is not None,
)
def delta_qk_not_normalized(scope: Scope) -> Change:
    return _calling(scope, _DELTA_RULE, lambda kwargs: kwargs | {"use_qk_l2norm_in_kernel": False})


# -- state spaces --------------------------------------------------------------------------------------------


@fault(
    id="scan-skip-missing",
    title="the state space's input is not added to its output",
    sites=_STATE,
    fix="add D * x to what the state gives",
    applies=lambda s: _has(s, "D"),
)
def scan_skip_missing(scope: Scope) -> Change:
    block = _block(scope)
    return weight(block, "D", torch.zeros_like(block.D))


# -- convolution ---------------------------------------------------------------------------------------------


@fault(
    id="conv-taps-reversed",
    title="the taps of the short convolution are applied in reverse order",
    sites=_CONVOLUTION,
    fix="let the last tap meet the token itself, as torch's conv1d does",
    applies=lambda s: _convolution(s) is not None,
)
def conv_taps_reversed(scope: Scope) -> Change:
    conv = _convolution(scope)
    return weight(conv, "weight", conv.weight.detach().flip(-1))


@fault(
    id="conv-one-late",
    title="the short convolution does not see the token itself, only those before it",
    sites=_CONVOLUTION,
    fix="pad by one token less than the convolution is long, on the left only",
    needs=TWO_TOKENS,
    applies=lambda s: _convolution(s) is not None,
)
def conv_one_late(scope: Scope) -> Change:
    conv = _convolution(scope)
    return weight(conv, "weight", F.pad(conv.weight.detach()[..., 1:], (0, 1)))


@fault(
    id="conv-bias-missing",
    title="the bias of the short convolution is left out",
    sites=_CONVOLUTION,
    fix="add conv1d.bias",
    applies=lambda s: getattr(_convolution(s), "bias", None) is not None,
)
def conv_bias_missing(scope: Scope) -> Change:
    conv = _convolution(scope)
    return weight(conv, "bias", torch.zeros_like(conv.bias))


@fault(
    id="conv-activation-missing",
    title="nothing is applied to what the short convolution gives; in the reference an activation",
    sites=_CONVOLUTION,
    fix="apply the activation of config.json behind the convolution",
    applies=lambda s: isinstance(getattr(_block(s), "activation", None), str),
)
def conv_activation_missing(scope: Scope) -> Change:
    return attribute(_block(scope), "activation", None)


# -- gated norm ----------------------------------------------------------------------------------------------


def _gated_norm(scope: Scope) -> Any:
    return next((m for m in _children(scope) if type(m).__name__.endswith("RMSNormGated")), None)


def _normalized(norm: Any, x: Tensor) -> Tensor:
    size = getattr(norm, "group_size", norm.weight.numel())
    by_group = x.reshape(*x.shape[:-1], -1, size)
    scale = torch.rsqrt(by_group.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    scaled: Tensor = norm.weight * (by_group * scale).reshape(x.shape)
    return scaled


@torch.no_grad()
def _gates_first(norm: Any) -> bool:
    """Whether the gate is multiplied before the norm, as state spaces do; linear attention normalizes first.

    It is tried on any numbers.
    """
    random = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(8, norm.weight.numel(), generator=random).to(norm.weight) for _ in range(2))
    given, before = norm.forward(x, gate), _normalized(norm, x * F.silu(gate))
    behind = _normalized(norm, x) * F.silu(gate)
    return bool((given - before).norm() < (given - behind).norm())


@fault(
    id="gated-norm-order",
    title="norm and gate are applied in the other order",
    sites=("norm", "norm.output"),
    fix="state spaces (Mamba-2) multiply by the gate and then normalize, gated linear attention the other way round",
    applies=lambda s: _gated_norm(s) is not None and not hasattr(_gated_norm(s), "norm_before_gate"),
)
def gated_norm_order(scope: Scope) -> Change:
    norm = _gated_norm(scope)
    gates_first = _gates_first(norm)

    def other_order(hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        wide = hidden if gate is None else hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        opened = 1.0 if gate is None else F.silu(gate.to(wide.dtype))
        result = _normalized(norm, wide) * opened if gates_first else _normalized(norm, wide * opened)
        return result.to(hidden.dtype)

    return forward(norm, other_order)


FAULTS: tuple[Fault, ...] = (
    scan_softplus_missing,
    scan_step_bias_missing,
    scan_decay_missing,
    scan_a_log_as_it_is,
    delta_beta_unbounded,
    delta_qk_not_normalized,
    scan_skip_missing,
    conv_taps_reversed,
    conv_one_late,
    conv_bias_missing,
    conv_activation_missing,
    gated_norm_order,
)
