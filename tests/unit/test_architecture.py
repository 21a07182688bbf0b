"""Rules of the house that no single module can hold: who imports whom, what is light, how long things get."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from parity.cli.app import COMMANDS
from tests.conftest import ROOT, environment
from tests.unit.sources import sources

# From the ground up; each floor may import what is named beside it, and nothing else of parity.
FLOORS: dict[str, set[str]] = {
    "errors": set(),
    "untrusted": {"errors"},
    "load_object": {"errors"},
    "sites": set(),
    "columns": set(),
    "json_values": set(),
    "shards": {"errors"},
    "settings": {"errors", "columns"},
    "reasons": set(),
    "troubles": {"errors", "reasons"},
    "observer": {"reasons", "troubles"},
    "showing": {"columns"},
    "predictions": set(),
    "quantization": set(),
    "other_bits": set(),
    "results": {"quantization", "other_bits", "predictions", "reasons", "showing"},
    "rollout_report": {"results"},
    "engine_report": {"results"},
    "invariance_report": {"results"},
    "hash_report": {"results"},
    "words": {"other_bits", "reasons", "results", "sites"},
    "dump_coverage": set(),
    "dump": {"errors", "untrusted", "sites"},
    "record": {"errors", "sites"},
    "taps": {"errors", "dump", "record"},
    "reference": {"errors", "untrusted", "sites", "quantization", "results", "record"},
    "preflight": {"errors", "untrusted", "reference"},
    "faults": {"errors", "load_object", "sites", "results", "record", "reference"},
    "options": {"errors", "preflight", "reference"},
    "run_spec": {"errors", "options", "preflight", "dump", "reference", "faults"},
    "candidates": {"errors", "untrusted", "load_object", "sites", "results", "dump", "record", "reference", "run_spec"},
    "diagnose": {"errors", "observer", "sites", "reasons", "other_bits", "results", "record", "reference", "faults"},
    "compare": {
        "untrusted",
        "json_values",
        "shards",
        "options",
        "errors",
        "dump_coverage",
        "preflight",
        "reasons",
        "words",
        "observer",
        "sites",
        "settings",
        "predictions",
        "quantization",
        "results",
        "dump",
        "record",
        "reference",
        "faults",
        "run_spec",
        "candidates",
        "diagnose",
    },
    "rollouts": {
        "errors",
        "untrusted",
        "observer",
        "options",
        "results",
        "rollout_report",
        "dump",
        "record",
        "reference",
        "faults",
        "run_spec",
        "diagnose",
    },
    "engines": {
        "errors",
        "observer",
        "options",
        "results",
        "engine_report",
        "invariance_report",
        "hash_report",
        "dump",
        "record",
        "reference",
        "run_spec",
        "candidates",
        "compare",
    },
    "api": {
        "engines",
        "engine_report",
        "invariance_report",
        "hash_report",
        "errors",
        "observer",
        "options",
        "preflight",
        "results",
        "dump",
        "run_spec",
        "candidates",
        "compare",
    },
    "scale": {"errors", "observer", "shards", "results", "reference", "run_spec", "candidates", "compare"},
    "report": {
        "json_values",
        "errors",
        "troubles",
        "untrusted",
        "columns",
        "dump_coverage",
        "sites",
        "predictions",
        "quantization",
        "reasons",
        "results",
        "rollout_report",
        "engine_report",
        "invariance_report",
        "hash_report",
        "words",
    },
    "show": {"errors", "observer", "sites", "dump", "reference", "report"},
    "cli": {
        "show",
        "json_values",
        "shards",
        "scale",
        "errors",
        "preflight",
        "reasons",
        "troubles",
        "words",
        "observer",
        "options",
        "sites",
        "settings",
        "predictions",
        "results",
        "dump",
        "reference",
        "faults",
        "run_spec",
        "candidates",
        "compare",
        "rollouts",
        "engines",
        "engine_report",
        "invariance_report",
        "hash_report",
        "api",
        "report",
    },
    "testing": {
        "errors",
        "reasons",
        "words",
        "options",
        "columns",
        "sites",
        "settings",
        "predictions",
        "results",
        "dump",
        "reference",
        "candidates",
        "compare",
        "api",
        "report",
    },
}
# What a floor may import from above within a function: a Comparison shows and saves itself, for which it needs reports.
LATE: dict[str, set[str]] = {"showing": {"results", "report"}}
OUTSIDE = {"models"}  # programs that make data; nobody imports them
HEAVY = {"torch", "transformers", "numpy", "h5py", "safetensors", "matplotlib"}
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 300, 50, 6


def imported(source: str, package: str = "parity") -> set[str]:
    """Full names of all that a module imports, wherever in it. `package` is what its relative imports start from."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            # `from parity import x` may mean the module parity.x.
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return names


