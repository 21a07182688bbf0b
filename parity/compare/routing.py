"""The verdict of a router: the same experts, others at a tie, or wrong ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from parity.reference.routing import LIMIT, Route
from parity.results import ROUNDING, Measurement, SiteVerdict


def judge_routers(
    sites: Sequence[Measurement], routes: Mapping[str, Route], text: Tensor | None = None
) -> tuple[Measurement, ...]:
    """The sites, those where experts were chosen with a verdict of their own; of tokens where `text` (b, t) is true.

    Their ratio is the largest margin, in units that make the limit of a tie that of rounding elsewhere.
    """
    return tuple(
        _judged(site, _of_text(routes[site.site], text)) if _has_choice(site, routes) else site for site in sites
    )


def _of_text(route: Route, text: Tensor | None) -> Route:
    if text is None:
        return route
    kept = text.reshape(-1).to(route.differs.device)
    names = ("choice", "differs", "margin", "coarse", "experts")
    choice, differs, margin, coarse, experts = (getattr(route, name)[kept] for name in names)
    return Route(choice, differs, margin, coarse, experts, route.is_told)


def _has_choice(site: Measurement, routes: Mapping[str, Route]) -> bool:
    # Where only the weights were recorded, they tell the choice.
    left_out = site.gap is not None and site.gap.kind == "left out"
    return not left_out and site.site in routes and routes[site.site].is_told and site.verdict != "nonfinite"


def _judged(site: Measurement, route: Route) -> Measurement:
    tokens = len(route.differs)
    if not bool(route.differs.any()):
        return replace(site, verdict="exact", ratio=0.0, reason=f"the same experts at all {tokens} tokens", gap=None)
    verdict, reason = _verdict(route)
    return replace(site, verdict=verdict, ratio=ROUNDING * float(route.margin.max()) / LIMIT, reason=reason, gap=None)


def _verdict(route: Route) -> tuple[SiteVerdict, str]:
    tokens = len(route.differs)
    wrong = route.differs & ~route.is_right
    if not bool(wrong.any()):
        return "rounding", f"{_count(route.differs)} of {tokens} tokens go to other experts, at a tie: {_margin(route)}"
    uneven = route.experts[wrong]
    if bool((uneven != 0).any()):
        more = int(uneven[uneven != 0].mode().values)
        what = f"{abs(more)} expert{'s' * (abs(more) != 1)} {'more' if more > 0 else 'fewer'} than the reference"
        return "wrong", f"{_count(route.experts != 0)} of {tokens} tokens go to {what}"
    reason = f"{_count(wrong)} of {tokens} tokens go to other experts, where there is no tie: {_margin(route)}"
    if float(route.coarse.max()) <= LIMIT:
        return "imprecise", f"{reason}; rounded to the working dtype, their logits would be tied"
    return "wrong", reason


def _margin(route: Route) -> str:
    largest = float(route.margin.max())
    if math.isinf(largest):
        return "no shift of the logits leads there"
    return f"up to {largest:.3g} times the noise of their logits ({LIMIT:g} at most are a tie)"


def _count(which: Tensor) -> int:
    return int(which.sum())
