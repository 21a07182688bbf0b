"""How an operation rounds whose bits are not the reference's: proved by computing it so, bit by bit, or not said.

The operation is computed on the candidate's own inputs in other orders of its sums, rounded at other places, or
fused with the one before it. What gives every bit of the candidate is how it rounds, or cannot be told from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parity.diagnose.sum_orders import Asked
from parity.diagnose.workbench import Workbench
from parity.faults import CATALOGUE, Fault
from parity.faults.fault import attribute
from parity.other_bits import OtherBits
from parity.reference import one_operation
from parity.reference.legal_ways import WAYS, Way, summing_singles
from parity.reference.one_operation import LoadedPiece
from parity.reference.pieces import PiecewiseModel
from parity.results import Measurement
from parity.sites import Site, short

_ORDERS = (*WAYS, Way("sums in 32 lanes", lanes=32), Way("sums in 64 lanes", lanes=64))
# Which of the sites before one may be fused with it, counted from its end.
_SPANS = ((-1, None), (-2, -1), (-3, -2), (-2, None), (-3, None))
_Value = tuple[str, Tensor]
_Context = Callable[[], AbstractContextManager[None]]


def how_it_rounds(first: Measurement, bench: Workbench) -> OtherBits | None:
    """How the operation at a site rounds, whose measurement says that its bits are not the reference's.

    None where nothing can be tried: the candidate did not record what goes into the piece of the model.
    """
    site, working = bench.sites[first.site], bench.reference.working
    with bench.piece(working.piece_of(site.name)) as at:
        if at is None:
            return None
        ours = bench.compute(at, [site.name], working)[site.name]
        found = bench.candidate(at, site.name)
        text = at.input_ids.rows(site.dims, ours.shape, ours.device)
        ours, found = (value if text is None else value[text] for value in (ours, found))
        apart = float((found.double() - ours.double()).norm())
        floor = (first.floor_rel or 0.0) * float(ours.double().norm())
        said = OtherBits(site.name, (), found.numel(), int((found != ours).sum()), apart / floor if floor else None)
        rounded = found.to(ours.dtype)
        if not torch.equal(rounded.to(found.dtype), found):
            return said  # numbers that the working dtype has not were never rounded to it
        asked = _asked(at, site, text, rounded, ours, bench)
        if asked is not None:
            said = replace(said, tried=len(asked.found))
            ways = [about for about, value in asked.ways() if torch.equal(value, asked.found)]
            return replace(said, ways=_simplest(ways))
        same = [a for a, v in _ways(at, site, bench) if torch.equal(v if text is None else v[text], rounded)]
        return replace(said, ways=_simplest(same))


def _simplest(ways: Sequence[str]) -> tuple[str, ...]:
    """The ways that do not only add to another one."""
    kept: list[str] = []
    for way in sorted(ways, key=len):
        if not any(simple in way for simple in kept):
            kept.append(way)
    return tuple(way for way in ways if way in kept)


# -- products ---------------------------------------------------------------------------------------------------


def _asked(
    at: LoadedPiece, site: Site, text: Tensor | None, found: Tensor, ours: Tensor, bench: Workbench
) -> Asked | None:
    """The numbers of a site that is the product of a linear layer and nothing else; None for any other."""
    model = bench.reference.working
    module = model.model.get_submodule(site.module)
    if site.where != "output" or type(module).forward is not nn.Linear.forward or site.name in bench.reference.changed:
        return None
    taken: list[Tensor] = []

    @contextmanager
    def seen(_model: PiecewiseModel) -> Iterator[None]:
        hook = module.register_forward_pre_hook(lambda _module, args: taken.append(args[0].clone()))
        try:
            yield
        finally:
            hook.remove()

    one_operation.run(model, at, [site.name], seen)
    inputs = taken[-1] if text is None else taken[-1][text]
    features = inputs.shape[-1], ours.shape[-1]
    x, theirs, own = (v.reshape(-1, n) for v, n in zip((inputs, found, ours), (*features, features[1]), strict=True))
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    moved = (None if v is None else v.cpu() for v in (x, weight, bias, theirs, own))
    return Asked.of(*moved)  # type: ignore[arg-type]


# -- any operation ----------------------------------------------------------------------------------------------


def _ways(at: LoadedPiece, site: Site, bench: Workbench) -> Iterator[_Value]:
    """One way after another to compute a site, and what it gives; all in the working dtype."""
    yield from _wider(at, site, bench)
    yield from _rounded_in_steps(at, site, bench)
    yield from _other_attention(at, site, bench)
    for about, change in _changes(at, site, bench):
        for order, context in _orders():
            if about or order:
                said = "; ".join(filter(None, (about, order)))
                yield said, _compute(at, site, bench, partial(_both, change, context))


def _compute(at: LoadedPiece, site: Site, bench: Workbench, patch: one_operation.Patch) -> Tensor:
    return one_operation.run(bench.reference.working, at, [site.name], patch)[site.name]


@contextmanager
def _both(change: one_operation.Patch, order: _Context, model: PiecewiseModel) -> Iterator[None]:
    with change(model), order():
        yield


def _wider(at: LoadedPiece, site: Site, bench: Workbench) -> Iterator[_Value]:
    """Rounded once, at the end: from what was recorded, or from unrounded values of the sites before."""
    precise, dtype = bench.reference.precise, bench.reference.working.dtype
    wide = str(precise.dtype).removeprefix("torch.")
    once = bench.compute(at, [site.name], precise)[site.name].to(dtype)
    yield f"all steps in {wide}, rounded once", once
    names = [one.name for one in bench.reference.working.sites_of(at.piece)]
    before = [name for name in names[: names.index(site.name)] if name in at.recorded]
    spans = {tuple(before[start:end]) for start, end in _SPANS} - {()}
    for fused in sorted(spans, key=len):
        kept = replace(at, recorded={name: v for name, v in at.recorded.items() if name not in fused})
        value = bench.compute(kept, [site.name], precise)[site.name].to(dtype)
        if not torch.equal(value, once):  # or the site takes nothing from them
            yield f"fused with {' and '.join(map(short, fused))}, not rounded in between, in {wide}", value


def _rounded_in_steps(at: LoadedPiece, site: Site, bench: Workbench) -> Iterator[_Value]:
    """An activation whose parts are rounded one by one."""
    module = bench.reference.working.model.get_submodule(site.module)
    steps = _STEPS.get(type(module).__name__)
    if steps is None or site.where != "output":
        return

    def patch(_model: PiecewiseModel) -> AbstractContextManager[None]:
        return attribute(module, "forward", steps)

    yield "x · sigmoid(x) with the sigmoid rounded first", _compute(at, site, bench, patch)


_STEPS: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(
    ("SiLU", "SiLUActivation"), lambda x: x * torch.sigmoid(x)
)


def _other_attention(at: LoadedPiece, site: Site, bench: Workbench) -> Iterator[_Value]:
    """Attention as torch's kernel computes it, with the mask and as causal; or step by step, for a fused reference."""
    model = bench.reference.working
    if site.where != "attention" or not isinstance(at.piece, int):
        return
    given = model.arguments(at.piece).get("attention_mask")
    if "eager" in str(model.config._attn_implementation):
        kernel = "torch's scaled_dot_product_attention"
        yield kernel, _compute(at, site, bench, _attending(at.piece, "sdpa", given))
        yield f"{kernel}, causal without a mask", _compute(at, site, bench, _attending(at.piece, "sdpa", None))
    else:
        added = _added(given, at.input_ids.shape[1], model)
        yield "attention step by step, as eager", _compute(at, site, bench, _attending(at.piece, "eager", added))


