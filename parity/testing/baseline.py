"""A baseline: the ratios of an earlier run, one line for each site, in a text file beside the test.

Ratios wander a little from machine to machine, and nothing can be asked of a port beyond the reference's own
rounding. So a ratio up to 1 counts as 1, and a site is worse (or better) only by more than a factor of 1.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from parity.errors import UsageError
from parity.results import FACTOR, Measurement

Ratios = dict[str, float]

_HEADER = "# Site, ratio to the floor, relative error. Written by pytest --parity-record; to be committed.\n"


def path_for(test_file: Path) -> Path:
    """Where the baseline of a test file lies."""
    return test_file.with_suffix(".baseline.txt")


def load(path: Path) -> dict[str, Ratios]:
    """The ratios of each section, a section being a test and its prompt; empty without a file."""
    return {
        section: {line.split()[0]: float(line.split()[1]) for line in lines} for section, lines in _read(path).items()
    }


def save(path: Path, sections: Mapping[str, Iterable[Measurement]]) -> None:
    """Write or replace these sections, keep the others. The same measurements give the same bytes."""
    lines = _read(path) | {section: _lines(list(sites)) for section, sites in sections.items()}
    text = [f"\n[{section}]\n" + "".join(f"{line}\n" for line in lines[section]) for section in sorted(lines)]
    path.write_text(_HEADER + "".join(text), encoding="utf-8")


def is_worse(ratio: float, than: float) -> bool:
    """Whether a ratio is significantly above another. NaN is worse than any number."""
    return not ratio <= FACTOR * max(than, 1.0)


def _lines(sites: list[Measurement]) -> list[str]:
    measured = [m for m in sites if m.verdict != "unmeasured" and m.ratio is not None]
    width = max((len(m.site) for m in measured), default=0)
    return [f"{m.site:{width}}  {m.ratio:<9.3g}  {m.local_rel or 0.0:.3g}" for m in measured]


def _read(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        return {}
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            current = sections.setdefault(line[1:-1], [])
        elif current is not None and _is_row(line):
            current.append(line)
        else:
            raise UsageError(
                f"{path.name}:{number}: not a line of a baseline: {line[:60]!r}. Write it again: pytest --parity-record"
            )
    return sections


def _is_row(line: str) -> bool:
    parts = line.split()
    try:
        return len(parts) == 3 and all(isinstance(float(part), float) for part in parts[1:])
    except ValueError:
        return False
