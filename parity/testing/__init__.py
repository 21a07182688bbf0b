"""Guards in pytest: `parity.testing.cases(...)` turns a port's comparison into test items."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.testing.items import cases

__all__ = ["cases"]


def __getattr__(name: str) -> Any:
    """`cases`, loaded when asked for: pytest imports this package in every run."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from parity.testing import items

    return getattr(items, name)
