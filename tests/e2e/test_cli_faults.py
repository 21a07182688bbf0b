"""`parity faults`: the whole catalogue, those about a word, or one explained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from parity.faults import CATALOGUE
from tests.conftest import ROOT, Ran

Cli = Callable[..., Ran]


def ids(ran: Ran) -> list[str]:
    return [line.split()[0] for line in ran.out.splitlines()]


def test_all_are_listed(cli: Cli) -> None:
    assert ids(cli("faults")) == [fault.id for fault in CATALOGUE]


def test_an_id_is_explained_though_it_is_part_of_others(cli: Cli) -> None:
    out = cli("faults", "rope-skipped").out
    assert out.startswith("rope-skipped\nwhat     no RoPE on queries and keys\n")
    assert "rope-skipped-q" not in out


def test_a_word_is_searched_for_in_id_title_and_fix(cli: Cli) -> None:
    found = ids(cli("faults", "pairs"))
    assert "rope-interleaved" in found
    assert "norm-eps" not in found
    by_any = {f.id for f in CATALOGUE if any("pairs" in text.lower() for text in (f.id, f.title, f.fix))}
    assert set(found) == by_any
    assert ids(cli("faults", "PAIRS")) == found
    assert [one["id"] for one in json.loads(cli("faults", "pairs", "--json").out)] == found


def test_a_word_of_one_fault_explains_it(cli: Cli) -> None:
    assert cli("faults", "gqa").out.startswith("gqa-tile\nwhat ")


def test_the_page_in_the_repository_is_current(cli: Cli) -> None:
    made = cli("faults", "--markdown").out
    assert (ROOT / "parity" / "faults" / "CATALOGUE.md").read_text(encoding="utf-8") == made, (
        "run `parity faults --markdown > parity/faults/CATALOGUE.md`"
    )
    assert [line[3:] for line in made.splitlines() if line.startswith("## ")] == [fault.id for fault in CATALOGUE]


def test_a_page_may_be_of_some(cli: Cli) -> None:
    made = cli("faults", "gqa-tile", "--markdown").out
    assert made.count("\n## ") == 1
    assert "\n- **Fix**: repeat each key/value head in place" in made


def test_a_word_of_none_is_an_error(cli: Cli) -> None:
    ran = cli("faults", "rope-interleaves")
    assert ran.code == 2
    assert "rope-interleaved" in ran.err


_IDLE = """
from contextlib import nullcontext
from parity.faults import Fault
FAULTS = (Fault(id="mine", title="title", sites=("act_fn",), fix="fix", patch=lambda scope, number: nullcontext(),
                applies=lambda scope: scope.layer is not None),)
"""


def test_a_fault_of_ones_own_that_changes_nothing_is_an_error(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(_IDLE)
    given = ("--faults", tmp_path / "mine.py:FAULTS", "--tokens", "5 17 3")
    for command in (("power",), ("diff", "--inject", "mine")):
        ran = cli(*command, *given)
        assert ran.code == 2
        assert "'mine' changes nothing at act_fn" in ran.err
