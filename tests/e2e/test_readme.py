"""The README keeps its word: its Python runs, its tree is the disk's, its links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from parity.options import RunOptions
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.slow
def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", section("From Python"), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    example = tmp_path / "reports" / "example"
    example.mkdir(parents=True)
    shutil.copy(ROOT / "reports" / "example" / "planted.py", example)
    (tmp_path / "dumps").mkdir()
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    first, second, last = capsys.readouterr().out.splitlines()
    assert "interleaved" in first
    assert "GELU" in second
    assert float(last.split()[0]) > 2
    assert (tmp_path / "reports" / "planted" / "index.html").is_file()
    assert (tmp_path / "dumps" / "ref.tokens.txt").is_file()


def tree() -> set[str]:
    """Paths that the tree of the README names, relative to the root."""
    (block,) = re.findall(r"```\n(parity/\n.*?)```", section("For developers"), re.DOTALL)
    found: set[str] = set()
    for line in block.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        start = "parity/" if line.startswith("  ") else ""
        found |= {start + name for name in names if re.fullmatch(r"[\w-]+(/|\.py)", name)}
    return found


def test_its_tree_is_that_of_the_disk() -> None:
    named = tree()
    assert {"parity/", "parity/compare/", "parity/api.py", "tests/"} <= named
    assert not [name for name in named if not (ROOT / name).exists()]
    packages = {f"parity/{path.parent.name}/" for path in (ROOT / "parity").glob("*/__init__.py")}
    assert not packages - named, "a package that the tree leaves out"


def test_its_workflow_is_one() -> None:
    yaml = pytest.importorskip("yaml")
    (block,) = re.findall(r"```yaml\n(.*?)```", section("In your test suite"), re.DOTALL)
    steps = yaml.safe_load(block)["jobs"]["parity"]["steps"]
    (command,) = [step["run"] for step in steps if step.get("run", "").startswith("parity diff")]
    options = {f"--{row.name.replace('_', '-')}" for row in dataclasses.fields(RunOptions)}
    assert set(re.findall(r"--[a-z-]+", command)) <= options | {"--candidate", "--out"}


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
