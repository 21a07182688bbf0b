"""Other ways to the same numbers: orders of summation, and how far any of them may lead in float32.

What a whole row shares, the scale of a norm or the sum of a softmax, is a sum of terms of one sign. A library adds
them in blocks; a plain loop adds them one after another, and is off by about u √n / 4 (each partial sum is rounded
once), by the same factor in all of the row. No port is wrong for that. So the reference's own operation is computed
again on the candidate's inputs:

* `summing(way)`  its sums are taken as that way takes them: a port's norm is then bit-equal to one of them, or nearly;
* `straying(…)`   its sums, products and RoPE tables are moved at random by as much as a legal way may move them.

Both act on the arithmetic of transformers' modules, whatever they are, in the precision of the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parity.reference.pieces import Piece, PiecewiseModel
from parity.reference.rope_phases import frequencies_of, other_tables

_UNIT = 2.0**-24
_aten = torch.ops.aten
Singles = NDArray[np.float32]


@dataclass(frozen=True)
class Way:
    """An order of summation: into so many running sums, 0 adding halves to halves; or in float64.

    Whether a square is rounded before it is added (a multiply-add does not) changes little beside the partial sums.
    """

    about: str
    lanes: int = 1
    wide: bool = False


WAYS = (
    Way("sums one after another, as a plain loop does"),
    Way("sums in 8 lanes", lanes=8),
    Way("sums in 4 lanes", lanes=4),
    Way("sums in 16 lanes", lanes=16),
    Way("sums halves to halves", lanes=0),
    Way("sums in float64", wide=True),
)


def straying_of_sum(terms: int) -> float:
    """Root mean square of the relative error of a float32 sum of terms of one sign, taken one after another.

    The partial sums are rounded once each; the mean, its root and their product add the rest.
    """
    return float(_UNIT * (1.5 + terms**0.5 / 4))


# -- sums in float32 -----------------------------------------------------------------------------------------------


def total(terms: Tensor, way: Way) -> Tensor:
    """The sum of `terms` (…, n) over the last axis as float32 makes it, in their own dtype."""
    if way.wide:
        return terms.double().sum(-1).to(terms.dtype)
    found = _sum(terms.detach().float().cpu().numpy(), way.lanes)
    return torch.from_numpy(np.ascontiguousarray(found)).to(terms.device, terms.dtype)


def _sum(values: Singles, lanes: int) -> Singles:
    if lanes:
        padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % lanes)])
        steps = padded.reshape(*padded.shape[:-1], -1, lanes)
        running = np.add.accumulate(steps, -2, np.float32)[..., -1, :]
        result: Singles = np.add.accumulate(running, -1, np.float32)[..., -1]
        return result
    while values.shape[-1] > 1:
        half = (values.shape[-1] + 1) // 2
        rest = values[..., half:]
        values = values[..., :half].copy()
        values[..., : rest.shape[-1]] += rest
    return values[..., 0]


# -- the arithmetic of modules -------------------------------------------------------------------------------------


class _Sums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every sum over the last axis of float64 numbers is `self.total(terms)`, every product goes through `product`."""

    dtype = torch.float64

    def total(self, terms: Tensor) -> Tensor:
        raise NotImplementedError

    def product(self, _inner: int, out: Tensor) -> Tensor:
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = func.overloadpacket
        is_wide = bool(args) and isinstance(args[0], Tensor) and args[0].dtype is self.dtype
        found = _SUMMED[kind](self, args, kwargs) if is_wide and kind in _SUMMED else None
        if found is not None:
            return found
        out = func(*args, **kwargs)
        return self.product(args[_INNER[kind]].shape[-1], out) if is_wide and kind in _INNER else out


_INNER = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.baddbmm: 1}


def _is_last(x: Tensor, dims: Any) -> bool:
    dims = dims if isinstance(dims, list | tuple) else [dims]
    return len(dims) == 1 and dims[0] in (-1, x.dim() - 1)


def _shaped(values: Tensor, keepdim: bool) -> Tensor:
    return values[..., None] if keepdim else values


