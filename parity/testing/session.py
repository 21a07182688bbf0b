"""The comparisons of a test session: each is made once, by whichever process asks first.

They travel between processes as report.json in a folder of the session, so that pytest-xdist's workers share them.
"""

from __future__ import annotations

import json
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parity.errors import ModelError, ParityError

if TYPE_CHECKING:
    from parity.results import Comparison
    from parity.testing.items import Run

# Properties of an item: they tell the process that sums up, and JUnit's XML, what the item is a part of.
FOLDER, RUN, PART = "parity_report", "parity_run", "parity_part"


@dataclass(frozen=True)
class Answer:
    """A comparison, or the trouble that there was instead."""

    folder: Path
    comparison: Comparison | None
    trouble: str = ""
    no_model: bool = False

    @property
    def page(self) -> Path:
        """What a person would open."""
        html = self.folder / "index.html"
        return html if html.is_file() else self.folder / "report.json"


class Answers:
    """The comparisons of this session, each made once by whichever process asks first."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, Answer] = {}

    def to(self, run: Run) -> Answer:
        """The answer to a run, from memory, from another process, or made now."""
        if run.key not in self._known:
            from filelock import FileLock

            folder = self._root / f"{run.id}-{run.key}"
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):
                if not (folder / "done").exists():
                    _make(run, folder)
                    (folder / "done").touch()
            self._known[run.key] = load_answer(folder)
        return self._known[run.key]


def _make(run: Run, folder: Path) -> None:
    from parity.report.files import write_all
    from parity.testing.items import compare

    try:
        # Whether a warning is an error is for tests to say, not for what a candidate does in its forward pass.
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            comparison = compare(run)
        write_all(comparison, folder, plots=False)
    except ParityError as error:
        (folder / "trouble.json").write_text(json.dumps([str(error), isinstance(error, ModelError)]), encoding="utf-8")
    except Exception as error:
        (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        text = f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:300]}. The traceback is in "
        (folder / "trouble.json").write_text(json.dumps([f"{text}{folder / 'traceback.txt'}", False]), encoding="utf-8")


def load_answer(folder: Path) -> Answer:
    """What a folder of the session holds: the comparison, or why there is none."""
    from parity.report import json as report_json

    if (folder / "trouble.json").is_file():
        trouble, no_model = json.loads((folder / "trouble.json").read_text(encoding="utf-8"))
        return Answer(folder, None, trouble, no_model)
    return Answer(folder, report_json.load(folder / "report.json"))
