"""Several numbers read at once off a candidate: nonlinear least squares with errors that rows share.

The candidate's rows are compared with what the reference makes of the numbers. Each step solves the linear problem
(Gauss-Newton), held back by a prior around where it stands, so that a number of which the rows say nothing stays there.
A step is halved until it helps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS, _HALVINGS = 12, 4
# A step that makes the misfit smaller by less than this share is the last.
_SETTLED = 1e-3
# Numbers are changed by this share of their prior's width to see what they do.
_SMALL = 1e-3

# What the reference makes of numbers (p): rows (r, d).
Curve = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """What is to be reached: a candidate's rows (r, d), and how far a number of each row may be off.

    own_error  the reference's own rounding of these rows, (r, d)
    variance   mean square by which a number of a row is off by rounding, (r)
    """

    candidate: Tensor
    own_error: Tensor
    variance: Tensor

    def first(self, count: int) -> Target:
        """The first rows."""
        return Target(self.candidate[:count], self.own_error[:count], self.variance[:count])

    def misfit(self, made: Tensor) -> Tensor:
        """Mean square of what the candidate differs by from other rows (r, d), in each row's variance: (r)."""
        return (self.candidate - made).square().mean(-1) / self.variance


@dataclass(frozen=True)
class Fit:
    """Numbers (p), their standard errors (p), and the misfit that they leave: about 1 where all is explained."""

    value: Tensor
    stderr: Tensor
    misfit: float


def fit(curve: Curve, start: Tensor, width: Tensor, target: Target) -> Fit:
    """The numbers (p) with which the curve comes nearest to the target, from a start (p).

    `width` (p) is the standard deviation of the prior. Errors are clustered in rows, of the candidate or of the
    reference, whichever are larger; what the reference's own rounding would be read as counts as well.
    Raises RuntimeError where the curve is not finite.
    """
    root = target.variance.sqrt()[:, None]
    value, made = start, curve(start)
    misfit = float(target.misfit(made).mean())
    changes, inverse = torch.empty(0), torch.empty(0)
    for _ in range(_STEPS):
        changes, inverse = _linear(curve, value, made, width, root)
        step = inverse @ torch.einsum("prd,rd->p", changes, (target.candidate - made) / root)
        before = misfit
        for halving in range(_HALVINGS):
            output = curve(value + step / 2**halving)
            if float(target.misfit(output).mean()) < misfit:
                value, made, misfit = value + step / 2**halving, output, float(target.misfit(output).mean())
                break
        if before - misfit <= _SETTLED * before:
            break
    errors = [e / root for e in (target.candidate - made, target.own_error)]
    by_row = [inverse @ torch.einsum("prd,rd->pr", changes, error) for error in errors]
    noise = torch.stack([pulled.square().sum(-1).sqrt() for pulled in by_row]).amax(0)
    return Fit(value, torch.hypot(noise, by_row[1].sum(-1)), misfit)


def _linear(curve: Curve, value: Tensor, made: Tensor, width: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The change of the rows with each number, (p, r, d) in their errors, and the inverse normal matrix (p, p)."""
    small = torch.diag(width * _SMALL)
    changes = torch.stack([(curve(value + one) - made) / one.sum() for one in small]) / root
    normal = torch.einsum("prd,qrd->pq", changes, changes) + torch.diag(width**-2)
    return changes, torch.linalg.inv(normal)
