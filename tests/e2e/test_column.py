"""A column made with what CONTRIBUTING.md says, in a copy of the package: tables, page and thresholds have it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

EDITS = {
    "results.py": ("    ulp_max: float | None = None\n", "    ulp_mean: float | None = None\n"),
    "compare/explain.py": ("        ulp_max=x.ulp_max,\n", "        ulp_mean=x.ulp_mean,\n"),
    "columns.py": (
        'largest ULP", ".0f"),\n',
        '    Column("ulp_mean", "mean ULP", "total error, mean ULP", ".3f", in_layers=True, has_limit=True),\n',
    ),
}
TEST = """
from parity.testing import cases
test_port = cases(candidate="impl.qwen3:load", prompts=[(5, 17, 3)], attention="sdpa", power=False)
"""


@pytest.mark.slow
def test_three_edits_make_a_column(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "parity", tmp_path / "parity", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "impl", tmp_path / "impl", ignore=shutil.ignore_patterns("__pycache__", "rust"))
    for name, (before, line) in EDITS.items():
        path = tmp_path / "parity" / name
        assert path.read_text().count(before) == 1
        path.write_text(path.read_text().replace(before, before + line))
    ran = run(tmp_path, "parity.cli", "diff", "--tokens", "5 17 3", "--attention", "sdpa", "--no-power", "-o", "report")
    assert ran.returncode == 0, ran.stderr
    assert "mean ULP" in ran.stdout
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert any(site.get("ulp_mean", 0) > 0 for site in written["sites"])
    assert "mean ULP" in (tmp_path / "report" / "report.md").read_text()
    assert "mean ULP" in (tmp_path / "report" / "index.html").read_text()

    (tmp_path / "pyproject.toml").write_text('[tool.parity.thresholds]\n"lm_head" = {ulp_mean = 1e-9}\n')
    (tmp_path / "test_port.py").write_text(TEST)
    ran = run(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "test_port.py")
    assert ran.returncode == 1, ran.stdout
    assert "mean ULP" in ran.stdout


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = environment(PYTHONPATH=str(folder), COLUMNS="200")
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_the_files_that_recipes_name_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"\b(?:parity|tests)/[\w/]+\.(?:py|md|txt)\b", text))
    assert len(named) > 10
    placeholders = ("KIND", "SUBJECT")
    assert not [n for n in named if not (ROOT / n).is_file() and not any(word in n for word in placeholders)]
