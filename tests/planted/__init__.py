"""Bugs planted in copies of `impl`, and legal variants of it that must raise no alarm."""

from tests.planted import attention, clean, damage, loops, mlp, norm, rope, weights
from tests.planted.base import Variant, build, observe, threads
from tests.planted.causes import UNPLANTED, Cause, causes

BUGS: tuple[Variant, ...] = (
    *rope.BUGS,
    *norm.BUGS,
    *attention.BUGS,
    *mlp.BUGS,
    *weights.BUGS,
    *damage.BUGS,
    *clean.ROUNDING_MODE,
)
CAUSES: dict[str, Cause] = causes(bug.id for bug in BUGS)
CLEAN: tuple[Variant, ...] = (*clean.CLEAN, *loops.CLEAN)

__all__ = ["BUGS", "CAUSES", "CLEAN", "UNPLANTED", "Cause", "Variant", "build", "observe", "threads"]
