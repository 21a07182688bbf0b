"""Which rows of a site's value are compared: not those of padding, nor what a call does not read of a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parity.record.cache import rows_read
from parity.reference.batch import Batch
from parity.reference.pieces import PiecewiseModel
from parity.sites import Site, is_cached


def compared_rows(
    model: PiecewiseModel, site: Site, batch: Batch, shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor | None:
    """The rows of a value (…, d) of a site that are compared: booleans (…); None where all are."""
    if not is_cached(site.name):
        return batch.rows(site.dims, shape, device)
    model.prepare(batch)
    layer = model.piece_of(site.name)
    assert isinstance(layer, int), "unreachable because only layers have sites of a cache"
    read = rows_read(model.arguments(layer).get("attention_mask"), batch.calls or batch.shape[1:], batch.text)
    return read.to(device)[:, None].expand(tuple(shape[:-1]))


def blank(model: PiecewiseModel, site: Site, batch: Batch, value: Tensor) -> Tensor:
    """The value of a site (any shape) with zeros in place of what is not compared."""
    if not is_cached(site.name):
        return batch.blank(site.dims, value)
    rows = compared_rows(model, site, batch, value.shape, value.device)
    return value if rows is None else torch.where(rows[..., None], value, torch.zeros_like(value))