def _sum_of(mode: _Sums, args: Any, kwargs: Any) -> Tensor | None:
    x, dims, keepdim = args[0], args[1] if len(args) > 1 else None, args[2] if len(args) > 2 else False
    return _shaped(mode.total(x), kwargs.get("keepdim", keepdim)) if _is_last(x, dims) else None


def _mean_of(mode: _Sums, args: Any, kwargs: Any) -> Tensor | None:
    found = _sum_of(mode, args, kwargs)
    return None if found is None else found / args[0].shape[-1]


def _norm_of(mode: _Sums, args: Any, kwargs: Any) -> Tensor | None:
    x, order = args[0], args[1] if len(args) > 1 else 2
    dims, keepdim = (args[i] if len(args) > i else kwargs.get(n) for i, n in ((2, "dim"), (3, "keepdim")))
    return _shaped(mode.total(x * x).sqrt(), bool(keepdim)) if order == 2 and _is_last(x, dims) else None


def _softmax_of(mode: _Sums, args: Any, _kwargs: Any) -> Tensor | None:
    x, dim = args[:2]
    if not _is_last(x, dim):
        return None
    weights: Tensor = (x - x.amax(-1, keepdim=True)).exp()
    return weights / mode.total(weights)[..., None]


def _layer_norm_of(mode: _Sums, args: Any, _kwargs: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    x, shape, weight, bias, eps = args
    if len(shape) != 1:
        return None
    centre = mode.total(x)[..., None] / shape[0]
    scale = (mode.total((x - centre).square())[..., None] / shape[0] + eps).rsqrt()
    out = (x - centre) * scale
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias), centre, scale


_SUMMED: Mapping[Any, Callable[[_Sums, Any, Any], Any]] = {
    _aten.sum: _sum_of,
    _aten.mean: _mean_of,
    _aten.linalg_vector_norm: _norm_of,
    _aten._softmax: _softmax_of,
    _aten.native_layer_norm: _layer_norm_of,
}


class _Ordered(_Sums):  # type: ignore[no-untyped-call]
    """Sums of numbers of a dtype as one way takes them."""

    def __init__(self, way: Way, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._way, self.dtype = way, dtype

    def total(self, terms: Tensor) -> Tensor:
        return total(terms, self._way)


class _Straying(_Sums):  # type: ignore[no-untyped-call]
    """Sums and products off at random, by as much as plain loops in float32 may be."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed

    def _generator(self, device: torch.device) -> torch.Generator:
        self._seed += 1
        return torch.Generator(device).manual_seed(self._seed)

    def total(self, terms: Tensor) -> Tensor:
        exact: Tensor = terms.sum(-1)
        size = terms.abs().sum(-1)
        draw = torch.randint(0, 2, exact.shape, generator=self._generator(exact.device), device=exact.device)
        return exact + (2 * draw - 1) * straying_of_sum(terms.shape[-1]) * size

    def product(self, inner: int, out: Tensor) -> Tensor:
        size = out.square().mean(-1, keepdim=True).sqrt() * float(_UNIT * (inner / 6) ** 0.5)
        noise = torch.randn(out.shape, generator=self._generator(out.device), device=out.device, dtype=out.dtype)
        return out + noise * size


def summing(way: Way) -> Callable[[PiecewiseModel], AbstractContextManager[None]]:
    """A patch for parity.reference.one_operation: the sums of the model of the truth are taken this way."""
    return lambda _model: _Ordered(way)


def summing_singles(way: Way) -> AbstractContextManager[None]:
    """A context in which the float32 sums of any model are taken this way, to the bit."""
    return _Ordered(way, torch.float32)


def straying(piece: Piece, seed: int) -> Callable[[PiecewiseModel], AbstractContextManager[None]]:
    """A patch likewise: sums, products and RoPE tables of a piece are off as they may be in float32."""

    @contextmanager
    def patch(model: PiecewiseModel) -> Iterator[None]:
        with ExitStack() as stack:
            if isinstance(piece, int):
                sign = 1 if seed % 2 else -1
                stack.enter_context(other_tables(model.arguments(piece), frequencies_of(model), sign))
            stack.enter_context(_Straying(1000 * seed))
            yield

    return patch