def floor_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "parity" and len(parts) > 1 else None


def forbidden(floor: str, source: str, package: str = "parity") -> set[str]:
    """Floors of parity that a source on `floor` imports against the rule."""
    wanted = {found for name in imported(source, package) if (found := floor_of(name)) is not None}
    return wanted - FLOORS[floor] - LATE.get(floor, set()) - {floor}


def test_the_floors_themselves_stand_on_each_other() -> None:
    below: set[str] = set()
    for floor, allowed in FLOORS.items():
        assert allowed <= below, f"{floor} rests on something above it: {allowed - below}"
        below.add(floor)


@pytest.mark.parametrize("floor", LATE)
def test_what_comes_late_is_imported_within_a_function(floor: str) -> None:
    code = f"import sys, parity.{floor}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert not {floor_of(name) for name in done.stdout.split()} & LATE[floor]


@pytest.mark.parametrize("path", sources("parity"), ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_imports_from_above(path: Path) -> None:
    relative = path.relative_to(ROOT / "parity")
    floor = relative.parts[0].removesuffix(".py")
    if floor in OUTSIDE:
        return
    package = ".".join(["parity", *relative.parts[:-1]])
    if floor == "__init__":
        assert not [name for name in imported(path.read_text(), package) if name.split(".")[0] in HEAVY]
        return
    assert floor in FLOORS, f"{relative} is on no floor: give it one in FLOORS"
    assert not forbidden(floor, path.read_text(), package)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("parity", "import parity.cli.commands"),
        ("parity", "from parity.cli import main"),
        ("parity", "from parity import cli"),
        ("parity.report", "from .. import cli"),
        ("parity.report", "from ..cli import main"),
        ("parity", "def f():\n    from parity.cli import main"),
        ("parity", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import parity.cli.commands as c"),
    ],
)
def test_an_import_from_above_is_found(package: str, source: str) -> None:
    assert forbidden("report", source, package) == {"cli"}


def test_reports_see_nothing_but_results() -> None:
    assert FLOORS["report"] == {
        "json_values",
        "errors",
        "troubles",
        "untrusted",
        "columns",
        "dump_coverage",
        "sites",
        "predictions",
        "quantization",
        "reasons",
        "results",
        "rollout_report",
        "engine_report",
        "invariance_report",
        "hash_report",
        "words",
    }
    assert forbidden("report", "from parity.dump import open_dump") == {"dump"}


@pytest.mark.parametrize("path", sources("impl"), ids=lambda p: p.name)
def test_the_worked_example_knows_nothing_of_parity_or_transformers(path: Path) -> None:
    assert not strangers(path.read_text())


def test_a_worked_example_that_peeks_is_found() -> None:
    assert strangers("import torch\ndef f():\n    from transformers.models import qwen3") == {"transformers"}
    assert strangers("from parity.record.tap import tapping") == {"parity"}


def strangers(source: str) -> set[str]:
    return {name.split(".")[0] for name in imported(source, "impl")} & {"parity", "transformers"}


