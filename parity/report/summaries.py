"""What several reports show alike: sites gathered by reason and by step, what could not be seen, the next token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from parity import words
from parity.predictions import NextToken, Token
from parity.reasons import NotTried
from parity.report.text import flips, number, percent, plural, quoted, ranges, visible
from parity.results import Comparison, Finding, Measurement
from parity.sites import family, layer_of


@dataclass(frozen=True)
class Note:
    """Something that holds of several sites, and which sites these are, by family."""

    text: str
    sites: int
    where: tuple[str, ...]


def steps(sites: Iterable[Measurement]) -> list[Note]:
    """Every transformation that alignment applied, with the sites it was applied to."""
    return _notes((step, m) for m in sites for step in m.steps)


def unmeasured(sites: Iterable[Measurement]) -> list[Note]:
    """Why sites were not measured, with the sites."""
    return _notes((words.reason(m), m) for m in sites if m.verdict == "unmeasured")


def _notes(pairs: Iterable[tuple[str, Measurement]]) -> list[Note]:
    groups: dict[str, list[str]] = {}
    for text, m in pairs:
        groups.setdefault(text, []).append(m.site)
    return [Note(visible(text), len(names), tuple(by_family(names))) for text, names in groups.items()]


def by_family(names: Iterable[str]) -> list[str]:
    """Sites as families with their layers: `model.layers.*.mlp (layers 0-27)`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        layer = layer_of(name)
        groups.setdefault(family(name), []).extend([] if layer is None else [layer])
    return [visible(name) + _layers(layers) for name, layers in groups.items()]


def _layers(layers: Sequence[int]) -> str:
    if not layers:
        return ""
    return f" (layer {layers[0]})" if len(layers) == 1 else f" (layers {ranges(layers)})"


def invisible(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """The faults that this run could not have revealed, each with what is said of it alone, by common reason.

    Those for which the model has no place are not among them: there is nothing to see.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    power = comparison.power
    for item in power.unseen if power else ():
        if isinstance(item, NotTried) and item.why == "no place":
            continue
        reason, detail = map(visible, words.unseen(item, power.dtype if power else ""))
        groups.setdefault(reason, []).append((visible(item.fault), detail))
    return list(groups.items())


COSTS = ("tensor", "format", "off the checkpoint by", "alone moves the logits by")


def costs(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """A row for each quantized tensor whose cost was asked for, the most expensive first, as COSTS heads them."""
    return [
        (visible(error.tensor), visible(error.format), percent(error.relative), percent(error.cost))
        for error in comparison.weights
        if error.cost is not None
    ]


def worst_site(finding: Finding, comparison: Comparison) -> Measurement | None:
    """The site of a finding with the largest ratio: the one that its residual is of."""
    names = {finding.residual.site} if finding.residual else set(finding.sites)
    found = [m for m in comparison.sites if m.site in names]
    return max(found, key=lambda m: m.ratio or 0.0, default=None)


def coverage(comparison: Comparison) -> str:
    """`507 of 507 sites measured`."""
    c = comparison.coverage
    return f"{c.measured} of {plural(c.known, 'site')} measured"


def ranks(token: NextToken) -> list[tuple[Token | None, Token | None]]:
    """The top tokens of both sides, side by side."""
    return list(zip_longest(token.reference, token.candidate))


def margins(token: NextToken) -> list[str]:
    """By how much each side prefers its top token, in units of the rounding noise; and where they differ."""
    lines = [
        f"{side} prefers {quoted(top[0].text)} to {quoted(top[1].text)} by {_margin(top, token.margin_sigma)}"
        for side, top in (("reference", token.reference), ("candidate", token.candidate))
        if len(top) > 1
    ]
    lines.append(flips(token) or f"top token is the same at all {plural(token.positions, 'position')}")
    lines.append(f"largest KL divergence at a position: {number(token.max_kl, '.3g')}")
    return lines


def _margin(top: Sequence[Token], sigma: float) -> str:
    margin = top[0].logit - top[1].logit
    noise = f", {number(margin / sigma, '.3g')} standard deviations of the rounding noise" if sigma > 0 else ""
    return f"{number(margin, '.3g')}{noise}"
