"""RoPE's tables as they come out of other frequencies: by powf, by exp and log, by products, in float64.

All are legal. In float32 exp(−k log θ) is off by as many units as its exponent is large, and a frequency that is the
one before times θ^(−2/d), as in llama.cpp, by as many as there were products. Times the position, that is the error
of the angle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from parity.reference.pieces import PiecewiseModel
from parity.reference.weights import fill_buffers

_UNIT = 2.0**-24
# What an angle may be off by, in units of it: rounded once as a frequency and once as an angle, half a unit for each
# e-fold of the frequency, and a quarter for each product.
_ONCE, _FOLD, _PRODUCT = 1.0, 0.5, 0.25


def straying_of_angles(frequencies: Tensor) -> Tensor:
    """Relative error of the angles of each pair, from the frequencies (pairs) per position."""
    steps = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
    folds = frequencies.abs().clamp_min(1e-30).log().abs()
    return _UNIT * (_ONCE + _FOLD * folds + _PRODUCT * steps)


def frequencies_of(model: PiecewiseModel) -> list[Tensor]:
    """RoPE's frequencies for all kinds of layers, (pairs) each."""
    found = []
    for module in model.model.modules():
        names = [name for name, b in module._buffers.items() if name.endswith("inv_freq") and b is not None]
        if any(module.get_buffer(name).is_meta for name in names):
            # Of a large model they are in memory only with the embedding.
            fill_buffers(model.model, [module])
        found += [module.get_buffer(name) for name in names]
    return found


@contextmanager
def other_tables(arguments: MutableMapping[str, Any], frequencies: Iterable[Tensor], sign: int) -> Iterator[None]:
    """A layer's tables are, during the block, those of angles that are off as far as they may be.

    Nothing happens where the layer is handed no tables, or tables of frequencies that are none of the given.
    `frequencies` are those of each pair of channels, (d/2,).
    """
    given: Any = arguments.get("position_embeddings")
    new = _moved(given, arguments.get("position_ids"), frequencies, sign) if _is_tables(given) else None
    if new is None:
        yield
        return
    arguments["position_embeddings"] = new
    try:
        yield
    finally:
        arguments["position_embeddings"] = given


def _is_tables(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and all(isinstance(table, Tensor) for table in given)


def _moved(
    tables: tuple[Tensor, Tensor], positions: Any, frequencies: Iterable[Tensor], sign: int
) -> tuple[Tensor, Tensor] | None:
    cos, sin = tables
    where = positions if isinstance(positions, Tensor) else torch.arange(cos.shape[-2], device=cos.device)
    size = torch.hypot(cos, sin)
    for one in frequencies:
        off = sign * straying_of_angles(one.to(cos))
        for spread in _LAYOUTS:
            columns = spread(one.to(cos))
            angles = where[..., None].to(cos) * columns
            if columns.shape[-1] == cos.shape[-1] and _is_near(size * angles.cos(), cos):
                turned = angles * (1 + spread(off))
                return size * turned.cos(), size * turned.sin()
    return None


# Pairs in halves, side by side, or once.
_LAYOUTS = (
    lambda pairs: torch.cat([pairs, pairs]),
    lambda pairs: pairs.repeat_interleave(2),
    lambda pairs: pairs,
)


def _is_near(one: Tensor, other: Tensor) -> bool:
    return bool(((one - other).abs() <= 1e-5 * other.abs().amax()).all())
