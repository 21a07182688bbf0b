"""Where each channel, row or token of a candidate came from: read by correlation on its own inputs.

A projection whose rows are in another order returns the right numbers in the wrong places. Which channel each of them
belongs to shows in the tokens: two channels of the same weights agree in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from parity.diagnose.read_weights import LEAST_ROWS, module_of, named_module
from parity.diagnose.trial import Case
from parity.faults import Fault, Scope
from parity.faults.fault import Change, plain, weight
from parity.faults.patches.modules import EMBEDDING_SITES, forward, together
from parity.sites import branch, ends_of, short

# Channels of the same weights agree as far as rounding allows; those of others by chance.
_SAME = 0.98
_NAMED = 4


def read_rows(case: Case) -> Fault | None:
    """The order of a projection's output channels, where that is not the checkpoint's; None elsewhere."""
    name, module = named_module(case)
    if not isinstance(module, nn.Linear) or case.truth.flatten(0, -2).shape[0] < LEAST_ROWS:
        return None
    order = _order_of(case.candidate.to(case.truth.device), case.truth)
    if order is None or _is_plain(order):
        return None
    title = f"the output channels are in another order than the checkpoint's: {_said(order, _unit(case))}"
    fix = "reorder the rows when converting the checkpoint, or cut and transpose the output as the reference does"
    return _fault(case, "rows-reordered", title, fix, lambda s: _rows_of(module_of(s, name), order))


def read_columns(case: Case) -> Fault | None:
    """The order in which a projection takes its input channels, where that is not the reference's; None elsewhere."""
    name, module = named_module(case)
    inputs = _input(case, name) if isinstance(module, nn.Linear) else None
    if inputs is None or inputs.flatten(0, -2).shape[0] < LEAST_ROWS:
        return None
    if module.weight.shape[0] < module.weight.shape[1]:
        return None  # more inputs than outputs: they cannot be told
    y = case.candidate.to(inputs.device).double()
    y = y - module.bias.data.double() if module.bias is not None else y
    taken = y.flatten(0, -2) @ torch.linalg.pinv(module.weight.data.double()).T
    order = _order_of(taken, inputs)
    if order is None or _is_plain(order):
        return None
    title = f"the input channels are in another order than the checkpoint's columns: {_said(order, _unit(case))}"
    fix = "merge the heads as (token, head * head_dim), or reorder the columns when converting the checkpoint"
    return _fault(case, "columns-reordered", title, fix, lambda s: _columns_of(module_of(s, name), order))


def read_siblings(case: Case) -> Fault | None:
    """The projections beside it that a projection's output channels are of, where they are not its own; None elsewhere.

    Those beside it are of the same branches, q, k and v or gate and up, and take the same input.
    """
    name, module = named_module(case)
    if not isinstance(module, nn.Linear) or not branch(name):
        return None
    inputs = _input(case, name)
    if inputs is None or inputs.flatten(0, -2).shape[0] < LEAST_ROWS:
        return None
    scope = case.bench.scope(case.bench.reference.precise, case.at.piece)
    parent = name.rpartition(".")[0]
    beside = {
        child: linear
        for child, linear in module_of(scope, parent).named_children()
        if isinstance(linear, nn.Linear) and branch(child) and linear.in_features == module.in_features
    }
    made = [nn.functional.linear(inputs, *(x.double() for x in _weights(one))) for one in beside.values()]
    order = _order_of(case.candidate.to(inputs.device), torch.cat(made, -1))
    sizes = [linear.out_features for linear in beside.values()]
    if order is None or not (said := _said_beside(order, dict(zip(beside, sizes, strict=True)), name)):
        return None
    title = f"the output channels are those of other projections: {said}"
    fix = (
        "give each projection its own rows: cut a fused weight or output in the order and sizes that the reference has"
    )
    return _fault(case, "rows-of-other-projection", title, fix, lambda s: _rows_beside(s, name, list(beside), order))


def read_ids(case: Case) -> Fault | None:
    """The token ids whose rows of the embedding were taken, where they are not those given; None elsewhere."""
    site = case.bench.sites[case.site]
    if ends_of(case.site).isdisjoint(EMBEDDING_SITES):
        return None
    scope = case.bench.scope(case.bench.reference.precise, case.at.piece)
    module, given = scope.model.get_submodule(site.module), case.at.input_ids.ids
    if not isinstance(module, nn.Embedding) or given.shape != case.truth.shape[:-1]:
        return None
    # As the module itself makes them of its rows, with whatever factor it puts on them.
    every = torch.arange(module.num_embeddings, device=module.weight.device)
    table = case.bench.reference.working.model.get_submodule(site.module)(every).to(case.truth)
    taken = torch.cdist(case.candidate.to(table).flatten(0, -2), table).argmin(-1).reshape(given.shape).to(given)
    taken = taken if case.at.input_ids.text is None else torch.where(case.at.input_ids.text, taken, given)
    if torch.equal(taken, given):
        return None
    return _fault(
        case,
        "embedding-other-ids",
        f"the embedding was given other token ids: {_ids(taken)}; they are {_ids(given)}{_guess(taken, given)}",
        "read the ids as what they are stored as (int64 has eight bytes), and hand them over unchanged",
        lambda s: _given(s.model.get_submodule(site.module), taken),
    )


# -- parts -----------------------------------------------------------------------------------------------------


def _fault(case: Case, id: str, title: str, fix: str, patch: Callable[[Scope], Change]) -> Fault:
    return Fault(id=id, title=title, sites=(short(case.site),), fix=fix, patch=plain(patch))


