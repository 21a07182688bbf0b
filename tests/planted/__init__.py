"""Bugs planted in copies of `impl`, and legal variants of it that must raise no alarm."""

from tests.planted import attention, clean, damage, mlp, norm, rope, weights
from tests.planted.base import Variant, build, observe, threads
from tests.planted.causes import CAUSES, UNPLANTED, Cause

BUGS: tuple[Variant, ...] = (
    *rope.BUGS,
    *norm.BUGS,
    *attention.BUGS,
    *mlp.BUGS,
    *weights.BUGS,
    *damage.BUGS,
    *clean.ROUNDING_MODE,
)
CLEAN: tuple[Variant, ...] = clean.CLEAN

__all__ = ["BUGS", "CAUSES", "CLEAN", "UNPLANTED", "Cause", "Variant", "build", "observe", "threads"]