@pytest.mark.parametrize("path", sources("tests"), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_tests_share_is_in_no_test(path: Path) -> None:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert not [name for name in imported(path.read_text(), package) if ".test_" in name]


# -- light ---------------------------------------------------------------------------------------------------

_RUN = """
import sys
sys.argv = ["parity", *{arguments!r}]
from parity.cli import main
try:
    main()
except SystemExit as stop:
    assert (stop.code or 0) == {code}, stop.code
"""


def loaded_by(code: str) -> set[str]:
    """Heavy libraries that a fresh interpreter has loaded after running `code`."""
    report = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], env=environment(), capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])} & HEAVY


@pytest.mark.parametrize(
    "code",
    [
        "import parity",
        _RUN.format(arguments=["--help"], code=0),
        _RUN.format(arguments=["--version"], code=0),
        _RUN.format(arguments=["diff", "--help"], code=0),
        _RUN.format(arguments=["record", "--help"], code=0),
        _RUN.format(arguments=["sites", "--help"], code=0),
        _RUN.format(arguments=["sites", "--model", "/nowhere"], code=2),
        _RUN.format(arguments=["diff", "nowhere.h5"], code=2),
        _RUN.format(arguments=["check", "nowhere.h5"], code=2),
    ],
    ids=[
        *("import", "--help", "--version", "diff --help", "record --help", "sites --help"),
        *("sites of no model", "diff of no dump", "check of no dump"),
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_by(code) == set()


def test_help_builds_no_command() -> None:
    code = _RUN.format(arguments=["--help"], code=0) + "\nassert 'parity.cli.commands' not in sys.modules"
    assert loaded_by(code) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_says_of_itself(name: str) -> None:
    where, summary = COMMANDS[name]
    command = getattr(import_module(f"parity.cli.{where}"), name)
    assert inspect.getdoc(command).partition("\n\n")[0].replace("\n", " ") == summary


def test_something_heavy_would_be_noticed() -> None:
    assert loaded_by("import parity, numpy.linalg") == {"numpy"}


# -- length --------------------------------------------------------------------------------------------------


def too_long(source: str) -> Iterator[str]:
    """What in a source is longer than its budget."""
    lines = len(source.splitlines())
    if lines > LONGEST_FILE:
        yield f"{lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield f"{node.name}: {length} lines"
            given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(given) - (given[:1] in (["self"], ["cls"]))
            # What a command takes is what its user may say.
            if count > MOST_PARAMETERS and node.name not in COMMANDS:
                yield f"{node.name}: {count} parameters"


@pytest.mark.parametrize("path", [*sources("parity"), *sources("impl")], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_within_their_budget(path: Path) -> None:
    assert not list(too_long(path.read_text()))


def test_what_exceeds_its_budget_is_found() -> None:
    function = "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION
    assert list(too_long(function)) == [f"f: {LONGEST_FUNCTION + 1} lines"]
    assert list(too_long("class C:\n" + "".join("    " + line + "\n" for line in function.splitlines()))) == [
        f"f: {LONGEST_FUNCTION + 1} lines"
    ]
    assert list(too_long("x = 1\n" * (LONGEST_FILE + 1))) == [f"{LONGEST_FILE + 1} lines"]
    assert not list(too_long("x = 1\n" * LONGEST_FILE))
    assert list(too_long("def f(a, b, c, d, /, e, f, *, g): ...")) == ["f: 7 parameters"]
    assert not list(too_long("class C:\n    def f(self, a, b, c, d, e, f): ..."))


def test_the_unit_tests_need_no_torch() -> None:
    modules = [f"tests.unit.{path.stem}" for path in sorted((ROOT / "tests" / "unit").glob("test_*.py"))]
    code = "import importlib, sys\nsys.modules['torch'] = None\nfor name in sys.argv[1:]: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code, *modules], env=environment(), check=True)
