"""Which experts a mixture used, and with which weights, read off the sum of their outputs.

Each expert's output is known on the candidate's own inputs, so that what their sum weighs each with follows by least
squares, token by token. Where no weights make that sum, it is not the router that is wrong, and nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from parity.diagnose.readings import difference
from parity.diagnose.trial import Case
from parity.faults import Fault, Scope
from parity.faults.fault import Change, plain
from parity.faults.patches.router import BLOCK, experts_of, given_otherwise, reweighted, router_of, takes_choice
from parity.record.experts import Routing, experts_in, spread
from parity.reference.precision import unit_roundoff
from parity.sites import ends_of, short

# A weight is told from zero, or from the reference's, beyond so many standard errors, and beyond this share of it.
_SIGMAS, _LEAST_CHANGE = 6.0, 1e-4
# Of so many numbers of a token's output one weight is read, at most.
_NUMBERS_EACH = 2
# Numbers of all experts' outputs that fit into memory.
_LARGEST = 1 << 26
# Weights that leave more than this, in mean squares of rounding, are not what was used.
_FITS = 4.0
# So many are named; of more, the first.
_NAMED = 3
# A tie is what so many times the noise of the logits decides, as in parity.reference.routing.
_TIE = 8.0
_ROUTER = "follow the reference's router: by which scores it chooses, and what they are divided by and multiplied with"

Given = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Weights:
    """What each expert's output was multiplied with, and what it is in the reference: all (token, expert).

    value   as read; 0 where it cannot be told from 0
    stderr  its standard error
    right   the reference's
    logits  the reference's router's, by which ties are known; 0 where it has none
    reach   how far apart the logits of two experts are where rounding decides between them (token)
    """

    value: Tensor
    stderr: Tensor
    right: Tensor
    logits: Tensor
    reach: Tensor

    def off(self, other: Tensor) -> Tensor:
        """Where the weights are others than these (token, expert), by more than their errors."""
        return (self.value - other).abs() > torch.maximum(_SIGMAS * self.stderr, _LEAST_CHANGE * other.abs())

    def tied(self) -> Tensor:
        """The tokens (token) that go to another expert than the reference's where it is nearly tied with these."""
        gained = self.off(self.right) & (self.right == 0)
        least = self.logits.masked_fill(self.right == 0, torch.inf).amin(-1)
        lowest = self.logits.masked_fill(~gained, torch.inf).amin(-1)
        return gained.any(-1) & ((least - lowest).abs() <= self.reach)

    def are_right(self) -> bool:
        """Whether the weights are the reference's, but for errors and ties."""
        return not bool(self.off(self.right)[~self.tied()].any())

    def seen_as(self, order: Tensor, scale: Tensor) -> Weights:
        """The weights if the experts are in another order (expert), and weigh more by a factor (expert)."""
        value, stderr = (x[:, order] / scale for x in (self.value, self.stderr))
        return replace(self, value=value, stderr=stderr)


def read_experts(case: Case) -> Fault | None:
    """The fault that the weights show at the output of a mixture; None elsewhere, or where they show none."""
    scope = case.bench.scope(case.bench.reference.precise, case.at.piece)
    if ends_of(case.site).isdisjoint(BLOCK) or scope.layer is None or not takes_choice(scope):
        return None
    found = weights_of(case)
    if found is None or found.are_right():
        return None
    return _in_order(case, found) or _scaled(case, found) or _other(case, found)


def weights_of(case: Case) -> Weights | None:
    """The weights at the output of a mixture; None where none explain it, or where experts are too many to tell."""
    tokens, size = case.at.input_ids.numel(), case.truth.shape[-1]
    count = experts_in(experts_of(case.bench.scope(case.bench.reference.precise, case.at.piece))) or 0
    if count * _NUMBERS_EACH > size or tokens * count * size > _LARGEST or case.truth.numel() != tokens * size:
        return None
    outputs, rest, right = _outputs(case, count)
    y = _rows(case.candidate, outputs) - rest
    own = _rows(difference(case.floor, case.truth), outputs)
    variance = torch.maximum(own.square().mean(-1), own.square().mean())
    value, unsure = _solved(outputs, y, variance, torch.ones_like(right, dtype=torch.bool))
    used = value.abs() > _SIGMAS * unsure
    value, stderr = _solved(outputs, y, variance, used)
    left = (y - torch.einsum("te,ted->td", value, outputs)).square().mean(-1)
    if not float((left / variance).mean()) <= _FITS:
        return None
    # The reference's own rounding shows how much more it weighs than errors that experts do not share would.
    lean = (_solved(outputs, own, variance, used)[0] / stderr.clamp_min(1e-300))[used].square().mean().sqrt()
    # A weight has been rounded itself.
    rounded = unit_roundoff(case.bench.reference.working.dtype) * value.abs()
    stderr = torch.hypot(torch.where(used, stderr, unsure) * lean.clamp_min(1.0), rounded)
    return Weights(value, stderr, right, *_logits(case, right))


