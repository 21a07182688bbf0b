"""Somebody else's Python: a candidate's factory and a user's faults come in by one way, and fail in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from parity.candidates.base import load_factory
from parity.errors import CandidateError, ParityError, UsageError
from parity.faults import load_user_faults
from parity.load_object import describe, misfit

Load = Callable[[str], Any]
KINDS: dict[str, tuple[Load, type[ParityError]]] = {
    "candidate": (load_factory, CandidateError),
    "faults": (load_user_faults, UsageError),
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In a folder of its own; modules that others called the same are forgotten before, those from there afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


GOOD = "def load(*arguments): ...\nFAULTS = ()\n"
BAD: dict[str, tuple[str, str, str]] = {
    "no name": ("", "mine", ", for example "),
    "no module": ("", ":load", "write module:"),
    "no file": ("", "absent.py:load", "no file absent.py. Give its path from "),
    "no module of that name": ("", "absent.inner:load", "no module 'absent'. Install it, or give file.py:"),
    "a relative module": ("", ".mine:load", "importing .mine failed with TypeError"),
    "no such thing": ("import os\nfrom pathlib import Path\nx = 1\n_y = 2", "{}:other", "'other' (it has: x)."),
    "an empty module": ("", "{}:other", "'other' (it has: nothing)."),
    "not parsed": ("(", "{}:load", "failed with SyntaxError: '(' was never closed ("),
    "raises": ("\nraise ValueError('a\\nb')", "{}:load", "failed with ValueError: a b (mine.py:2)"),
    "exits": ("import sys\nsys.exit(0)", "{}:load", "failed with SystemExit: 0 (mine.py:2)"),
    "misses something itself": (
        "import absent",
        "{}:load",
        "failed with ModuleNotFoundError: No module ",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_imported_is_told_in_one_line(kind: str, case: str) -> None:
    source, spec, message = BAD[case]
    load, error = KINDS[kind]
    Path("mine.py").write_text(source)
    for where in ("mine", "mine.py") if "{}" in spec else ("",):
        with pytest.raises(error) as caught:
            load(spec.format(where))
        text = str(caught.value)
        assert text.startswith(f"{kind} {spec.format(where)!r}: ")
        assert message in text
        assert "\n" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_of_the_wrong_type(kind: str) -> None:
    load, error = KINDS[kind]
    Path("mine.py").write_text("x = 1")
    with pytest.raises(error, match="found int, expected a "):
        load("mine.py:x")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_has_its_neighbours_and_a_name_of_its_own(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    load, _ = KINDS[kind]
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "beside.py").write_text(GOOD)
    # A dataclass looks its own module up.
    (tmp_path / "inner" / "json.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from beside import FAULTS, load\n"
        "print('hello')\n"
        "@dataclass\n"
        "class X:\n"
        "    x: int\n"
    )
    before = list(sys.path)
    load(f"inner/json.py:{'load' if kind == 'candidate' else 'FAULTS'}")
    assert sys.path == before
    assert sys.modules["json"] is json
    assert capsys.readouterr() == ("", "hello\n"), "standard output belongs to the report"


def test_an_error_in_a_library_is_placed_where_the_user_called_it(tmp_path: Path) -> None:
    (tmp_path / "port.py").write_text("import json\n\ndef load():\n    return json.loads('{')\n")
    with pytest.raises(ValueError, match="Expecting") as caught:
        load_factory("port.py:load")()
    assert describe(caught.value).endswith(" (port.py:4)")


def test_an_error_without_a_line_of_the_users_is_placed_where_it_was_raised() -> None:
    with pytest.raises(UsageError) as caught:
        load_user_faults("absent.py:FAULTS")
    caught.value.__traceback__ = caught.value.__traceback__.tb_next  # type: ignore[union-attr]
    assert "load_object.py:" in describe(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("lambda model_dir, dtype, device: 0", ""),
        ("lambda *arguments: 0", ""),
        ("lambda model_dir: 0", "it takes (model_dir), and is called with (model_dir, dtype, device): too many"),
        ("lambda a, b, c, d: 0", "it takes (a, b, c, d), and is called with (model_dir, dtype, device): missing a"),
        ("print", ""),
    ],
)
def test_a_function_that_takes_other_arguments(source: str, said: str) -> None:
    found = misfit(eval(source), "model_dir", "dtype", "device")
    assert found.startswith(said)
    assert bool(found) == bool(said)
