"""What all tests share: checkpoints made once, and the command line run in this process or in its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.slow import TABLE

if TYPE_CHECKING:
    from parity.reference.checkpoint import Checkpoint

# Before anything imports the hub's client, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

# Installed, the plugin is found by itself; naming it twice would be an error.
pytest_plugins = ["pytester", *([] if entry_points(group="pytest11", name="parity") else ["parity.testing.plugin"])]

ROOT = Path(__file__).parent.parent


def slow_but(fast: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters for a test, all of them slow but those in `fast`."""
    keep = list(fast)
    return [value if value in keep else pytest.param(value, marks=pytest.mark.slow) for value in values]


def in_turn(fast: Iterable[Any], values: Iterable[Any], *others: Sequence[Any]) -> list[Any]:
    """Parameters for a test: each value with one of each of the others in turn, all slow but those of `fast`.

    All with all would try the same kinds of error again, for minutes.
    """
    keep = list(fast)
    rows = [(value, *(other[i % len(other)] for other in others)) for i, value in enumerate(values)]
    return [row if row[0] in keep else pytest.param(*row, marks=pytest.mark.slow) for row in rows]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `left_out` says, and mark as slow what was measured to be so."""
    out = set() if os.environ.get("PARITY_TESTS") == "all" else left_out(items)
    if out:
        config.hook.pytest_deselected(items=list(out))
        items[:] = [item for item in items if item not in out]
    slow = frozenset(TABLE.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in slow:
            item.add_marker("slow")


def left_out(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Seven of eight of the parameters that a test's own file calls slow.

    They are the same question asked of one more architecture, dtype or bug; all fast ones and all single tests are run.
    """
    seen: Counter[str] = Counter()
    out = set()
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("slow"):
            name = item.nodeid.partition("[")[0]
            if seen[name] % 8:
                out.add(item)
            seen[name] += 1
    return out


@dataclass(frozen=True)
class Ran:
    """What a command left behind: its exit code and its two streams."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models of a few thousand numbers run faster on one thread, and the cores are shared with other workers."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_step_summary() -> Iterator[None]:
    """On GitHub, the runs of these tests do not belong into the summary of the step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        yield


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded checkpoint."""
    return ROOT / "parity" / "models" / "tiny-qwen3"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("qwen3", layers=2)` or `checkpoint("llama")`: a random checkpoint, written once a session."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def make(model_type: str, **settings: Any) -> Path:
        from tests import checkpoints

        key = "-".join([model_type, *(f"{name}={value}" for name, value in sorted(settings.items()))])
        if key not in made:
            write = checkpoints.qwen3 if model_type == "qwen3" else lambda p, **s: checkpoints.other(model_type, p, **s)
            made[key] = write(folder / key, **settings)
        return made[key]

    return make


@pytest.fixture(scope="session")
def chatting(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The embedded model with a chat template."""
    from parity.reference.checkpoint import find

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny, folder)
    path = folder / "tokenizer_config.json"
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return find(str(folder))


@pytest.fixture(scope="session")
def small(checkpoint: Callable[..., Path]) -> Path:
    """A random Qwen3 of two layers and no tokenizer, in bfloat16: a diff of it takes half a second."""
    return checkpoint("qwen3", layers=2)


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ran]]:
    """Run a command in this process, in an empty directory: importing transformers anew would take seconds."""
    from parity.cli import main

    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["parity", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        code = stop.value.code
        return Ran(code if isinstance(code, int) else int(code is not None), out, err)

    yield run
    assert sys.path == path, "a command leaves sys.path as it was"
    for name in set(sys.modules) - modules:
        # Candidates of other tests may bear the same name.
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def environment(**more: str) -> dict[str, str]:
    """The environment of a process of its own: this checkout, one thread, nothing from the hub."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., Ran]:
    """Run a command in a process of its own."""

    def run(*arguments: object, cwd: Path = tmp_path, env: dict[str, str] | None = None) -> Ran:
        command = [sys.executable, "-m", "parity.cli", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env=environment(**(env or {})), capture_output=True, text=True, timeout=120
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="module")
def one_piece_at_a_time() -> Iterator[None]:
    """Treat every checkpoint as a large one, of which only one piece is in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parity.reference.pieces.SMALL", 0)
        yield
