"""parity: where does a port of a language model differ from transformers, and is it a bug or rounding?

    import parity

    comparison = parity.diff("my_port.py:load", model="Qwen/Qwen3-0.6B", prompt="The sky is")
    comparison.verdict, comparison.findings, comparison.sites

Everything here is loaded when it is first asked for: importing parity costs nothing.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.api import diff, record
    from parity.dump import open_dump
    from parity.results import Comparison
    from parity.taps import recording, tap, with_taps

__all__ = ["Comparison", "diff", "open_dump", "record", "recording", "tap", "with_taps"]

_HOMES = {"diff": "api", "record": "api", "open_dump": "dump", "Comparison": "results"} | dict.fromkeys(
    ("recording", "tap", "with_taps"), "taps"
)


def __getattr__(name: str) -> Any:
    """One of the public names, or `__version__`."""
    from importlib import import_module
    from importlib.metadata import version

    if name == "__version__":
        return version("parity")
    if name not in _HOMES:
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
    return getattr(import_module(f"parity.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """`parity.record` stays the function, whoever imports the package `parity.record`."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
