"""What RoPE does in a candidate, read where queries and keys were recorded before and after it.

What is read is made a fault of its own, with the numbers in its words, and has to reproduce the candidate as any
fault of the catalogue has to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parity.diagnose import rope_gain
from parity.diagnose.readings import energy
from parity.diagnose.trial import Case
from parity.faults import Fault, Scope
from parity.faults.fault import Change, plain
from parity.faults.patches.rope import (
    ROTATED,
    frequencies,
    has_rope,
    has_tables,
    original_rotation,
    pairs_halves,
    positions_of,
    turning_by,
    with_rotation,
)
from parity.reference.precision import unit_roundoff
from parity.sites import short

# A number is told apart from the reference's beyond so many standard errors, and beyond what legal ways to compute a
# table differ by.
_SIGMAS, _LEAST_CHANGE = 5.0, 1e-4
# Ratios that differ by no more than this share, or by their errors, are one.
_ALIKE = 0.002
# A position is taken for a whole number where it is as near to one as this.
_WHOLE = 0.05
# So many numbers are named; of more, the first.
_NAMED = 4


@dataclass(frozen=True)
class _Turned:
    """What a rotation was given and made: gains, and the reference's angles (p), positions (b, t) and factor.

    `roundoff` is the unit roundoff of the working dtype.
    """

    gains: rope_gain.Gains
    angles: Tensor
    positions: Tensor
    factor: float
    roundoff: float


def read_rope(case: Case) -> Fault | None:
    """The fault that the gains show at a site behind RoPE; None elsewhere, or where they show none."""
    scope = case.bench.scope(case.bench.reference.precise, case.at.piece)
    if not any(case.site.endswith(f".{end}") for end in ROTATED) or not has_rope(scope):
        return None
    turned = _turned(case, scope)
    if turned is None:
        return None
    found = [f for f in (_frequencies(turned), _positions(turned)) if f is not None]
    left = [energy(case.candidate, _with(case, fault)) for fault in found]
    return found[left.index(min(left))] if found else None


def _with(case: Case, fault: Fault) -> Tensor:
    return case.bench.compute(case.at, [case.site], case.bench.reference.precise, fault)[case.site]


def _turned(case: Case, scope: Scope) -> _Turned | None:
    before = _before(case)
    values = (before, case.candidate, case.floor, case.truth)
    if before is None or len({v.shape for v in values if v is not None}) != 1 or before.ndim != 4:
        return None
    angles, factor = frequencies(scope)
    halves = pairs_halves(scope)
    z = [rope_gain.pairs(v.to(before.device), angles.numel(), halves=halves) for v in values if v is not None]
    where = positions_of(scope).expand(before.shape[0], -1)
    return _Turned(
        rope_gain.gains(*z), angles.double(), where, factor, unit_roundoff(case.bench.reference.working.dtype)
    )


def _before(case: Case) -> Tensor | None:
    """What the rotation is given at the site, (b, h, t, d)."""
    is_query = short(case.site).rpartition(".")[2].startswith("q")
    seen: list[Tensor] = []

    def watch(scope: Scope) -> Change:
        original = original_rotation(scope)

        def rotate(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            seen.append((q if is_query else k).clone())
            return original(q, k, *args, **kwargs)

        return with_rotation(scope, rotate)

    _with(case, _fault("watch", "", "", watch))
    return seen[0] if seen else None


def _fault(id: str, title: str, fix: str, patch: Callable[[Scope], Change]) -> Fault:
    return Fault(id=id, title=title, sites=ROTATED, fix=fix, patch=plain(patch), applies=has_tables)


def _told(value: Tensor, stderr: Tensor, expected: Tensor) -> Tensor:
    """Where numbers differ from what is expected by more than their errors and by more than is legal."""
    return (value - expected).abs() > torch.maximum(_SIGMAS * stderr, _LEAST_CHANGE * expected.abs())


def _sized(turned: _Turned) -> tuple[float, str]:
    """The factor that a reading uses, and what is said of it where it is another than the reference's."""
    size = rope_gain.factor(turned.gains)
    if abs(size - turned.factor) <= max(2 * turned.roundoff, _LEAST_CHANGE) * turned.factor:
        return turned.factor, ""
    return size, f"; the tables carry the factor {size:.4g} in place of {turned.factor:.4g}"


