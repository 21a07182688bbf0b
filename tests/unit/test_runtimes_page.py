"""The page of runtimes has a section for each kind of candidate and port, with the commands that the bench runs."""

from __future__ import annotations

import re

import pytest

from parity.candidates.base import KINDS
from tests.bench.runtimes import FILES, PAGE, RUNTIMES, Runtime, section


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.title)
def test_the_page_shows_every_command_and_what_it_printed(runtime: Runtime) -> None:
    (part,) = (p for p in PAGE.read_text().split("## ") if p.startswith(f"{runtime.title}\n"))
    assert runtime.about in part
    shown = [line.removeprefix("$ ") for line in part.splitlines() if line.startswith("$ ")]
    assert shown == [*([runtime.install] if runtime.install else []), *runtime.commands]
    diffs = [command for command in runtime.commands if command.startswith("parity diff")]
    assert len(re.findall(r"^(?:MATCH|DIVERGED)  ", part, re.MULTILINE)) == len(diffs)
    assert len(re.findall(r"sites \d+/\d+ measured", part)) == len(diffs)


def test_every_kind_of_candidate_is_run() -> None:
    commands = " ".join(command for runtime in RUNTIMES for command in runtime.commands)
    assert [kind for kind in KINDS if f"{kind}:" not in commands] == []
    assert {file for runtime in RUNTIMES for file in runtime.made} == FILES.keys()


def test_a_section_shows_commands_without_output_too() -> None:
    runtime = Runtime("Name", "About.", ("first", "second"), install="pip install it")
    expected = "## Name\n\nAbout.\n\n```\n$ pip install it\n$ first\n$ second\nMATCH\n```\n"
    assert section(runtime, {"first": "", "second": "MATCH"}) == expected
