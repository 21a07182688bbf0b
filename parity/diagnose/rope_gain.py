"""RoPE read off what goes in and what comes out: the complex gain of each token and pair, and what follows from it.

A pair of numbers that turns by an angle is a complex number that is multiplied by another: the gain. Its angle is the
token's position times the pair's frequency, its size the attention factor. Both are found from the gains of a run by
unwrapping: a coarse estimate tells how often a finer one has gone round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gains:
    """The gain of each token and pair, (b, t, p).

    own      the gain of the reference's own rounded output, (b, t, p): what it reads off shows how far a reading leans
    stderr   standard error of a gain's angle, (p): of the real and the imaginary part each, relative to the size
    """

    value: Tensor
    own: Tensor
    stderr: Tensor


def pairs(x: Tensor, count: int, *, halves: bool) -> Tensor:
    """The first 2 * count numbers of each head as complex ones: x (…, d) to (…, count)."""
    x = x[..., : 2 * count].double()
    one, two = (x[..., :count], x[..., count:]) if halves else (x[..., 0::2], x[..., 1::2])
    return torch.complex(one, two)


def gain(before: Tensor, after: Tensor) -> Tensor:
    """What multiplies each pair, by least squares over the heads: complex (b, h, t, p) twice, to (b, t, p)."""
    size = before.abs().square().sum(1).clamp_min(1e-300)
    return (before.conj() * after).sum(1) / size


def gains(before: Tensor, after: Tensor, floor: Tensor, truth: Tensor) -> Gains:
    """The gains of `after`, and how far the reference's own rounding `floor` puts them off the `truth`.

    All are complex (b, h, t, p). What heads share (a rounded table of cosines) so counts as it should.
    """
    value, own, right = (gain(before, turned) for turned in (after, floor, truth))
    off = (own - right) / right.abs().clamp_min(1e-300)
    return Gains(value, own, (off.abs().square().mean((0, 1)) / 2).sqrt())


def factor(found: Gains) -> float:
    """The size that all gains share. Of tables in a low precision it is as far off as that rounds it."""
    weight = found.stderr.square().clamp_min(1e-300).reciprocal()
    return float((found.value.abs().mean((0, 1)) * weight).sum() / weight.sum())


def frequencies(found: Gains, positions: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """The angle of each pair per position, (p), and its standard error, given the tokens' positions (b, t).

    `angles` (p) are the reference's own: what its rounding makes of them tells how far a slow pair leans, whose small
    sines are lost in sums. Raises ValueError where no two neighbours are one position apart.
    """
    where = positions.double()
    value, noise = _frequencies(found.value, where)
    lean = (_frequencies(found.own, where)[0] - angles).abs().max()
    along = where.square().sum()
    return value, torch.hypot(torch.maximum(noise, found.stderr / along.sqrt()), lean)


def _frequencies(value: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    unit = value / value.abs().clamp_min(1e-300)
    estimate = torch.zeros(unit.shape[-1], dtype=torch.float64, device=unit.device)
    lag = 1
    while lag < unit.shape[1]:
        apart = (where[:, lag:] - where[:, :-lag]) == lag
        if not bool(apart.any()):
            break
        turned = (unit[:, lag:] * unit[:, :-lag].conj())[apart].sum(0).angle()
        estimate = (turned + _rounds(estimate * lag - turned)) / lag
        lag *= 2
    if lag == 1:
        raise ValueError("no two neighbouring tokens are one position apart")
    left = (unit * torch.exp(-1j * where[..., None] * estimate)).angle()
    along = where.square().sum()
    step = (left * where[..., None]).sum((0, 1)) / along
    left = left - step * where[..., None]
    return estimate + step, left.square().mean((0, 1)).sqrt() / along.sqrt()


def positions(found: Gains, angles: Tensor) -> tuple[Tensor, Tensor]:
    """The position of each token, (b, t), and its standard error, given the angle of each pair per position (p).

    The slowest pair tells the position coarsely, and each faster one more finely.
    """
    estimate = torch.zeros(found.value.shape[:2], dtype=torch.float64, device=found.value.device)
    known = torch.zeros_like(estimate)
    for pair in angles.argsort().tolist():
        angle = float(angles[pair])
        if angle <= 0:
            continue
        turned = found.value[..., pair].angle()
        here = (turned + _rounds(estimate * angle - turned) * (known > 0)) / angle
        weight = (angle / max(float(found.stderr[pair]), 1e-15)) ** 2
        estimate = (estimate * known + here * weight) / (known + weight)
        known = known + weight
    return estimate, known.clamp_min(1e-300).rsqrt()


def _rounds(angle: Tensor) -> Tensor:
    """The whole turns nearest to an angle, in radians."""
    return (angle / (2 * math.pi)).round() * (2 * math.pi)
