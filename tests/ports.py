"""The worked examples that are programs of their own: how each is built and started."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT

PORTS = ("rust", "numpy", "jax")
RUST = ROOT / "impl" / "rust"


def command_of(port: str) -> list[str]:
    """The words before MODEL_DIR TOKENS OUT. Skips the test where what the port needs is not installed."""
    if port == "rust":
        return [str(build(RUST))]
    if port == "jax" and find_spec("jax") is None:
        pytest.skip("jax is not installed")
    return [sys.executable, "-m", f"impl.qwen3_{port}"]


def build(source: Path) -> Path:
    """Compile the Rust port, without a network, and return the program. What is up to date takes no time."""
    if shutil.which("cargo") is None:
        pytest.skip("cargo is not installed")
    words = ["cargo", "build", "--release", "--offline", "--quiet"]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return source / "target" / "release" / "qwen3"
