"""The weights that a candidate's norms and projections use, read off what goes in and what comes out.

A norm's weight is the gain of each channel, and a bias is the mean of what is added to it. What is read is made a fault
of its own, with the numbers in its words, and has to reproduce the candidate as any fault of the catalogue has to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parity.diagnose.readings import difference
from parity.diagnose.trial import Case
from parity.faults import Fault, Scope
from parity.faults.fault import Change, plain, weight
from parity.faults.patches.modules import elsewhere, is_norm
from parity.faults.patches.norm import adds_one
from parity.faults.patches.numbers import stored_as
from parity.sites import short, without_call

# Fewer rows than this tell a channel's gain from chance only by luck.
LEAST_ROWS = 16
_TELLING = 8  # columns that tell rows apart
# A weight is told apart from the checkpoint's beyond so many standard errors, and beyond this change.
_SIGMAS, _LEAST_CHANGE = 6.0, 1e-5
# Gains that differ by less than this share of what they have in common are one.
_UNIFORM = 0.1
# So many channels are named; of more, the first.
_NAMED = 3


def read_norm(case: Case) -> Fault | None:
    """The weights that a norm multiplies by, where they are others than the checkpoint's; None elsewhere."""
    name, norm = named_module(case)
    if norm is None or not is_norm(norm) or getattr(norm, "weight", None) is None or _rows(case) < LEAST_ROWS:
        return None
    # Multiplied by one: what each channel's weight is the gain of.
    neutral = torch.zeros_like(norm.weight) if adds_one(norm) else torch.ones_like(norm.weight)
    unit = _compute(case, lambda s: weight(module_of(s, name), "weight", neutral.to(module_of(s, name).weight)))
    unit, y = unit.flatten(0, -2).double(), case.candidate.to(unit.device).flatten(0, -2).double()
    if getattr(norm, "bias", None) is not None:
        y, unit = y - norm.bias.data.double(), unit - norm.bias.data.double()
    size = unit.square().sum(0).clamp_min(1e-300)
    value = (unit * y).sum(0) / size
    left = torch.maximum((y - unit * value).square().mean(0), _noise(case))
    stored = norm.weight.data.double()
    right = stored + 1 if adds_one(norm) else stored
    wrong = _told(value, (left / size).sqrt(), right)
    if not wrong:
        return None
    stderr = (left / size).sqrt()
    ratios = (value / right)[right != 0]
    common = ratios.median()
    if len(ratios) > 1 and bool((ratios - common).abs().max() < _UNIFORM * (common - 1).abs()):
        return None  # one factor for all is not of the weights
    read = torch.where((value - right).abs() > _SIGMAS * stderr, value, right)
    title, used = _source(case, name, read - (right - stored), stderr)
    if used is None:
        title = f"the norm multiplies by other weights than the checkpoint's: {_named(wrong, read, right)}"
        used = read - (right - stored)
    fix = "check how the norm's weights are loaded, converted and rounded"
    return _fault(case, "norm-other-weights", title, fix, lambda s: _parameter(module_of(s, name), "weight", used))


def _source(case: Case, name: str, value: Tensor, stderr: Tensor) -> tuple[str, Tensor | None]:
    """Where a norm's weights that were read come from, and what they are there; None where that is not known."""
    same = _layer_with(case, name, "weight", value, stderr)
    if same is not None:
        return f"the norm has the weights of layer {same[0]}", same[1]
    stored: Tensor = named_module(case)[1].weight.data
    for dtype, called in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        rounded = stored_as(stored, dtype)
        if not torch.equal(rounded, stored) and _is(value, rounded.double(), stderr):
            return f"the norm's weights are rounded to {called}", rounded
    return "", None


def read_offset(case: Case) -> Fault | None:
    """What a projection adds to every token, where that is not its bias; None elsewhere."""
    name, module = named_module(case)
    if not isinstance(module, nn.Linear) or _rows(case) < LEAST_ROWS:
        return None
    error = difference(case.candidate, case.truth).flatten(0, -2).double()
    value = error.mean(0)
    left = torch.maximum((error - value).square().mean(0), _noise(case))
    own = torch.zeros_like(value) if module.bias is None else module.bias.data.double()
    stderr = (left / len(error)).sqrt()
    wrong = _told(own + value, stderr, own)
    if not wrong:
        return None
    used = own.clone()
    used[wrong] += value[wrong]
    same = _layer_with(case, name, "bias", own + value, stderr) if module.bias is not None else None
    if same is not None:
        title, used = f"the projection has the bias of layer {same[0]}", same[1].double()
    elif module.bias is None:
        title = f"the projection adds a bias that the checkpoint does not have: {_named(wrong, used, own)}"
    else:
        title = f"the projection adds another bias than the checkpoint's: {_named(wrong, used, own)}"
    fix = "load the bias that belongs to this projection, and none where the checkpoint has none"
    return _fault(case, "bias-other", title, fix, lambda s: _biased(module_of(s, name), used - own))


