"""Taps for a port in Python, whatever its arrays are: `y = parity.tap("model.layers.3.resid_mid", y)`.

    with parity.recording("port.h5", token_ids):
        forward(token_ids)

A tap gives back what it is given, and outside of a recording does nothing else. A jitted function of JAX has no side
effects; `with_taps` makes one that returns the values beside its result:

    with parity.recording("port.h5", token_ids):
        logits, values = jax.jit(parity.with_taps(forward))(token_ids)
        for site, value in values.items():
            parity.tap(site, value)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from parity.errors import UsageError

if TYPE_CHECKING:
    from parity.dump import Array

T = TypeVar("T")
P = ParamSpec("P")

_keep: ContextVar[Callable[[str, Any], None] | None] = ContextVar("_keep", default=None)


def tap(site: str, value: T) -> T:
    """Show a value of any shape, of numpy, torch, JAX or MLX, to the recording that goes on, if any; returns it.

    >>> tap("model.norm", 1.5)
    1.5
    """
    if (keep := _keep.get()) is not None:
        keep(site, value)
    return value


@contextmanager
def recording(
    path: Path | str, token_ids: Sequence[Sequence[int]], dims: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Write what is tapped within the block to a dump (*.h5), which `parity diff` takes.

    token_ids  those of the run, a row for each sequence
    dims       axes of sites or of families of them: {"model.layers.*.self_attn.q_rope": "batch head token head_dim"}

    Raises UsageError for a value that is no array, and DumpError if a site is tapped twice.

    >>> import numpy as np
    >>> with recording("port.h5", [[5, 17, 3]], dims={"model.norm": "batch token feature"}):
    ...     hidden = tap("model.norm", np.ones((1, 3, 8), dtype=np.float32))
    >>> from parity.dump import open_dump
    >>> open_dump("port.h5").entries["model.norm"].shape
    (1, 3, 8)
    """
    from parity.dump import ArchiveWriter, RunInfo, lookup

    info = RunInfo(producer="parity.tap", token_ids=tuple(tuple(int(token) for token in row) for row in token_ids))
    with ArchiveWriter(Path(path), info) as writer:

        def keep(site: str, value: Any) -> None:
            axes = lookup(dims or {}, site)
            writer.add(site, _numpy(site, value), tuple(axes[0].split()) if axes else None)

        with _keeping(keep):
            yield


def with_taps(function: Callable[P, T]) -> Callable[P, tuple[T, dict[str, Any]]]:
    """The same function, returning beside its result what it taps, by site; it may be jitted, and a body of a scan.

    >>> with_taps(lambda x: tap("model.norm", 2 * x) + 1)(3)
    (7, {'model.norm': 6})
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> tuple[T, dict[str, Any]]:
        values: dict[str, Any] = {}

        def keep(site: str, value: Any) -> None:
            if site in values:
                raise UsageError(f"parity.tap: {site!r} is tapped twice. Give each value a site of its own.")
            values[site] = value

        with _keeping(keep):
            return function(*args, **kwargs), values

    return run


@contextmanager
def _keeping(keep: Callable[[str, Any], None]) -> Iterator[None]:
    before = _keep.set(keep)
    try:
        yield
    finally:
        _keep.reset(before)


def _numpy(site: str, value: Any) -> Array:
    """A copy of an array of any shape, bit by bit, for the port may go on to write into it."""
    import ml_dtypes
    import numpy as np

    library = type(value).__module__.partition(".")[0]
    if library == "torch":
        from parity.record.arrays import to_numpy

        return np.array(to_numpy(value))
    if "jax" in sys.modules and isinstance(value, sys.modules["jax"].core.Tracer):
        raise UsageError(f"parity.tap: {site!r} is tapped while JAX traces. Jit parity.with_taps(f) in place of f.")
    if library == "mlx" and str(value.dtype).endswith("bfloat16"):
        return np.array(value.view(sys.modules["mlx.core"].uint16)).view(ml_dtypes.bfloat16)
    array = np.array(value)
    if array.dtype == object:
        raise UsageError(f"parity.tap: {site!r} is {type(value).__name__}. Tap an array of numpy, torch, JAX or MLX.")
    return array
