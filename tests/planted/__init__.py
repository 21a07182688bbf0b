"""Bugs planted in copies of `impl`, and legal variants of it that must raise no alarm."""

from tests.planted import attention, clean, mlp, norm, rope, weights
from tests.planted.base import Variant, build, observe, threads

BUGS: tuple[Variant, ...] = (
    *rope.BUGS,
    *norm.BUGS,
    *attention.BUGS,
    *mlp.BUGS,
    *weights.BUGS,
    *clean.ROUNDING_MODE,
)
CLEAN: tuple[Variant, ...] = clean.CLEAN

__all__ = ["BUGS", "CLEAN", "Variant", "build", "observe", "threads"]
