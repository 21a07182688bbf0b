"""The pytest plugin: it makes the items that `parity.testing.items` asks for, and compares once for each prompt.

Without such a test it does nothing. Nothing heavy is imported before one runs. Results travel between processes
as report.json in a folder of the session, so that pytest-xdist's workers share them.
"""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parity.errors import ModelError, ParityError, UsageError

if TYPE_CHECKING:
    from parity.results import Comparison
    from parity.testing.acceptance import Failure
    from parity.testing.items import Case, Port, Run

# Properties of an item: they tell the process that sums up, and JUnit's XML, what the item is a part of.
_FOLDER, _RUN, _PART = "parity_report", "parity_run", "parity_part"
_MOST_PARTS = 6


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --parity-record."""
    group = parser.getgroup("parity", "parity: ports of language models")
    group.addoption(
        "--parity-record",
        action="store_true",
        help="Write each site's measurement to FILE.baseline.txt beside the test file; later runs must not be worse.",
    )
    group.addoption(
        "--parity-record-failing",
        action="store_true",
        help="With --parity-record: of prompts that fail too, so that what is known to be wrong gets no worse.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect what is said at the end, but not in a worker."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Summary(config), "parity-summary")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item for each case of a port. What cannot be becomes an error of the collection."""
    port: Port | None = vars(metafunc.function).get("parity_port")
    if port is None:
        return
    from parity import settings
    from parity.testing import baseline
    from parity.testing import items as testing

    try:
        baseline.load(baseline.path_for(metafunc.definition.path))
        found = testing.expand(port, metafunc.definition.path.parent, settings.load(metafunc.config.rootpath))
        parameters = [pytest.param(case, id=f"{case.run.id}-{case.part}") for case in found]
    except ModelError as error:
        if port.missing != "skip":
            raise pytest.Collector.CollectError(_say(metafunc.definition.name, error)) from error
        parameters = [pytest.param(None, id="no-model", marks=pytest.mark.skip(reason=str(error)))]
    except ParityError as error:
        raise pytest.Collector.CollectError(_say(metafunc.definition.name, error)) from error
    metafunc.parametrize("parity_case", parameters)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Say where a port was found of which no items could be made."""
    if hasattr(getattr(item, "obj", None), "parity_port") and not hasattr(item, "callspec"):
        text = "pytest gives a unittest.TestCase no parameters. Put cases() into the module or a class of another kind."
        pytest.fail(f"{item.name}: {text}", pytrace=False)


def _say(name: str, error: Exception) -> str:
    return f"{name}: {error}"


@pytest.fixture(scope="session")
def _parity_answers(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Answers:
    base = tmp_path_factory.getbasetemp()
    # A worker's folder lies in the folder of the whole session.
    shared = base.parent if hasattr(request.config, "workerinput") else base
    return Answers(shared / "parity")


@pytest.fixture
def parity_check(request: pytest.FixtureRequest, _parity_answers: Answers) -> Callable[[Case], None]:
    """Check one case of `parity.testing.items`: `parity_check(parity_case)`."""

    def check(case: Case) -> None:
        __tracebackhide__ = True
        answer = _parity_answers.to(case.run)
        node = request.node
        section = _section(node, case.run)
        node.user_properties += [(_FOLDER, str(answer.folder)), (_RUN, section), (_PART, case.part)]
        trouble = answer.trouble or _misfit(case, answer)
        if trouble:
            _report_once(answer.folder, node.nodeid, trouble, skip=answer.no_model and case.skip_missing)
        elif text := _judge(case, answer, node, bool(request.config.getoption("parity_record"))):
            pytest.fail(text, pytrace=False)

    return check


# -- comparing -----------------------------------------------------------------------------------------------


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
            self._known[run.key] = _load(folder)
        return self._known[run.key]


def _make(run: Run, folder: Path) -> None:
    from parity.report import html
    from parity.report import json as report_json
    from parity.testing.items import compare

    try:
        # Whether a warning is an error is for tests to say, not for what a candidate does in its forward pass.
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            comparison = compare(run)
        (folder / "report.json").write_text(report_json.dumps(comparison), encoding="utf-8")
        (folder / "index.html").write_text(html.render(comparison), encoding="utf-8")
    except ParityError as error:
        (folder / "trouble.json").write_text(json.dumps([str(error), isinstance(error, ModelError)]), encoding="utf-8")
    except Exception as error:
        (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        text = f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:300]}. The traceback is in "
        (folder / "trouble.json").write_text(json.dumps([f"{text}{folder / 'traceback.txt'}", False]), encoding="utf-8")


def _load(folder: Path) -> Answer:
    from parity.report import json as report_json

    if (folder / "trouble.json").is_file():
        trouble, no_model = json.loads((folder / "trouble.json").read_text(encoding="utf-8"))
        return Answer(folder, None, trouble, no_model)
    return Answer(folder, report_json.load(folder / "report.json"))


def _report_once(folder: Path, nodeid: str, trouble: str, *, skip: bool) -> None:
    """Fail the item that comes first, skip the others: one problem is told once."""
    __tracebackhide__ = True
    first = folder / "told.txt"
    try:
        descriptor = os.open(first, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        told = first.read_text(encoding="utf-8")
    else:
        os.write(descriptor, nodeid.encode())
        os.close(descriptor)
        told = nodeid
    if skip:
        pytest.skip(trouble)
    if told != nodeid:
        pytest.skip(f"nothing was compared: see {told or 'the first of these tests'}")
    pytest.fail(trouble, pytrace=False)


# -- judging -------------------------------------------------------------------------------------------------


def _misfit(case: Case, answer: Answer) -> str:
    """Why the case cannot be asked of this comparison; empty if it can."""
    from parity.sites import family
    from parity.testing.acceptance import split

    assert answer.comparison is not None, "unreachable because there is a comparison where there is no trouble"
    sites = [m.site for m in answer.comparison.sites]
    try:
        case.settings.check_globs(sites, map(family, sites))
    except UsageError as error:
        return str(error)
    unasked = set(split(answer.comparison.sites)) - set(case.parts)
    if unasked:
        return f"the reference has {', '.join(sorted(unasked))}, of which config.json says nothing."
    return ""


def _judge(case: Case, answer: Answer, node: pytest.Item, record: bool) -> str:
    """Note the worst ratio and the first finding as properties, and say what fails."""
    from parity.testing import acceptance, baseline

    c = answer.comparison
    assert c is not None, "unreachable because trouble was told before"
    worst = acceptance.worst(acceptance.split(c.sites).get(case.part, []))
    if worst is not None and worst.ratio is not None:
        node.user_properties += [("parity_worst_ratio", f"{worst.ratio:.3g}"), ("parity_worst_site", worst.site)]
    known = {} if record else baseline.load(baseline.path_for(node.path))
    failed = acceptance.failures(case.part, c, case.settings, known.get(_section(node, case.run), {}))
    if not failed:
        return ""
    lines = acceptance.explain(failed, c)
    node.user_properties.append(("parity_finding", lines[0]))
    return "\n".join([*lines, *_footer(case, failed, answer, c)])


def _footer(case: Case, failed: list[Failure], answer: Answer, c: Comparison) -> Iterable[str]:
    env = c.environment
    yield f"{case.part} of {case.candidate}: {len(failed)} failing, {env.working_dtype}, {env.tokens} tokens"
    yield f"report: {answer.page}"
    yield f"again:  {env.command}"


def _section(node: pytest.Item, run: Run) -> str:
    """What a run's baseline stands under: the test and its prompt, without the layer."""
    return f"{node.nodeid.split('::', 1)[1].partition('[')[0]}[{run.id}]"


