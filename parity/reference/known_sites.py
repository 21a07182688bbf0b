"""What a port of a model may dump, without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass

from parity.reference.checkpoint import default_dtype, find
from parity.sites import Dims


@dataclass(frozen=True)
class KnownSite:
    """A site of a model; `sizes` are 0 where they depend on the run (batch, token)."""

    name: str
    dims: Dims
    sizes: tuple[int, ...]
    dtype: str


def known_sites(model: str, *, inner: bool = False, trust_remote_code: bool = False) -> list[KnownSite]:
    """The sites of a model in order of execution. Raises ModelError when there is no such model."""
    checkpoint = find(model, trust_remote_code=trust_remote_code)  # what is wrong with it is said before torch is there
    import torch

    from parity.record.discover import with_sizes
    from parity.reference.pieces import PiecewiseModel

    built = PiecewiseModel(checkpoint, getattr(torch, default_dtype(checkpoint)), inner=inner)
    return [KnownSite(s.name, s.dims, s.shape, s.dtype) for s in with_sizes(built.sites, batch=0, token=0)]