# -- parts -----------------------------------------------------------------------------------------------------


def named_module(case: Case) -> tuple[str, Any]:
    """The module whose output the site is, and its name within the layer; None for a site of another kind."""
    site, scope = case.bench.sites[case.site], case.bench.scope(case.bench.reference.precise, case.at.piece)
    if site.where != "output" or without_call(case.site) != case.site:
        return "", None
    module = scope.model.get_submodule(site.module)
    if scope.layer is None:
        return site.module, module
    return next(name for name, inner in scope.layer.named_modules() if inner is module), module


def module_of(scope: Scope, name: str) -> Any:
    """The module of this name within the scope's layer, or within the model at its ends."""
    return (scope.layer or scope.model).get_submodule(name)


def _rows(case: Case) -> int:
    """How many rows differ from one another: a token that is repeated says the same again."""
    return len(torch.unique(case.truth.flatten(0, -2)[:, :_TELLING], dim=0))


def _noise(case: Case) -> Tensor:
    """Mean square of the reference's own rounding in each channel."""
    return difference(case.floor, case.truth).flatten(0, -2).double().square().mean(0)


def _compute(case: Case, patch: Callable[[Scope], Change]) -> Tensor:
    fault = _fault(case, "watch", "", "", patch)
    return case.bench.compute(case.at, [case.site], case.bench.reference.precise, fault)[case.site]


def _fault(case: Case, id: str, title: str, fix: str, patch: Callable[[Scope], Change]) -> Fault:
    return Fault(id=id, title=title, sites=(short(case.site),), fix=fix, patch=plain(patch))


def _told(value: Tensor, stderr: Tensor, expected: Tensor) -> list[int]:
    """The channels whose number differs from what is expected by more than its errors and by more than is legal."""
    margin = torch.maximum(_SIGMAS * stderr, _LEAST_CHANGE * expected.abs())
    return [int(c) for c in ((value - expected).abs() > margin).nonzero().flatten()]


def _layer_with(case: Case, name: str, parameter: str, value: Tensor, stderr: Tensor) -> tuple[int, Tensor] | None:
    """The layer whose parameter of the same name is what was read, and the parameter; None if there is none."""
    scope = case.bench.scope(case.bench.reference.precise, case.at.piece)
    if scope.layer is None or scope.index is None:
        return None
    for layer in range(int(scope.config.num_hidden_layers)):
        other = elsewhere(scope, f"{name}.{parameter}", layer - scope.index)
        if other is None or other.shape != value.shape or layer == scope.index:
            continue
        if _is(value, other.double(), stderr):
            return layer, other
    return None


def _is(value: Tensor, other: Tensor, stderr: Tensor) -> bool:
    """Whether what was read is another parameter, as far as errors allow."""
    return bool(((value - other).abs() <= torch.maximum(_SIGMAS * stderr, _LEAST_CHANGE * other.abs())).all())


def _parameter(module: nn.Module, name: str, value: Tensor) -> Change:
    return weight(module, name, value.to(getattr(module, name)))


@contextmanager
def _biased(module: nn.Linear, more: Tensor) -> Iterator[None]:
    """The projection adds `more` (o) to what it returns."""
    with ExitStack() as stack:
        if module.bias is not None:
            stack.enter_context(weight(module, "bias", (module.bias.data.double() + more).to(module.bias)))
        else:
            module._parameters["bias"] = nn.Parameter(more.to(module.weight), requires_grad=False)
            stack.callback(module._parameters.__setitem__, "bias", None)
        yield


def _named(wrong: list[int], value: Tensor, expected: Tensor) -> str:
    """`channel 7 has 1.2 in place of 0.8, channel 9 …`."""
    first = [f"channel {c} has {float(value[c]):.4g} in place of {float(expected[c]):.4g}" for c in wrong[:_NAMED]]
    return ", ".join(first) + (f", and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else "")
