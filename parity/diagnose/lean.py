"""How far a site leans in the direction of a fault: a regression of its error on what the fault would do there.

The slope is 0 for rounding and 1 for the whole fault. What is legal, and the thresholds, are told in
`parity.diagnose.weak_constants`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parity.diagnose.readings import LEAST_EFFECT
from parity.reference.precision import unit_roundoff
from parity.reference.row_sums import alike

# The slope must be this many standard errors from what is legal, errors being clustered in rows …
SIGMAS = 8.0
# … and from what is legal by this many times the slope of the reference's own rounding: legal variants of the norm
# stray by up to 0.2.
_TIMES_NULL = 1.0
# A slope fitted to fewer rows than this fits by chance.
_LEAST_ROWS = 16
# Slopes below this share of the step are too small for any real fault.
_LEAST_SLOPE = 0.05


@dataclass(frozen=True)
class Sums:
    """What a regression needs of one site: Σ w r g, the same of the reference's error e, Σ w g g, and its noise.

    shared and own are Σ w r e and Σ w e e, size is Σ w y y of the truth y; rows of one kind (alike) count as one.
    """

    site: str
    candidate: float
    reference: float
    response: float
    noise: float
    shared: float
    own: float
    size: float
    rows: int

    @property
    def slope(self) -> float:
        """The candidate's slope at this site alone."""
        return self.candidate / self.response if self.response else 0.0

    @property
    def sigmas(self) -> float:
        """The slope in its own standard errors."""
        return abs(self.candidate) / math.sqrt(self.noise) if self.noise else 0.0


def sums_of(site: str, candidate: Tensor, truth: Tensor, floor: Tensor, moved: Tensor, working: torch.dtype) -> Sums:
    """The sums of one site; `moved` is the truth with the fault. All have one shape, (b, t, d) at most sites."""
    r, e, g = candidate.to(truth) - truth, floor.to(truth) - truth, moved - truth
    visible = truth > torch.finfo(torch.float16).min
    r, e, g = (torch.where(visible & x.isfinite(), x, 0).double() for x in (r, e, g))
    least = (0.3 * unit_roundoff(working)) ** 2 * torch.where(visible, truth, 0).double().square().sum(-1)
    weight = 1 / torch.maximum(e.square().sum(-1), least).clamp_min(1e-300)
    kinds = alike(truth.flatten(0, -2))
    rg, eg, gg = (np.bincount(kinds, ((x * g).sum(-1) * weight).flatten().cpu().numpy()) for x in (r, e, g))
    shared, own = (float(((x * e).sum(-1) * weight).sum()) for x in (r, e))
    sizes = torch.where(visible, truth, 0).double().square().sum(-1)
    size = float((sizes * weight).sum())
    # Rows without a value, those of padding among them, say nothing.
    rows = int(np.count_nonzero(np.bincount(kinds, sizes.flatten().cpu().numpy())))
    slope = float(rg.sum() / gg.sum()) if gg.sum() else 0.0
    noise = float(np.maximum(np.square(rg - slope * gg), np.square(eg)).sum())
    return Sums(site, float(rg.sum()), float(eg.sum()), float(gg.sum()), noise, shared, own, size, rows)


def is_coherent(found: Sequence[Sums], kept: float = 0.0) -> bool:
    """Whether the sites lean farther than anything legal does.

    `kept` is the slope of the right constant as the working dtype keeps it, where ports may.
    """
    response, noise = sum(s.response for s in found), sum(s.noise for s in found)
    if not response or not noise or sum(s.rows for s in found) < _LEAST_ROWS:
        return False
    slope, null = slope_of(found), _null(found)
    beyond = max(slope - max(null, kept, 0.0), min(null, kept, 0.0) - slope)
    sigmas = beyond * response / math.sqrt(noise)
    effect = abs(slope) * math.sqrt(response / max(sum(s.size for s in found), 1e-300))
    return effect > LEAST_EFFECT and beyond > _LEAST_SLOPE and sigmas > SIGMAS and beyond > _TIMES_NULL * abs(null)


def slope_of(found: Sequence[Sums]) -> float:
    """The slope of several sites together."""
    return sum(s.candidate for s in found) / sum(s.response for s in found)


def _null(found: Sequence[Sums]) -> float:
    return sum(s.reference for s in found) / sum(s.response for s in found)


def _kinship(found: Sequence[Sums]) -> float:
    """How far the candidate rounds as the reference does, and so shares its bias: 0 not at all, 1 the same bits."""
    own = sum(s.own for s in found)
    return min(1.0, max(0.0, sum(s.shared for s in found) / own)) if own else 0.0


def reading(found: Sequence[Sums]) -> tuple[float, float]:
    """The slope without the bias that the rounding shares with the reference's, and its standard error."""
    response, null, kinship = sum(s.response for s in found), _null(found), _kinship(found)
    noise = math.sqrt(sum(s.noise for s in found)) / response
    return slope_of(found) - kinship * null, math.hypot(noise, (1 - kinship) * null)


def evidence(found: Sequence[Sums]) -> float:
    """How much of the error a fault accounts for, to choose between faults that lean the same way."""
    return sum(s.candidate for s in found) ** 2 / sum(s.response for s in found)