def _added(mask: Tensor | None, tokens: int, model: PiecewiseModel) -> Tensor:
    """The mask (…, t, s) that is added to scores: of one that says what is seen, or of a causal kernel without one."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=model.device).tril() if mask is None else mask
    hidden = torch.full((), torch.finfo(model.dtype).min, dtype=model.dtype, device=model.device)
    return torch.where(seen, torch.zeros_like(hidden), hidden) if seen.dtype is torch.bool else seen


def _attending(piece: int, kind: str, mask: Tensor | None) -> one_operation.Patch:
    @contextmanager
    def patch(model: PiecewiseModel) -> Iterator[None]:
        arguments, config = model.arguments(piece), model.config
        given, own = arguments.get("attention_mask"), config._attn_implementation
        config._attn_implementation, arguments["attention_mask"] = kind, mask
        try:
            yield
        finally:
            config._attn_implementation, arguments["attention_mask"] = own, given

    return patch


def _changes(at: LoadedPiece, site: Site, bench: Workbench) -> Iterator[tuple[str, one_operation.Patch]]:
    """Places of rounding that the catalogue knows at a site; first none."""
    yield "", lambda _model: nullcontext()
    for fault in CATALOGUE:
        if (fault.only_rounds or fault.regime) and bench.shows(fault, site.name) and bench.applies(fault, at.piece):
            yield fault.title, _patch_of(fault, at, bench)


def _patch_of(fault: Fault, at: LoadedPiece, bench: Workbench) -> one_operation.Patch:
    return lambda model: fault.patch(bench.scope(model, at.piece, batch=at.input_ids), 0.0)


class _Root(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inverse roots are taken as one over a root."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.rsqrt:
            return 1 / args[0].sqrt()
        return func(*args, **(kwargs or {}))


def _orders() -> Iterator[tuple[str, _Context]]:
    """Orders of float32 sums, each with the inverse root of a norm taken in one step and in two; first the own one."""
    yield "", nullcontext
    yield _ROOT, _root
    for way in _ORDERS:
        yield way.about, partial(summing_singles, way)
        yield f"{way.about}, {_ROOT}", partial(_ordered_with_root, way)


_ROOT = "1 / √x in place of rsqrt"


def _root() -> AbstractContextManager[None]:
    return _Root()  # type: ignore[no-untyped-call]


@contextmanager
def _ordered_with_root(way: Way) -> Iterator[None]:
    with summing_singles(way), _root():
        yield
