"""What the plugin says at the end: a line about all comparisons, baselines, a workflow's step summary."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from parity.errors import UsageError
from parity.testing.session import FOLDER, PART, RUN, Answer, load_answer

_MOST_PARTS = 6


@dataclass(frozen=True)
class Seen:
    """A comparison as a test's items saw it: where it is, and which parts failed so far."""

    file: Path
    section: str
    folder: Path
    failed: list[str] = field(default_factory=list)


class Summary:
    """A line at the end about all comparisons; baselines and a workflow's step summary where they are wanted."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._seen: dict[tuple[Path, str], Seen] = {}
        self._lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note which comparison a test looked at; the note comes along from a worker."""
        noted = dict(report.user_properties)
        if report.when == "call" and FOLDER in noted:
            file, section = self._config.rootpath / report.nodeid.split("::")[0], str(noted[RUN])
            seen = self._seen.setdefault((file, section), Seen(file, section, Path(str(noted[FOLDER]))))
            if report.failed:
                seen.failed.append(str(noted[PART]))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Read the comparisons before pytest may remove them, and write what is to be kept of them."""
        if not self._seen:
            return
        answers = {folder: load_answer(folder) for folder in dict.fromkeys(seen.folder for seen in self._seen.values())}
        said = self._record(answers) if self._config.getoption("parity_record") else self._better(answers)
        self._lines = [_overall(list(answers.values())), *said]
        try:
            _append_step_summary(list(self._seen.values()), answers)
        except (OSError, UsageError) as error:
            self._lines.append(f"no step summary: {error}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say how the comparisons went, where the reports are and what changed since the baseline."""
        for line in self._lines:
            terminalreporter.write_line(f"parity: {line}")

    def _record(self, answers: dict[Path, Answer]) -> Iterable[str]:
        from parity.testing import baseline

        for file in dict.fromkeys(seen.file for seen in self._seen.values()):
            sections = {
                seen.section: comparison.sites
                for seen in self._seen.values()
                if seen.file == file
                and (comparison := answers[seen.folder].comparison) is not None
                and (not seen.failed or self._config.getoption("parity_record_failing"))
            }
            failing = sorted({s.section for s in self._seen.values() if s.file == file} - sections.keys())
            if failing:
                yield f"not recorded, because it fails: {', '.join(failing)}; --parity-record-failing stores it too"
            if sections:
                baseline.save(baseline.path_for(file), sections)
                yield f"recorded {baseline.path_for(file).name} ({', '.join(sorted(sections))})"

    def _better(self, answers: dict[Path, Answer]) -> Iterable[str]:
        from parity.testing import baseline

        for seen in self._seen.values():
            comparison = answers[seen.folder].comparison
            old = _baseline(seen.file).get(seen.section, {})
            new = {m.site: m.ratio for m in comparison.sites if m.ratio is not None} if comparison else {}
            better = [site for site in old if site in new and baseline.is_worse(old[site], new[site])]
            if better:
                first = f"{better[0]} {old[better[0]]:.3g} -> {new[better[0]]:.3g}"
                count = f"{len(better)} site{'s' * (len(better) > 1)}"
                yield f"{seen.section}: {count} better than the baseline ({first}); keep it with --parity-record"


def _baseline(file: Path) -> dict[str, dict[str, float]]:
    from parity.testing import baseline

    try:
        return baseline.load(baseline.path_for(file))
    except UsageError:
        return {}  # a test has said so


def _overall(answers: list[Answer]) -> str:
    """All comparisons in one line, with the report of the worst."""
    from parity.report.text import visible
    from parity.testing.acceptance import worst
    from parity.words import in_regimes

    made = [(a, a.comparison) for a in answers if a.comparison is not None]
    if not made:
        more = f" (and {len(answers) - 1} more)" if len(answers) > 1 else ""
        return f"nothing was compared: {answers[0].trouble}{more}"
    counts = {v: sum(c.verdict == v for _, c in made) for v in ("match", "diverged", "inconclusive")}
    counts["not compared"] = len(answers) - len(made)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    said += "".join(dict.fromkeys(visible(in_regimes(c)) for _, c in made))
    ranked = [(w.ratio or 0.0, w.site, a) for a, c in made if (w := worst(c.sites)) is not None]
    if not ranked:
        return f"{said}; no site was measured; report: {made[0][0].page}"
    ratio, site, answer = max(ranked, key=lambda r: r[0])
    return f"{said}; worst ratio {ratio:.3g} at {site}; report: {answer.page}"


def _append_step_summary(all_seen: list[Seen], answers: dict[Path, Answer]) -> None:
    """In a workflow of GitHub: a line for each comparison, and the reports of those with a failed test."""
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return
    from parity.report.markdown import append_step_summary

    lines = [_markdown(seen, answers[seen.folder]) for seen in all_seen]
    with Path(name).open("a", encoding="utf-8") as stream:
        stream.write("\n".join(["", "### parity", "", *lines, ""]))
    for folder in dict.fromkeys(seen.folder for seen in all_seen if seen.failed):
        comparison = answers[folder].comparison
        if comparison is not None:
            append_step_summary(comparison)


def _markdown(seen: Seen, answer: Answer) -> str:
    """One comparison as an item of a list."""
    from parity.report.markdown import code, escape
    from parity.testing.acceptance import worst
    from parity.words import in_regimes

    c = answer.comparison
    sign = "❌" if seen.failed else "✅" if c is not None and c.verdict == "match" else "⚠️"
    start = f"- {sign} {code(f'{seen.file.name}::{seen.section}')}:"
    if c is None:
        return f"{start} nothing was compared: {escape(answer.trouble)}"
    site = worst(c.sites)
    ratio = f", worst ratio {site.ratio:.3g} at {code(site.site)}" if site is not None else ""
    more = f" and {len(seen.failed) - _MOST_PARTS} more" if len(seen.failed) > _MOST_PARTS else ""
    failed = f"; failed: {', '.join(map(escape, seen.failed[:_MOST_PARTS]))}{more}" if seen.failed else ""
    return f"{start} {c.verdict}{escape(in_regimes(c))}{ratio}{failed}"
