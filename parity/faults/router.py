"""The router of a mixture of experts: what the chosen experts weigh."""

from __future__ import annotations

from typing import Any

from parity.faults.fault import Change, Fault, Scope, attribute, fault
from parity.faults.patches.modules import mlp_of


def _router(scope: Scope) -> Any:
    mlp = mlp_of(scope)
    found = (m for m in mlp.modules() if isinstance(getattr(m, "norm_topk_prob", None), bool)) if mlp else iter(())
    return next(found, None)


def _renormalizes(scope: Scope) -> bool | None:
    router = _router(scope)
    return None if router is None else bool(router.norm_topk_prob)


@fault(
    id="moe-not-renormalized",
    title="the chosen experts' weights are used as they are; the reference makes them add up to one",
    sites=("experts", "mlp"),
    fix="divide the top-k weights by their sum where config.json says norm_topk_prob",
    applies=lambda s: _renormalizes(s) is True,
)
def moe_not_renormalized(scope: Scope) -> Change:
    return attribute(_router(scope), "norm_topk_prob", False)


@fault(
    id="moe-renormalized",
    title="the chosen experts' weights are made to add up to one; the reference uses them as they are",
    sites=("experts", "mlp"),
    fix="leave the top-k weights as they are where config.json says norm_topk_prob is false",
    applies=lambda s: _renormalizes(s) is False,
)
def moe_renormalized(scope: Scope) -> Change:
    return attribute(_router(scope), "norm_topk_prob", True)


FAULTS: tuple[Fault, ...] = (
    moe_not_renormalized,
    moe_renormalized,
)
