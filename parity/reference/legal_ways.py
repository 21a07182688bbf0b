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
    """An order of summation: into so many running sums, with the square inside a multiply-add or rounded before it.

    `lanes` 0 adds halves to halves. `divided`: a mean is the sum of terms that are divided first. `wide`: in float64.
    """

    about: str
    lanes: int = 1
    fused: bool = False
    divided: bool = False
    wide: bool = False


WAYS = (
    Way("sums one after another, as a plain loop does"),
    Way("sums one after another in multiply-adds", fused=True),
    Way("sums in 8 lanes", lanes=8),
    Way("sums in 4 lanes", lanes=4),
    Way("sums in 16 lanes", lanes=16),
    Way("sums in 8 lanes of multiply-adds", lanes=8, fused=True),
    Way("sums in 4 lanes of multiply-adds", lanes=4, fused=True),
    Way("sums in 16 lanes of multiply-adds", lanes=16, fused=True),
    Way("sums halves to halves", lanes=0),
    Way("sums terms that it divided first", divided=True),
    Way("sums in float64", wide=True),
)


def straying_of_sum(terms: int) -> float:
    """Root mean square of the relative error of a float32 sum of terms of one sign, taken one after another.

    The partial sums are rounded once each; the mean, its root and their product add the rest.
    """
    return float(_UNIT * (1.5 + terms**0.5 / 4))


# -- sums in float32 -----------------------------------------------------------------------------------------------


def total(terms: Tensor, way: Way, root: Tensor | None = None) -> Tensor:
    """The sum of `terms` (…, n) over the last axis as float32 makes it; of which `terms` are the squares, if of any."""
    if way.wide:
        return terms.double().sum(-1)
    values = _singles(root if root is not None else terms)
    if root is None or not way.fused:
        return _wide(_sum(values * values if root is not None else values, way), terms)
    lanes = _lanes(values, way.lanes).astype(np.float64)
    running: Singles = np.zeros(lanes.shape[:-2] + lanes.shape[-1:], np.float32)
    for step in range(lanes.shape[-2]):
        # The product of two float32 numbers is exact in float64, so that the sum is rounded once.
        running = (running + lanes[..., step, :] ** 2).astype(np.float32)
    return _wide(np.add.accumulate(running, -1, np.float32)[..., -1], terms)


def _singles(values: Tensor) -> Singles:
    return values.detach().float().cpu().numpy()


def _wide(values: Singles, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, torch.float64)


def _lanes(values: Singles, lanes: int) -> Singles:
    """Values (…, n) as (…, steps, lanes), with zeros at the end."""
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % lanes)])
    return padded.reshape(*padded.shape[:-1], -1, lanes)


def _sum(values: Singles, way: Way) -> Singles:
    if way.lanes:
        running = np.add.accumulate(_lanes(values, way.lanes), -2, np.float32)[..., -1, :]
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
    """Every sum over the last axis of float64 numbers is `self.total(terms, root)`; see `total`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Squares by identity, with what they are of; both are kept, so that no identity is reused.
        self._squares: dict[int, tuple[Tensor, Tensor]] = {}

    def total(self, terms: Tensor, root: Tensor | None) -> Tensor:
        raise NotImplementedError

    def mean(self, terms: Tensor, root: Tensor | None) -> Tensor:
        return self.total(terms, root) / terms.shape[-1]

    def product(self, _inner: int, out: Tensor) -> Tensor:
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = func.overloadpacket
        ours = _SUMMED.get(kind) if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64 else None
        found = ours(self, args, kwargs) if ours else None
        out = func(*args, **kwargs) if found is None else found
        if _is_square(kind, args):
            self._squares[id(out)] = out, args[0]
        if kind in _INNER and isinstance(out, Tensor) and out.dtype is torch.float64:
            return self.product(args[_INNER[kind]].shape[-1], out)
        return out

    def root(self, terms: Tensor) -> Tensor | None:
        """What these terms are the squares of."""
        found = self._squares.get(id(terms))
        return found[1] if found is not None and found[0] is terms else None


_INNER = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.baddbmm: 1}


def _is_square(kind: Any, args: Any) -> bool:
    if kind is _aten.mul:
        return args[0] is args[1]
    return kind is _aten.square or (kind is _aten.pow and not isinstance(args[1], Tensor) and args[1] == 2)


def _is_last(x: Tensor, dims: Any) -> bool:
    dims = dims if isinstance(dims, list | tuple) else [dims]
    return len(dims) == 1 and dims[0] in (-1, x.dim() - 1)


def _shaped(values: Tensor, keepdim: bool) -> Tensor:
    return values[..., None] if keepdim else values


def _sum_of(mode: _Sums, args: Any, kwargs: Any) -> Tensor | None:
    x, dims, keepdim = args[0], args[1] if len(args) > 1 else None, args[2] if len(args) > 2 else False
    return _shaped(mode.total(x, mode.root(x)), kwargs.get("keepdim", keepdim)) if _is_last(x, dims) else None


def _mean_of(mode: _Sums, args: Any, kwargs: Any) -> Tensor | None:
    x, dims, keepdim = args[0], args[1] if len(args) > 1 else None, args[2] if len(args) > 2 else False
    return _shaped(mode.mean(x, mode.root(x)), kwargs.get("keepdim", keepdim)) if _is_last(x, dims) else None


def _norm_of(mode: _Sums, args: Any, kwargs: Any) -> Tensor | None:
    x, order = args[0], args[1] if len(args) > 1 else 2
    dims, keepdim = (args[i] if len(args) > i else kwargs.get(n) for i, n in ((2, "dim"), (3, "keepdim")))
    return _shaped(mode.total(x * x, x).sqrt(), bool(keepdim)) if order == 2 and _is_last(x, dims) else None


def _softmax_of(mode: _Sums, args: Any, _kwargs: Any) -> Tensor | None:
    x, dim = args[:2]
    if not _is_last(x, dim):
        return None
    weights: Tensor = (x - x.amax(-1, keepdim=True)).exp()
    return weights / mode.total(weights, None)[..., None]


def _layer_norm_of(mode: _Sums, args: Any, _kwargs: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    x, shape, weight, bias, eps = args
    if len(shape) != 1:
        return None
    centre = mode.mean(x, None)[..., None]
    scale = (mode.mean((x - centre).square(), x - centre)[..., None] + eps).rsqrt()
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
    """Sums as one way takes them."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self._way = way

    def total(self, terms: Tensor, root: Tensor | None) -> Tensor:
        return total(terms, self._way, root)

    def mean(self, terms: Tensor, root: Tensor | None) -> Tensor:
        size = terms.shape[-1]
        if self._way.divided:
            return total((terms.float() / size).double(), self._way)
        return total(terms, self._way, root) / size


class _Straying(_Sums):  # type: ignore[no-untyped-call]
    """Sums and products off at random, by as much as plain loops in float32 may be."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def _generator(self, device: torch.device) -> torch.Generator:
        self._seed += 1
        return torch.Generator(device).manual_seed(self._seed)

    def total(self, terms: Tensor, _root: Tensor | None) -> Tensor:
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
