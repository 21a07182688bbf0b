"""What the docstrings and the notebook show is what happens."""

from __future__ import annotations

import doctest
import importlib
import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, slow_but
from tests.unit.sources import sources

WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources("parity") if ">>> " in path.read_text()
]
NOTEBOOK = ROOT / "reports" / "worked.ipynb"


def test_the_public_functions_have_examples() -> None:
    assert {"parity.api", "parity.sites", "parity.taps"} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize("name", slow_but([n for n in WITH_EXAMPLES if n != "parity.api"], WITH_EXAMPLES))
def test_the_examples_in_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0


def printed(notebook: dict[str, object]) -> list[str]:
    """What each cell of a notebook printed, and whether it showed a picture or a page."""
    texts = []
    for cell in notebook["cells"]:  # type: ignore[attr-defined]
        for output in cell.get("outputs", ()):
            if output.get("name") == "stdout":
                texts.append("".join(output["text"]))
            texts += [kind for kind in ("text/html", "image/png") if kind in output.get("data", ())]
    return texts


@pytest.mark.slow
def test_the_notebook_says_what_it_says(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    shown = printed(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    assert shown[0] == "text/html"
    assert "rope-interleaved" in shown[1]
    assert shown.count("image/png") == 3
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[], execution_count=None)
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(NOTEBOOK.parent)}}, timeout=300)
    client.execute(env=environment())
    assert printed(json.loads(nbformat.writes(notebook))) == shown
