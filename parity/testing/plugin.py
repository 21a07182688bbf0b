"""The pytest plugin: it makes the items that `parity.testing.items` asks for, and compares once for each prompt.

Without such a test it does nothing. Nothing heavy is imported before one runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parity.errors import ModelError, ParityError, UsageError
from parity.testing.session import FOLDER, PART, RUN, Answer, Answers
from parity.testing.summary import Summary

if TYPE_CHECKING:
    from parity.results import Comparison
    from parity.testing.acceptance import Failure
    from parity.testing.items import Case, Port, Run


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
    """One item for each case of a port. Raises CollectError where none can be made."""
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
        node.user_properties += [(FOLDER, str(answer.folder)), (RUN, section), (PART, case.part)]
        trouble = answer.trouble or _misfit(case, answer)
        if trouble:
            _report_once(answer.folder, node.nodeid, trouble, skip=answer.no_model and case.skip_missing)
        elif text := _judge(case, answer, node, bool(request.config.getoption("parity_record"))):
            pytest.fail(text, pytrace=False)

    return check


def _report_once(folder: Path, nodeid: str, trouble: str, *, skip: bool) -> None:
    """Fail the item that comes first, skip the others: one problem is reported once."""
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
    assert c is not None, "unreachable because trouble was reported before"
    worst = acceptance.worst(acceptance.split(c.sites).get(case.part, []))
    if worst is not None and worst.ratio is not None:
        node.user_properties += [("parity_worst_ratio", f"{worst.ratio:.3g}"), ("parity_worst_site", worst.site)]
    known = {} if record else baseline.load(baseline.path_for(node.path))
    failed = acceptance.failures(case.part, c, case.settings, known.get(_section(node, case.run), {}))
    if not failed:
        return ""
    lines = acceptance.explain(failed, c, answer.page)
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
