"""What is summed of a site where its tensors are: errors row by row and channel by channel, in blocks.

Hardly any site has a NaN, an infinity or a masked score in it, and to look for them costs more than all sums. So they
are looked for in the sums, and only a site that has some is read again, with care.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parity.reference.precision import unit_roundoff
from parity.reference.products import Product, Values
from parity.reference.replay import Replayed
from parity.reference.rows import Floats, Rows, kinds_of
from parity.reference.transfer import Task, row_blocks
from parity.sites import FLATTENED

# A correct rounding is rarely smaller than this share of the unit roundoff, so no floor is.
_LEAST_SHARE = 0.3
# What rounds a number that a whole row shares, in unit roundoffs of float32: a mean, its root, and their product.
_SHARED = 1.5
MASKED = -1e30
_HIDDEN = -1e3
# Cosines with random directions, which are about 1, are told apart to this part.
_STEPS = 64
_HEADS = f"head{FLATTENED}head_dim"
_COUNTS = (
    *("different", "candidate nonzero", "truth nonzero"),
    *("candidate nonfinite", "truth nonfinite", "floor nonfinite"),
)
# Rows of a block's sums that are errors and sizes; the rest tells rows of one kind.
_SQUARES = 10


def measuring_rows(site: Replayed, working: torch.dtype, storage: torch.dtype, head_dim: int | None) -> Task[Rows]:
    """The sums of a replayed site, its candidate being on the grid of `storage`, in one transfer, or two with care."""
    assert site.candidate is not None, "unreachable because only recorded sites are measured"
    width = site.truth.shape[-1]
    candidate = site.candidate.to(site.truth.device)
    if torch.promote_types(candidate.dtype, site.truth.dtype) != site.truth.dtype:
        candidate = candidate.to(site.truth.dtype)
    values = [site.compared(x) for x in (candidate, site.truth, site.floor, site.jitter, site.own, site.ideal)]
    flat = [value.flatten() if isinstance(value, Product) else value.reshape(-1, width) for value in values]
    least = _least(site, flat[0].shape[0], working)
    answer = yield _all_blocks(flat, storage, least, careful=False)
    if not np.isfinite(answer).all() or answer[-1] <= MASKED:
        answer = yield _all_blocks(flat, storage, least, careful=True)
    heads = width // head_dim if site.site.dims[-1] == _HEADS and head_dim and width % head_dim == 0 else 1
    return _as_rows(answer, width, heads)


class _Values(NamedTuple):
    """The same rows (n, features) of the six tensors of a site."""

    candidate: Tensor
    truth: Tensor
    floor: Tensor
    jitter: Tensor
    own: Tensor
    ideal: Tensor


class _Errors(NamedTuple):
    """Differences (n, features): see Rows for the sums of their squares."""

    r: Tensor
    e: Tensor
    s: Tensor
    q: Tensor
    inherited: Tensor
    total: Tensor
    own_total: Tensor


def _as_rows(answer: Floats, width: int, heads: int) -> Rows:
    ends = len(_COUNTS) + 1
    channels, counts = answer[-ends - width : -ends], answer[-ends:-1]
    rows = answer[: -ends - width].reshape(_SQUARES + 3, -1)
    by_name = {name: int(min(count, 1e18)) for name, count in zip(_COUNTS, np.ceil(counts).tolist(), strict=True)}
    kinds = kinds_of(rows[_SQUARES:].T)
    return Rows(channels, channels.reshape(heads, -1).sum(-1), by_name, kinds, *rows[:_SQUARES])


def _all_blocks(flat: Sequence[Values], storage: torch.dtype, least: float, *, careful: bool) -> Tensor:
    """Sums by row (13, n), by channel (width), of counts, and the smallest number, one after another.

    `flat` are the fields of _Values, with all rows of a site.
    """
    blocks = [_block(_Values(*block), storage, least, careful) for block in row_blocks(*flat)]
    rows, channels, counts, smallest = zip(*blocks, strict=True)
    return torch.cat(
        (
            torch.cat(rows, -1).flatten().double(),
            torch.stack(channels).sum(0).double(),
            torch.stack(counts).sum(0).double(),
            torch.stack(smallest).amin()[None].double(),
        )
    )


def _least(site: Replayed, rows: int, working: torch.dtype) -> float:
    """The smallest floor that any operation of this kind has, squared, relative to the truth."""
    summation = site.summands / 6 if site.summands > 1 else 0.0
    in_float32 = unit_roundoff(torch.float32) ** 2 * max(summation, _SHARED**2 / max(rows, 1))
    return float(max((_LEAST_SHARE * unit_roundoff(working)) ** 2, in_float32))


def _block(values: _Values, storage: torch.dtype, least: float, careful: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    truth, wide = values.truth, values.truth.dtype
    c, f, o = (x.to(wide) for x in (values.candidate, values.floor, values.own))
    errors = _Errors(
        r=c - truth,
        e=f - truth,
        s=truth.to(storage).to(wide) - truth,
        q=values.jitter - truth,
        inherited=truth - o,
        total=c - values.ideal,
        own_total=o - values.ideal,
    )
    y = truth
    if careful:
        errors, y = _compared(errors, c, truth)
        counts, smallest = _counts(c, truth, f), torch.zeros((), device=c.device)
    else:
        counts, smallest = _quick_counts(c, truth, f)
    rr, ee, ss, qq, *others = (torch.linalg.vecdot(x, x) for x in errors)
    yy, ry = torch.linalg.vecdot(y, y), torch.linalg.vecdot(errors.r, y)
    strict = torch.maximum(torch.maximum(ee, ss), least * yy)
    kinds = directions_of(truth.nan_to_num(0, 0, 0) if careful else truth)
    rows = torch.cat((torch.stack((rr, ee, ss, qq, yy, ry, strict, *others)), kinds.T.to(wide)))
    channels = torch.where(strict > 0, 1 / strict, 1.0) @ errors.r.square_()
    return rows, channels, counts, smallest


def _compared(errors: _Errors, c: Tensor, truth: Tensor) -> tuple[_Errors, Tensor]:
    """The errors and the truth where both sides are finite and not masked, 0 elsewhere.

    A masked score has no error if the candidate hides it too, by whatever large negative number.
    """
    keep = (c.isfinite() & truth.isfinite() & (truth > MASKED)).to(truth.dtype)
    shown = ((truth <= MASKED) & (c > _HIDDEN)).to(truth.dtype)
    others = (x.nan_to_num_(0, 0, 0).mul_(keep) for x in errors[1:])
    r = errors.r.nan_to_num_(0).mul_(keep).add_(shown, alpha=-_HIDDEN)
    return _Errors(r, *others), truth.nan_to_num(0, 0, 0).mul_(keep)


def _quick_counts(c: Tensor, truth: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """As _counts where all is finite, but the largest number in place of how many are not zero; and the smallest."""
    if not truth.numel():
        return torch.zeros(len(_COUNTS), device=c.device), torch.zeros((), device=c.device)
    extremes = [x.aminmax() for x in (c - floor, c, truth)]
    largest = [torch.maximum(high, -low) for low, high in extremes]
    return torch.stack(largest + [torch.zeros_like(largest[0])] * 3), extremes[-1][0]


def _counts(c: Tensor, truth: Tensor, floor: Tensor) -> Tensor:
    finite = truth.isfinite()
    # A port may well hide a masked score by an infinity.
    spoilt = ~c.isfinite() & finite & ((truth > MASKED) | c.isnan())
    counted = (c != floor, c != 0, truth != 0, spoilt, ~finite, ~floor.isfinite() & finite)
    return torch.stack([mask.sum() for mask in counted])


def alike(rows: Tensor) -> NDArray[np.int64]:
    """For each of some rows (n, width) the number of its kind: rows that are multiples of each other are of one."""
    return kinds_of(directions_of(rows.nan_to_num(0, 0, 0)).double().cpu().numpy())


def directions_of(rows: Tensor) -> Tensor:
    """Cosines (n, 3) of rows (n, width) with three fixed directions, in units in which rows of one kind are equal.

    Rounding errors of equal rows are equal, and those of rows that differ by rounding nearly so: told to a hundredth
    of what is usual between rows of different tokens.
    """
    plain = rows.float()
    size = torch.linalg.vector_norm(plain, dim=-1, keepdim=True).clamp_min(1e-30)
    # A matrix product would start threads for this little, which wait for each other on a busy machine.
    along = [torch.linalg.vecdot(plain, one) for one in _directions(rows.shape[-1], rows.device)]
    cosines: Tensor = torch.stack(along, -1) / size
    return cosines.mul_(_STEPS).round_()


@lru_cache(maxsize=16)
def _directions(width: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(width, 3, generator=generator, dtype=torch.float32).T.contiguous().to(device)