def _outputs(case: Case, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each expert's output (token, expert, d), what is added to them (token, d), and the reference's weights."""
    seen: list[Routing] = []

    def value(change: Given) -> Tensor:
        def watched(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(Routing(index, weights))
            return change(index, weights)

        fault = _fault(case, "watch", "", "", lambda s: given_otherwise(s, watched))
        found = case.bench.compute(case.at, [case.site], case.bench.reference.precise, fault)[case.site]
        return found.double().reshape(-1, found.shape[-1])

    rest = value(lambda index, weights: (index, torch.zeros_like(weights)))
    outputs = torch.stack([value(_alone(expert)) - rest for expert in range(count)], 1)
    return outputs, rest, spread(seen[0], count).double()


def _logits(case: Case, right: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of the reference's router (token, expert), and how far rounding reaches among them (token)."""
    seen: list[Tensor] = []

    def keep(logits: Tensor, _index: Tensor, weights: Tensor) -> Tensor:
        seen.append(logits)
        return weights

    reference = case.bench.reference
    if router_of(case.bench.scope(reference.precise, case.at.piece)) is None:
        return torch.zeros_like(right), -torch.ones_like(right[:, 0])
    for model in (reference.precise, reference.working):
        case.bench.compute(case.at, [case.site], model, _fault(case, "watch", "", "", lambda s: reweighted(s, keep)))
    exact, rounded = (logits.double() for logits in seen)
    least = unit_roundoff(reference.working.dtype) * exact.abs().amax(-1)
    return exact, _TIE * torch.maximum((rounded - exact).square().mean(-1).sqrt(), least)


def _alone(expert: int) -> Given:
    """Every token goes to one expert, and with weight one."""
    return lambda index, weights: (torch.full_like(index[:, :1], expert), torch.ones_like(weights[:, :1]))


def _solved(outputs: Tensor, y: Tensor, variance: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the used experts (token, expert) and their standard errors; 0 for the others."""
    some = outputs * used[..., None]
    normal = some @ some.mT + torch.diag_embed((~used).double())
    inverse = torch.linalg.pinv(normal, hermitian=True)
    value = torch.einsum("tef,tfd,td->te", inverse, some, y)
    left = (y - torch.einsum("te,ted->td", value, some)).square().mean(-1)
    noise = torch.maximum(variance, left)[:, None] * inverse.diagonal(dim1=-2, dim2=-1)
    return torch.where(used, value, 0), torch.where(used, noise.clamp_min(0).sqrt(), 0)


# -- what they show ----------------------------------------------------------------------------------------------


def _in_order(case: Case, found: Weights) -> Fault | None:
    """The experts in another order, where that is all that is wrong."""
    order = torch.cdist(found.right.T, found.value.T).argmin(-1)
    taken = (found.right != 0).any(0)
    if len(set(order[taken].tolist())) < int(taken.sum()):
        return None
    rest = [e for e in range(len(order)) if e not in order[taken].tolist()]
    order[~taken] = torch.tensor(rest, device=order.device, dtype=order.dtype)
    seen = found.seen_as(order, torch.ones_like(found.right[0]))
    if not seen.are_right():
        return None
    moved = [e for e in range(len(order)) if bool(taken[e]) and int(order[e]) != e]
    said = [f"expert {e} is its expert {int(order[e])}" for e in moved[:_NAMED]]
    title = f"the experts are in another order than the checkpoint's: {_and_more(said, len(moved))}"
    fix = "stack the experts, or the rows of the router, in the order of their numbers"
    tied = seen.tied()
    return _fault(case, "experts-reordered", title, fix, lambda s: _with(s, found, tied, lambda i, w: (order[i], w)))


def _scaled(case: Case, found: Weights) -> Fault | None:
    """All experts' outputs, or those of single ones, larger or smaller by a factor, where that is all."""
    alike = ~(found.off(found.right) & (found.right == 0)).any(-1, keepdim=True)
    weight = torch.where(alike & (found.right != 0), found.stderr.clamp_min(1e-300) ** -2, 0)
    for dims in ((0, 1), (0,)):
        size = (weight * found.right.square()).sum(dims, keepdim=True).clamp_min(1e-300)
        fitted = ((weight * found.value * found.right).sum(dims, keepdim=True) / size).flatten()
        scale = torch.where(fitted == 0, 1, fitted).expand(found.right.shape[1])
        seen = found.seen_as(torch.arange(len(scale), device=scale.device), scale)
        if not seen.are_right():
            continue
        title = f"the experts' outputs are added {float(scale[0]):.4g} times as large as in the reference"
        if len(fitted) > 1:
            told = (scale - 1).abs() > _SIGMAS * size.flatten().rsqrt()
            off = told.nonzero().flatten().tolist()
            said = [f"expert {e} by {float(scale[e]):.4g}" for e in off[:_NAMED]]
            title = f"outputs of experts are multiplied by another factor as well: {_and_more(said, len(off))}"
        patch = partial(_with, found=found, aside=seen.tied(), change=partial(_times, scale=scale))
        return _fault(case, "experts-scaled", title, _ROUTER, patch)
    return None


def _other(case: Case, found: Weights) -> Fault:
    """Other weights, or other experts."""
    off, right, tied = found.off(found.right), found.right != 0, found.tied()
    wrong = ((off & (~right | (found.value == 0))).any(-1) & ~tied).nonzero().flatten().tolist()
    if wrong:
        chosen = (found.value != 0) | (right & ~off)
        said = [f"token {t} goes to {_list(chosen[t])} in place of {_list(right[t])}" for t in wrong[:_NAMED]]
        title = f"tokens go to other experts than in the reference: {_and_more(said, len(wrong))}"
        id = "experts-other-choice"
    else:
        apart = ((found.value - found.right).abs() * off)[~tied]
        token = int(torch.arange(len(tied), device=tied.device)[~tied][apart.amax(-1).argmax()])
        expert = int((found.value - found.right)[token].abs().argmax())
        sums = [float(x) for x in found.value.sum(-1).aminmax()]
        title = (
            f"the chosen experts have other weights than in the reference: token {token} gives expert {expert} "
            f"{float(found.value[token, expert]):.4g} in place of {float(found.right[token, expert]):.4g}; "
            f"those of a token add up to {sums[0]:.4g} to {sums[1]:.4g}"
        )
        id = "experts-other-weights"
    every = torch.ones_like(tied)
    return _fault(case, id, title, _ROUTER, lambda s: _with(s, found, every, lambda i, w: (i, w)))


# -- parts -------------------------------------------------------------------------------------------------------


def _fault(case: Case, id: str, title: str, fix: str, patch: Callable[[Scope], Change]) -> Fault:
    return Fault(id=id, title=title, sites=(short(case.site),), fix=fix, patch=plain(patch), applies=takes_choice)


def _times(index: Tensor, weights: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Each expert's weight is multiplied by a factor (expert)."""
    return index, weights * scale.to(weights)[index]


def _with(scope: Scope, found: Weights, aside: Tensor, change: Given) -> Change:
    """The experts get what `change` makes of the reference's choice, and at some tokens (token) the weights read."""

    def both(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        index, weights = change(index, weights)
        count = max(index.shape[1], int((found.value[aside] != 0).sum(-1).max())) if bool(aside.any()) else 0
        if not count:
            return index, weights
        read = found.value.abs().topk(count, -1).indices
        here, more = aside[:, None], count - index.shape[1]
        index, weights = (torch.nn.functional.pad(x, (0, more)) for x in (index, weights))
        return torch.where(here, read, index), torch.where(here, found.value.gather(1, read).to(weights), weights)

    return given_otherwise(scope, both)


def _rows(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device).double().reshape(-1, value.shape[-1])


def _list(chosen: Tensor) -> str:
    return "experts " + ", ".join(map(str, chosen.nonzero().flatten().tolist()))


def _and_more(said: list[str], count: int) -> str:
    return ", ".join(said) + (f", and {count - len(said)} more" if count > len(said) else "")
