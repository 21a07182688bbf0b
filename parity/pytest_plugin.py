"""The pytest plugin: it makes the items that `parity.testing.cases` asks for, and compares once for each prompt.

Without such a test it does nothing. Nothing heavy is imported before one runs. Results travel between processes
as report.json in a folder of the session, so that pytest-xdist's workers share them.
"""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parity.errors import ModelError, ParityError, UsageError

if TYPE_CHECKING:
    from parity.acceptance import Failure
    from parity.results import Comparison
    from parity.testing import Case, Port, Run

_FOLDER = "parity_report"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --parity-record."""
    group = parser.getgroup("parity", "parity: ports of language models")
    group.addoption(
        "--parity-record",
        action="store_true",
        help="Write each site's measurement to FILE.baseline.txt beside the test file; later runs must not be worse.",
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
    from parity import baseline, settings, testing

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
    """Check one case of `parity.testing.cases`: `parity_check(parity_case)`."""

    def check(case: Case) -> None:
        __tracebackhide__ = True
        answer = _parity_answers.to(case.run)
        node = request.node
        node.user_properties.append((_FOLDER, str(answer.folder)))
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
    from parity.testing import compare

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
    from parity.acceptance import split
    from parity.sites import family

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
    from parity import acceptance, baseline

    c = answer.comparison
    assert c is not None, "unreachable because trouble was told before"
    worst = acceptance.worst(acceptance.split(c.sites).get(case.part, []))
    if worst is not None and worst.ratio is not None:
        node.user_properties += [("parity_worst_ratio", f"{worst.ratio:.3g}"), ("parity_worst_site", worst.site)]
    known = {} if record else baseline.load(baseline.path_for(node.path))
    failed = acceptance.failures(case.part, c, case.settings, known.get(_section(node.nodeid), {}))
    if not failed:
        return ""
    lines = acceptance.explain(failed, c)
    node.user_properties.append(("parity_finding", lines[0]))
    return "\n".join([*lines, *_footer(case.part, failed, answer, c)])


def _footer(part: str, failed: list[Failure], answer: Answer, c: Comparison) -> Iterable[str]:
    env = c.environment
    yield f"{part} of {env.candidate}: {len(failed)} failing, {env.working_dtype}, {env.tokens} tokens"
    yield f"report: {answer.page}"
    yield f"again:  {env.command}"


def _section(nodeid: str) -> str:
    """The part of an item's name that its baseline stands under: the test and its prompt, without the layer."""
    return nodeid.split("::", 1)[1].rpartition("-")[0] + "]"


# -- at the end ----------------------------------------------------------------------------------------------


class Summary:
    """One line at the end about all comparisons, and the baselines where they are to be recorded."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._answers: dict[tuple[Path, str], Path] = {}  # (test file, section): folder

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note which comparison a test looked at; the note comes along from a worker."""
        folder = dict(report.user_properties).get(_FOLDER)
        if report.when == "call" and isinstance(folder, str):
            file = self._config.rootpath / report.nodeid.split("::")[0]
            self._answers[file, _section(report.nodeid)] = Path(folder)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say how the comparisons went, where the reports are and what changed since the baseline."""
        if not self._answers:
            return
        answers = {folder: _load(folder) for folder in dict.fromkeys(self._answers.values())}
        terminalreporter.write_line(f"parity: {_overall(list(answers.values()))}")
        for line in self._record(answers) if self._config.getoption("parity_record") else self._better(answers):
            terminalreporter.write_line(f"parity: {line}")

    def _record(self, answers: dict[Path, Answer]) -> Iterable[str]:
        from parity import baseline

        for file in dict.fromkeys(file for file, _ in self._answers):
            sections = {
                section: comparison.sites
                for (other, section), folder in self._answers.items()
                if other == file and (comparison := answers[folder].comparison) is not None
            }
            if sections:
                baseline.save(baseline.path_for(file), sections)
                yield f"recorded {baseline.path_for(file).name} ({', '.join(sorted(sections))})"

    def _better(self, answers: dict[Path, Answer]) -> Iterable[str]:
        from parity import baseline

        for (file, section), folder in self._answers.items():
            comparison = answers[folder].comparison
            old = _baseline(file).get(section, {})
            new = {m.site: m.ratio for m in comparison.sites if m.ratio is not None} if comparison else {}
            better = [site for site in old if site in new and baseline.is_worse(old[site], new[site])]
            if better:
                first = f"{better[0]} {old[better[0]]:.3g} -> {new[better[0]]:.3g}"
                count = f"{len(better)} site{'s' * (len(better) > 1)}"
                yield f"{section}: {count} better than the baseline ({first}); keep it with --parity-record"


def _baseline(file: Path) -> dict[str, dict[str, float]]:
    from parity import baseline

    try:
        return baseline.load(baseline.path_for(file))
    except UsageError:
        return {}  # a test has said so


def _overall(answers: list[Answer]) -> str:
    """All comparisons in one line, with the report of the worst."""
    from parity.acceptance import worst

    made = [(a, a.comparison) for a in answers if a.comparison is not None]
    if not made:
        return f"nothing was compared: {answers[0].trouble}"
    ranked = [(w.ratio or 0.0, w.site, a) for a, c in made if (w := worst(c.sites)) is not None]
    counts = {v: sum(c.verdict == v for _, c in made) for v in ("match", "diverged", "inconclusive")}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    if not ranked:
        return f"{said}; no site was measured; report: {made[0][0].page}"
    ratio, site, answer = max(ranked, key=lambda r: r[0])
    return f"{said}; worst ratio {ratio:.3g} at {site}; report: {answer.page}"
