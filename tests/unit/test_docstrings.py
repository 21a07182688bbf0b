"""What a docstring must say, and public names that nobody uses."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.unit.sources import sources

# Axes in parentheses, as (b, t, d), (vocab,) or (b or 1, t); or the word that any number of them will do.
SHAPE = re.compile(r"\((?:…|[\w*/+]+(?: or \w+)?)(?:, (?:…|[\w*/+ ]+))*,?\)|any shape|Shapes: ")
ARRAY = re.compile(r"\b(Tensor|Array|NDArray)\b")
# Called by pytest or typer, or by whoever imports parity, not by name.
CALLED_FROM_OUTSIDE = re.compile(r"pytest_\w+|parity_check|main|ulp_distance")  # the last defines what tests check


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def without_shape(source: str) -> list[str]:
    """Public functions that take or give arrays and whose docstring names no axes."""
    found = []
    for function in public_functions(ast.parse(source).body):
        arguments = [*function.args.args, *function.args.kwonlyargs]
        types = [a.annotation for a in arguments if a.annotation] + [function.returns or ast.Constant(None)]
        if any(ARRAY.search(ast.unparse(kind)) for kind in types):
            text = ast.get_docstring(function)
            if text is None or not SHAPE.search(text):
                found.append(function.name)
    return found


@pytest.mark.parametrize("path", sources("parity"), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrays_have_shapes(path: Path) -> None:
    assert not without_shape(path.read_text())


def test_an_array_without_a_shape_is_found() -> None:
    assert without_shape('def f(x: Tensor) -> None:\n    "Does (this one)."') == ["f"]
    assert without_shape('def f(x: Tensor) -> None:\n    "Does this."') == ["f"]
    assert without_shape(
        'class C:\n    def f(self) -> dict[str, Array]:\n        "Does this (or that thing here)."'
    ) == ["f"]
    assert without_shape('def f(x: Tensor) -> None:\n    "Takes x (b, t, d)."') == []
    assert without_shape('def f(x: Tensor) -> None:\n    "Takes x of any shape."') == []
    assert without_shape('def f(x: int) -> None:\n    "Does this."') == []


def defined(source: str) -> set[str]:
    """Public functions and classes at the top of a module; a decorator hands what it decorates to somebody."""
    return {
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not (isinstance(node, ast.FunctionDef) and node.decorator_list and _registers(node))
    }


def _registers(node: ast.FunctionDef) -> bool:
    said = " ".join(map(ast.unparse, node.decorator_list))
    return any(word in said for word in (".command", "fixture", "hookimpl"))


def used(source: str) -> set[str]:
    """Every name that a source reads, imports or spells in a string."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 60:
            names |= set(re.findall(r"\w+", node.value))
    return names


def unused(modules: dict[str, str]) -> set[str]:
    """Public names of the modules that none of them uses; an import alone is a use, for it must be used in turn."""
    uses = set().union(*map(used, modules.values()))
    found = set().union(*map(defined, modules.values())) - uses
    return {name for name in found if not CALLED_FROM_OUTSIDE.fullmatch(name)}


def test_every_public_name_is_used() -> None:
    assert not unused({str(path): path.read_text() for path in sources("parity")})


def test_a_name_that_nobody_uses_is_found() -> None:
    assert unused({"a": "def f(): ...\ndef g(): f()\nclass C: ...", "b": "from a import C"}) == {"g"}