def _input(case: Case, name: str) -> Tensor | None:
    """What the projection is given on the candidate's inputs, (b, t, i)."""
    seen: list[Tensor] = []

    def watch(scope: Scope) -> Change:
        module = module_of(scope, name)
        own = module.forward

        def compute(x: Tensor) -> Tensor:
            seen.append(x.clone())
            y: Tensor = own(x)
            return y

        return forward(module, compute)

    case.bench.compute(case.at, [case.site], case.bench.reference.precise, _fault(case, "watch", "", "", watch))
    return seen[0].double() if seen else None


def _order_of(found: Tensor, given: Tensor) -> Tensor | None:
    """For each channel of `found` the one of `given` that it is: (…, d) twice, to (d); None if one is none of them."""
    a, b = (x.flatten(0, -2).double() for x in (found, given))
    a, b = (x - x.mean(0) for x in (a, b))
    a, b = (x / torch.linalg.vector_norm(x, dim=0).clamp_min(1e-300) for x in (a, b))
    likeness, order = (a.T @ b).max(-1)
    return order if bool((likeness > _SAME).all()) else None


def _is_plain(order: Tensor) -> bool:
    return bool((order == torch.arange(len(order), device=order.device)).all())


def _unit(case: Case) -> int:
    """Numbers of a head, by which orders are described where they are of whole heads."""
    return case.bench.reference.working.head_dim or 1


def _rows_of(module: nn.Linear, order: Tensor) -> Change:
    parameters = ("weight", "bias") if module.bias is not None else ("weight",)
    return together(*(weight(module, name, getattr(module, name).data[order]) for name in parameters))


def _columns_of(module: nn.Linear, order: Tensor) -> Change:
    """The weights as they meet the inputs in their own order."""
    moved = torch.zeros_like(module.weight.data)
    return together(weight(module, "weight", moved.index_add(1, order, module.weight.data)))


def _weights(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight (o, i) and bias (o), which is zero where there is none."""
    weights = linear.weight.data
    return weights, linear.bias.data if linear.bias is not None else weights.new_zeros(len(weights))


def _rows_beside(scope: Scope, name: str, beside: Sequence[str], order: Tensor) -> Change:
    """A projection returns rows of those beside it."""
    parent = module_of(scope, name.rpartition(".")[0])
    weights, biases = zip(*(_weights(getattr(parent, child)) for child in beside), strict=True)
    rows, bias = torch.cat(weights)[order], torch.cat(biases)[order]
    return forward(module_of(scope, name), lambda x: nn.functional.linear(x, rows, bias))


def _given(module: nn.Embedding, ids: Tensor) -> Change:
    before = module.forward
    return forward(module, lambda _ids: before(ids))


# -- words -----------------------------------------------------------------------------------------------------


def _said(order: Tensor, head: int) -> str:
    """An order in as few words as it has: of a view transposed, of whole blocks, or run by run."""
    size = len(order)
    plain_order = torch.arange(size, device=order.device)
    for rows in range(2, size):
        if size % rows == 0 and torch.equal(plain_order.reshape(rows, -1).T.flatten(), order):
            return f"({rows}, {size // rows}) transposed to ({size // rows}, {rows})"
    for block in (size // 2, size // 3, head):
        if not 1 < block < size or size % block:
            continue
        blocks = order.reshape(-1, block)
        if torch.equal(blocks, blocks[:, :1] + plain_order[:block]) and not bool((blocks[:, 0] % block).any()):
            return f"blocks of {block} in the order {', '.join(map(str, (blocks[:, 0] // block).tolist()))}"
    moved = (order != plain_order).nonzero().flatten().tolist()
    first = [f"channel {c} is its channel {int(order[c])}" for c in moved[:_NAMED]]
    return ", ".join(first) + (f", and {len(moved) - _NAMED} more" if len(moved) > _NAMED else "")


def _said_beside(order: Tensor, sizes: dict[str, int], name: str) -> str:
    """Runs of channels and whose they are, of those that are another projection's; empty if there are none."""
    owner = torch.tensor([i for i, size in enumerate(sizes.values()) for _ in range(size)], device=order.device)
    inside = torch.tensor([c for size in sizes.values() for c in range(size)], device=order.device)
    mine = list(sizes).index(name.rpartition(".")[2])
    whose, which = owner[order].tolist(), inside[order].tolist()
    breaks = [c for c in range(1, len(order)) if whose[c] != whose[c - 1] or which[c] != which[c - 1] + 1]
    runs = zip([0, *breaks], [*breaks, len(order)], strict=True)
    said = [
        f"{_channels(first, end - 1)} {'is' if end - first == 1 else 'are'} "
        f"{_channels(which[first], which[end - 1])} of {list(sizes)[whose[first]]}"
        for first, end in runs
        if whose[first] != mine
    ]
    return ", ".join(said[:_NAMED]) + (f", and {len(said) - _NAMED} more" if len(said) > _NAMED else "")


def _channels(first: int, last: int) -> str:
    return f"channel {first}" if first == last else f"channels {first} to {last}"


def _ids(ids: Tensor) -> str:
    first = ids.flatten()[:8].tolist()
    return " ".join(map(str, first)) + (" …" if ids.numel() > len(first) else "")


def _guess(taken: Tensor, given: Tensor) -> str:
    """How the ids may have been misread, where that makes all of them."""
    count = given.shape[-1]
    apart = torch.stack([given, torch.zeros_like(given)], -1).flatten(-2)[..., :count]
    if torch.equal(taken, apart):
        return ", read as halves of 64-bit integers"
    for bits in (7, 8, 15, 16):
        if torch.equal(taken, given % 2**bits):
            return f", cut to {bits} bits"
    steps = set((taken - given).flatten().tolist())
    return f", {steps.pop():+d} each" if len(steps) == 1 else ""
