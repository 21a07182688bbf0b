"""Local error, floor and ratio of one replayed site: the numbers that the verdict rests on.

With r = candidate − truth, row by row (a row is a token, or a head of a token):

    floor² = max(‖reference in the working dtype − truth‖, ‖truth rounded for storage − truth‖,
                 0.3 u ‖truth‖, 2⁻²⁴ √(n / 6) ‖truth‖)²
             + ‖truth on jittered inputs − truth‖²   (only where operations may have been fused)

The last term in the maximum is what adding n products one after another in float32 costs, as a plain loop
in C or Rust does: partial sums grow like a random walk, and each is rounded once. Libraries that add in
blocks are better than that, and no port is wrong for not being a library.

The ratio R is the larger of ‖r‖ / ‖floor‖ over the whole tensor and the median of the row ratios: the first
sees an error anywhere, the second is not swallowed by one row of massive activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from parity.reference.precision import unit_roundoff
from parity.reference.replay import Replayed
from parity.results import Structure
from parity.sites import FLATTENED, Dims

# A correct rounding is rarely smaller than this share of the unit roundoff, so no floor is.
_LEAST_SHARE = 0.3
_PROFILE_BINS = 256
_MASKED = -1e30
_HIDDEN = -1e3


@dataclass(frozen=True)
class Local:
    """One site's local error against its floor. Relative numbers are ‖·‖ / ‖truth‖, dimensionless.

    ratio is on the strict floor, ratio_fused on the floor that allows for fused operations.
    bit_equal means: the same bits as the reference in the working dtype on the same inputs.
    """

    ratio: float
    ratio_fused: float
    row_max: float
    local_rel: float
    floor_rel: float
    inherited_rel: float
    total_ratio: float
    bit_equal: bool
    must_be_exact: bool
    all_zero: bool
    nonfinite: int
    nonfinite_inputs: bool
    reference_nonfinite: int
    structure: Structure


def local_error(site: Replayed, working: torch.dtype, storage: torch.dtype, head_dim: int | None) -> Local:
    """Measure a replayed site.

    `storage` is the dtype whose grid the candidate's numbers lie on; `head_dim` splits flattened heads.
    """
    assert site.candidate is not None, "unreachable because only recorded sites are measured"
    truth = site.truth
    wide = truth.dtype
    candidate, floor = site.candidate.to(truth.device), site.floor
    compared = _comparable(candidate, truth)
    r = torch.where(compared, candidate.to(wide) - truth, _unmasked(candidate, truth))
    y = torch.where(compared, truth, 0)
    e = torch.where(compared & floor.isfinite(), floor.to(wide) - truth, 0)
    s = torch.where(compared, truth.to(storage).to(wide) - truth, 0).nan_to_num(0, 0, 0)
    q = torch.where(compared & site.jitter.isfinite(), site.jitter - truth, 0)

    rr, ee, ss, qq, yy = (x.square().sum(-1) for x in (r, e, s, q, y))
    must_be_exact = not bool(ee.any() or ss.any() or qq.any())
    summation = unit_roundoff(torch.float32) ** 2 * site.summands / 6 if site.summands > 1 else 0.0
    least = max((_LEAST_SHARE * unit_roundoff(working)) ** 2, summation) * yy
    strict = torch.zeros_like(yy) if must_be_exact else torch.maximum(torch.maximum(ee, ss), least)
    ratios = _ratio(rr, strict)
    return Local(
        ratio=_statistic(rr, strict, ratios),
        ratio_fused=_statistic(rr, strict + qq, _ratio(rr, strict + qq)),
        row_max=float(ratios.max()) if ratios.numel() else 0.0,
        local_rel=_relative(rr, yy),
        floor_rel=_relative(strict, yy),
        inherited_rel=_relative((truth - site.own.to(wide)).nan_to_num(0, 0, 0).square().sum(), yy),
        total_ratio=_total_ratio(site, candidate.to(wide)),
        bit_equal=_bit_equal(candidate, floor),
        must_be_exact=must_be_exact,
        all_zero=not bool(candidate.any()) and bool(truth.any()),
        nonfinite=int((~candidate.isfinite() & truth.isfinite()).sum()),
        nonfinite_inputs=not bool(truth.isfinite().all()),
        reference_nonfinite=int((~floor.isfinite() & truth.isfinite()).sum()),
        structure=_structure(r, y, rr, strict, site.site.dims, head_dim),
    )


def _comparable(candidate: Tensor, truth: Tensor) -> Tensor:
    """Elements that both sides have as values; masked scores are none."""
    return candidate.isfinite() & truth.isfinite() & (truth > _MASKED)


def _unmasked(candidate: Tensor, truth: Tensor) -> Tensor:
    """The error of a masked score: none if the candidate hides it too, by whatever large negative number."""
    shown = (truth <= _MASKED) & (candidate > _HIDDEN)
    return torch.where(shown, torch.full_like(truth, -_HIDDEN), torch.zeros_like(truth))


def _ratio(squares: Tensor, floor: Tensor) -> Tensor:
    """√(squares / floor); 0 / 0 is 0, and any error over no floor is infinite."""
    return torch.where(squares == 0, torch.zeros_like(squares), squares / floor).sqrt()


def _statistic(squares: Tensor, floor: Tensor, rows: Tensor) -> float:
    if not rows.numel():
        return 0.0
    return max(float(_ratio(squares.sum(), floor.sum())), float(rows.flatten().median()))


def _relative(squares: Tensor, size: Tensor) -> float:
    return float(_ratio(squares.sum(), size.sum()))


def _total_ratio(site: Replayed, candidate: Tensor) -> float:
    """How far the candidate is from the exact run, in units of how far the reference is."""
    ideal = site.ideal
    both = candidate.isfinite() & site.own.isfinite() & ideal.isfinite()
    mine = torch.where(both, candidate - ideal, 0).square().sum()
    theirs = torch.where(both, site.own.to(ideal.dtype) - ideal, 0).square().sum()
    return float(_ratio(mine, theirs))


def _bit_equal(candidate: Tensor, floor: Tensor) -> bool:
    """Same numbers as the reference in the working dtype; a wider dump of the same numbers counts."""
    return bool(torch.equal(candidate.to(torch.float64), floor.to(torch.float64)))


def _structure(r: Tensor, y: Tensor, rr: Tensor, floor: Tensor, dims: Dims, head_dim: int | None) -> Structure:
    weight = torch.where(floor > 0, 1 / floor, torch.zeros_like(floor))
    if not bool(weight.any()):
        weight = torch.ones_like(floor)
    ry = ((r * y).sum(-1) * weight).sum()
    energy, size = (rr * weight).sum(), (y.square().sum(-1) * weight).sum()
    channels = (r.square() * weight[..., None]).flatten(0, -2).sum(0)
    by_token = _profile(rr, floor, dims, "token")
    channel = int(channels.argmax())
    return Structure(
        gain=float(ry / size) if size else 0.0,
        cosine=float(ry / (energy * size).sqrt()) if energy and size else 0.0,
        by_token=_bins(by_token),
        by_head=tuple(_by_head(r, rr, floor, dims, head_dim).tolist()),
        channel=channel,
        channel_share=float(channels[channel] / channels.sum()) if energy else 0.0,
        first_token=next((i for i, value in enumerate(by_token.tolist()) if value > 3), None),
        elements=r.numel(),
    )


def _profile(rr: Tensor, floor: Tensor, dims: Dims, axis: str) -> Tensor:
    """Ratio along one axis of the rows; empty if the rows have no such axis."""
    rows = list(dims[:-1])
    if axis not in rows:
        return rr.new_empty(0)
    rest = [i for i, dim in enumerate(rows) if dim != axis]
    return _ratio(rr.sum(rest), floor.sum(rest)) if rest else _ratio(rr, floor)


def _by_head(r: Tensor, rr: Tensor, floor: Tensor, dims: Dims, head_dim: int | None) -> Tensor:
    if dims[-1] != f"head{FLATTENED}head_dim" or not head_dim or r.shape[-1] % head_dim:
        return _profile(rr, floor, dims, "head")
    heads = r.reshape(*r.shape[:-1], -1, head_dim).square().sum(-1)
    share = heads.flatten(0, -2).sum(0) / floor.sum() * heads.shape[-1]
    return torch.nan_to_num(share.sqrt(), 0.0, float("inf"), 0.0)


def _bins(profile: Tensor) -> tuple[float, ...]:
    """At most 256 numbers, each the largest of its neighbours."""
    if profile.numel() <= _PROFILE_BINS:
        return tuple(profile.tolist())
    width = math.ceil(profile.numel() / _PROFILE_BINS)
    return tuple(float(profile[i : i + width].max()) for i in range(0, profile.numel(), width))
