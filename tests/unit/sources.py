"""The sources of a package, for tests that read them."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import ROOT


def sources(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "make_tiny_qwen3.py"]