# -- at the end ----------------------------------------------------------------------------------------------


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
        if report.when == "call" and _FOLDER in noted:
            file, section = self._config.rootpath / report.nodeid.split("::")[0], str(noted[_RUN])
            seen = self._seen.setdefault((file, section), Seen(file, section, Path(str(noted[_FOLDER]))))
            if report.failed:
                seen.failed.append(str(noted[_PART]))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Read the comparisons before pytest may remove them, and write what is to be kept of them."""
        if not self._seen:
            return
        answers = {folder: _load(folder) for folder in dict.fromkeys(seen.folder for seen in self._seen.values())}
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
    from parity.testing.acceptance import worst

    made = [(a, a.comparison) for a in answers if a.comparison is not None]
    if not made:
        more = f" (and {len(answers) - 1} more)" if len(answers) > 1 else ""
        return f"nothing was compared: {answers[0].trouble}{more}"
    counts = {v: sum(c.verdict == v for _, c in made) for v in ("match", "diverged", "inconclusive")}
    counts["not compared"] = len(answers) - len(made)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
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

    c = answer.comparison
    sign = "❌" if seen.failed else "✅" if c is not None and c.verdict == "match" else "⚠️"
    start = f"- {sign} {code(f'{seen.file.name}::{seen.section}')}:"
    if c is None:
        return f"{start} nothing was compared: {escape(answer.trouble)}"
    site = worst(c.sites)
    ratio = f", worst ratio {site.ratio:.3g} at {code(site.site)}" if site is not None else ""
    more = f" and {len(seen.failed) - _MOST_PARTS} more" if len(seen.failed) > _MOST_PARTS else ""
    failed = f"; failed: {', '.join(map(escape, seen.failed[:_MOST_PARTS]))}{more}" if seen.failed else ""
    return f"{start} {c.verdict}{ratio}{failed}"
