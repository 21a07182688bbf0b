"""The residual stream: what is added to it, what to, and who reads it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from parity.faults.fault import STREAM_SUM, Change, Fault, Number, Scope, fault
from parity.faults.patches.modules import attention_of, forward, mlp_of, norms_of, together
from parity.faults.patches.norm import IN_LAYER, NORMS
from parity.faults.patches.residual import (
    Addend,
    Sums,
    before_norm,
    has_norm_behind,
    is_parallel,
    is_sequential,
    summed,
)

MID, OUT = ("resid_mid", STREAM_SUM), ("", STREAM_SUM)
_FACTOR = Number(name="factor", expected=lambda _s: 1.0, typical=(0.5, 2.0))
READERS = ("post_attention_layernorm", "pre_feedforward_layernorm", "gate_proj", "up_proj", "mlp")


@fault(
    id="residual-dropped-attention",
    title="attention's output replaces the residual stream; the reference adds it",
    sites=MID,
    fix="add the layer's input to attention's output",
    applies=is_sequential,
)
def residual_dropped_attention(scope: Scope) -> Change:
    return summed(scope, attention=lambda stream, branch, read: branch.clone())


@fault(
    id="residual-dropped-mlp",
    title="the MLP's output replaces the residual stream; the reference adds it",
    sites=OUT,
    fix="add the stream after attention to the MLP's output",
    applies=is_sequential,
)
def residual_dropped_mlp(scope: Scope) -> Change:
    return summed(scope, mlp=lambda stream, branch, read: branch.clone())


@fault(
    id="residual-doubled-attention",
    title="the layer's input is added twice to attention's output",
    sites=MID,
    fix="add the residual once: some fused kernels already do",
    applies=is_sequential,
)
def residual_doubled_attention(scope: Scope) -> Change:
    return summed(scope, attention=lambda stream, branch, read: stream + branch + stream)


@fault(
    id="residual-doubled-mlp",
    title="the residual stream is added twice to the MLP's output",
    sites=OUT,
    fix="add the residual once: some fused kernels already do",
    applies=is_sequential,
)
def residual_doubled_mlp(scope: Scope) -> Change:
    return summed(scope, mlp=lambda stream, branch, read: stream + branch + stream)


@fault(
    id="attention-ignored",
    title="attention's output is never added to the residual stream",
    sites=MID,
    fix="add attention's output to the layer's input",
    applies=is_sequential,
)
def attention_ignored(scope: Scope) -> Change:
    return summed(scope, attention=lambda stream, branch, read: stream.clone())


@fault(
    id="mlp-ignored",
    title="the MLP's output is never added to the residual stream",
    sites=OUT,
    fix="add the MLP's output to the stream after attention",
    applies=is_sequential,
)
def mlp_ignored(scope: Scope) -> Change:
    return summed(scope, mlp=lambda stream, branch, read: stream.clone())


def _reads_normed(scope: Scope) -> bool:
    return is_sequential(scope) and "input_layernorm" in norms_of(scope)


@fault(
    id="residual-normed-attention",
    title="the normalized input is added to attention's output; the reference adds the input itself",
    sites=MID,
    fix="keep the layer's input before normalizing it",
    applies=_reads_normed,
)
def residual_normed_attention(scope: Scope) -> Change:
    return summed(scope, attention=lambda stream, branch, read: read + branch)


@fault(
    id="residual-normed-mlp",
    title="the normalized stream is added to the MLP's output; the reference adds the stream itself",
    sites=OUT,
    fix="keep the stream before normalizing it",
    applies=_reads_normed,
)
def residual_normed_mlp(scope: Scope) -> Change:
    return summed(scope, mlp=lambda stream, branch, read: read + branch)


@fault(
    id="residual-input-mlp",
    title="the layer's input is added to the MLP's output; the reference adds the stream after attention",
    sites=OUT,
    fix="take a new residual after attention",
    applies=is_sequential,
)
def residual_input_mlp(scope: Scope) -> Change:
    def from_the_start(stream: Tensor, branch: Tensor, _read: Tensor) -> Tensor:
        return (stream if sums.entered is None else sums.entered) + branch

    sums = Sums(scope, {1: from_the_start}.get)
    return together(sums)


@fault(
    id="residual-multiplier",
    title="what is added to the residual stream carries another factor",
    sites=("resid_mid", *OUT),
    fix="multiply by residual_multiplier of config.json, or by nothing where there is none",
    source="exllamav3#218",
    applies=lambda s: s.layer is not None,
    number=_FACTOR,
)
def residual_multiplier(scope: Scope, gain: float) -> Change:
    def scaled(stream: Tensor, branch: Tensor, _read: Tensor) -> Tensor:
        return stream + branch * gain

    return together(Sums(scope, lambda _number: scaled))


@fault(
    id="parallel-attention-multiplier",
    title="what attention adds to the residual stream, beside the MLP, carries another factor",
    sites=OUT,
    fix="add attention's output, the MLP's and the residual as they are",
    applies=is_parallel,
    number=_FACTOR,
)
def parallel_attention_multiplier(scope: Scope, gain: float) -> Change:
    return together(Addend(scope, attention_of(scope), gain))


@fault(
    id="parallel-mlp-multiplier",
    title="what the MLP adds to the residual stream, beside attention, carries another factor",
    sites=OUT,
    fix="add attention's output, the MLP's and the residual as they are",
    applies=is_parallel,
    number=_FACTOR,
)
def parallel_mlp_multiplier(scope: Scope, gain: float) -> Change:
    return together(Addend(scope, mlp_of(scope), gain))


@fault(
    id="branch-multiplier-before-norm",
    title="what goes from attention or the MLP into the norm behind it carries another factor",
    sites=NORMS,
    fix="hand the output on as it is; behind a norm only eps tells the difference",
    needs="an output whose mean square is not far above eps, or a factor far from one",
    applies=has_norm_behind,
    number=_FACTOR,
)
def branch_multiplier_before_norm(scope: Scope, gain: float) -> Change:
    return before_norm(scope, gain)


def _has_reader(scope: Scope) -> bool:
    """Whether it is known what reads the stream for the MLP."""
    return is_sequential(scope) and sum(name in IN_LAYER for name in norms_of(scope)) >= 2


def _mlp_reads(scope: Scope, pick: Callable[[Sums], Tensor | None]) -> Change:
    """The MLP's norm (or the MLP, where nothing normalizes its input) reads another tensor than the stream."""
    sums, norms = Sums(scope, lambda _number: None), norms_of(scope)
    names = ("pre_feedforward_layernorm", "post_attention_layernorm")
    normed = "input_layernorm" in norms
    reader = next(norms[n] for n in names if n in norms) if normed else mlp_of(scope)
    before: Callable[[Tensor], Tensor] = reader.forward

    def forwarded(x: Tensor) -> Tensor:
        other = pick(sums)
        return before(x if other is None else other)

    return together(sums, forward(reader, forwarded))


@fault(
    id="mlp-parallel",
    title="the MLP reads the layer's input, beside attention; in the reference it follows attention",
    sites=READERS,
    fix="give the MLP's norm the stream to which attention has been added",
    applies=_has_reader,
)
def mlp_parallel(scope: Scope) -> Change:
    return _mlp_reads(scope, lambda sums: sums.entered)


@fault(
    id="mlp-of-attention",
    title="the MLP reads attention's output alone; in the reference the residual stream",
    sites=READERS,
    fix="give the MLP's norm the stream to which attention has been added",
    applies=_has_reader,
)
def mlp_of_attention(scope: Scope) -> Change:
    return _mlp_reads(scope, lambda sums: sums.branch)


FAULTS: tuple[Fault, ...] = (
    residual_dropped_attention,
    residual_dropped_mlp,
    residual_doubled_attention,
    residual_doubled_mlp,
    attention_ignored,
    mlp_ignored,
    residual_normed_attention,
    residual_normed_mlp,
    residual_input_mlp,
    residual_multiplier,
    parallel_attention_multiplier,
    parallel_mlp_multiplier,
    branch_multiplier_before_norm,
    mlp_parallel,
    mlp_of_attention,
)