def _frequencies(turned: _Turned) -> Fault | None:
    """Pairs that turn by other angles, at the right positions."""
    try:
        value, stderr = rope_gain.frequencies(turned.gains, turned.positions, turned.angles)
    except ValueError:
        return None
    return with_angles(value, stderr, turned.angles, *_sized(turned))


def with_angles(value: Tensor, stderr: Tensor, expected: Tensor, factor: float, also: str) -> Fault | None:
    """The fault of pairs that turn by other angles per position than expected, all (p); None if none is told to.

    `factor` is what the tables carry, and `also` what is said of it.
    """
    wrong = _told(value, stderr, expected).nonzero().flatten().tolist()
    if not wrong:
        return None
    angles = expected.clone()
    angles[wrong] = torch.where(value.abs() > _SIGMAS * stderr, value, 0.0)[wrong]
    ratios, unsure = (angles / expected)[wrong], (stderr / expected)[wrong]
    one = ratios[unsure.argmin()]
    if len(wrong) > 1 and bool(((ratios - one).abs() <= torch.maximum(_ALIKE * one.abs(), _SIGMAS * unsure)).all()):
        said = f"{float(one):.4g} times the reference's angles for {_numbers('pair', wrong)}"
    else:
        each = [f"{float(r):.4g} times for pair {p}" for r, p in zip(ratios[:_NAMED], wrong, strict=False)]
        more = f" and other angles for {_numbers('pair', wrong[_NAMED:])}" if len(wrong) > _NAMED else ""
        said = f"other angles than the reference: {', '.join(each)}{more}"
    title = f"RoPE turns by {said}{also}"
    fix = "compare the table of frequencies with the config's: rope_theta, rope_scaling, and the length it is made for"
    return _fault("rope-frequencies", title, fix, lambda s: turning_by(s, angles, factor))


def _positions(turned: _Turned) -> Fault | None:
    """Tokens at other positions, turning by the right angles."""
    value, stderr = rope_gain.positions(turned.gains, turned.angles)
    expected = turned.positions.double()
    if not bool(((value - expected).abs() > torch.maximum(_SIGMAS * stderr, torch.full_like(value, _WHOLE))).any()):
        return None
    whole = value.round()
    value = torch.where((value - whole).abs() < _WHOLE, whole, value)
    return with_positions(value, expected, *_sized(turned))


def with_positions(value: Tensor, expected: Tensor, factor: float, also: str = "") -> Fault:
    """The fault of tokens at other positions (b or 1, t) than expected; `factor` and `also` as in `with_angles`."""
    title = f"RoPE counts positions in another way: {_counted(value, expected)}{also}"
    fix = "number the tokens from 0, from the length of the cache in decoding, and by the attention mask with padding"
    return _fault("rope-positions", title, fix, lambda s: turning_by(s, frequencies(s)[0], factor, value))


def _counted(value: Tensor, expected: Tensor) -> str:
    """Which tokens of the first row that has any are at which other positions: `token 51 is at 50, token 52 at 50`."""
    wrong = ((value - expected).abs() > _WHOLE).nonzero().tolist()
    row = wrong[0][0]
    tokens = [t for r, t in wrong if r == row]
    first = [f"token {t} is at {float(value[row, t]):.6g}" for t in tokens[:_NAMED]]
    more = f", and {len(tokens) - _NAMED} more" if len(tokens) > _NAMED else ""
    within = f" in row {row}" if len(value) > 1 else ""
    return f"{', '.join(first)}{more}{within}"


def _numbers(noun: str, found: list[int]) -> str:
    """`pair 3`, `pairs 3 to 7`, `pairs 1, 4, 6`."""
    if len(found) == 1:
        return f"{noun} {found[0]}"
    if found == list(range(found[0], found[-1] + 1)):
        return f"{noun}s {found[0]} to {found[-1]}"
    return f"{noun}s {', '.join(map(str, found))}"
