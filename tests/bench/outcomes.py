"""What came out of a run through every gate, and the file in which benches keep it: they can be run in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tests.bench.gate_list import GATES, Figures, passed


@dataclass(frozen=True)
class Examined:
    """One run. `verdict` is parity's, or "not run" where `headline` says why.

    family   which bench it belongs to; `model`, `dtype` and `what` tell the run
    bug      what is planted; empty for a clean run
    flagged  sites that parity calls wrong, imprecise or nonfinite; `named`, the name of each finding
    first    the first site that the bug changes, `guilty` all where it is wrong; empty for clean runs
    naming   named, tied, wrong or unnamed
    figures  what the gates look at; `points` the first tensor that differs by each of their rules
    largest  the largest ratio of a site
    """

    family: str
    model: str
    dtype: str
    what: str
    bug: str
    verdict: str
    headline: str
    flagged: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    first: str = ""
    guilty: tuple[str, ...] = ()
    naming: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    points: dict[str, str] = field(default_factory=dict)
    largest: float = 0.0
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells this run from all others."""
        return self.family, self.model, self.dtype, self.what

    @property
    def gates(self) -> dict[str, bool]:
        """Which gates pass it."""
        names = {each.name for each in fields(Figures)} - {"first"}
        figures = Figures(**{name: self.figures[name] for name in names}, first=self.points)
        return {gate.id: passed(gate, figures) for gate in GATES}

    @property
    def has_effect(self) -> bool:
        """Whether the bug changes anything at all."""
        return bool(self.first)

    @property
    def is_placed(self) -> bool:
        """Whether parity flags the first wrong site, and nothing but wrong ones."""
        found = set(self.flagged)
        return bool(found & set(self.guilty)) and found <= set(self.guilty)

    @property
    def is_alarm(self) -> bool:
        """Whether parity accuses a clean run."""
        return not self.bug and self.verdict == "diverged"


def read(file: Path) -> list[Examined]:
    """The runs that a file holds, one a line; the last of each."""
    if not file.exists():
        return []
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line)
    tuples = ("flagged", "named", "guilty")
    runs = [Examined(**row | {name: tuple(row[name]) for name in tuples}) for row in rows]
    return list({run.key: run for run in runs}.values())


def append(file: Path, runs: Iterable[Examined]) -> None:
    """Add runs to a file, in one write: several processes may do so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(run)) + "\n" for run in runs)
    with file.open("ab", buffering=0) as end:
        end.write(lines.encode())
