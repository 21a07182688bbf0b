"""From one report to the next: what is fixed, new, worse, better, and what can no longer be said."""

from __future__ import annotations

import dataclasses
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from parity.report.changes import changes, show
from parity.report.changes_page import render_changes
from parity.results import Comparison, SiteVerdict
from tests import goldens
from tests.report_example import EVIL, environment, everything, hostile, matching, measurement

VERDICTS: tuple[SiteVerdict, ...] = ("exact", "rounding", "imprecise", "wrong", "nonfinite", "unmeasured")


def run(*sites: tuple[str, SiteVerdict, float | None]) -> Comparison:
    return dataclasses.replace(matching(), sites=tuple(measurement(*site) for site in sites))


def printed(old: Comparison, new: Comparison) -> str:
    stream = io.StringIO()
    show(changes(old, new), Console(file=stream, width=80, highlight=False))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (("rounding", 1.0), ("wrong", 541.0), "new"),
        (("wrong", 541.0), ("exact", 1.0), "fixed"),
        (("imprecise", 3.0), ("wrong", 3.0), "worse"),
        (("nonfinite", None), ("wrong", 3.0), "better"),
        (("wrong", 100.0), ("wrong", 151.0), "worse"),
        (("wrong", 100.0), ("wrong", 149.0), None),
        (("wrong", 151.0), ("wrong", 100.0), "better"),
        (("rounding", 0.5), ("rounding", 1.9), None),
        (("rounding", 1.0), ("rounding", 2.5), "worse"),
        (("exact", 1.0), ("rounding", 1.0), None),
        (("wrong", 541.0), ("unmeasured", None), "lost"),
        (("rounding", 1.0), ("unmeasured", None), "lost"),
        (("unmeasured", None), ("wrong", 541.0), "new"),
        (("unmeasured", None), ("rounding", 1.0), None),
        (("wrong", float("nan")), ("wrong", 1.0), None),
        (("wrong", float("inf")), ("wrong", float("inf")), None),
    ],
)
def test_what_a_change_is_called(
    before: tuple[SiteVerdict, float | None], after: tuple[SiteVerdict, float | None], kind: str | None
) -> None:
    found = changes(run(("m.layers.0.a", *before)), run(("m.layers.0.a", *after)))
    assert [c.kind for c in found.changes] == ([kind] if kind else [])
    assert found.is_worse == (kind in ("new", "worse", "lost"))


def test_a_site_that_is_gone_is_not_fixed() -> None:
    found = changes(run(("m.layers.0.a", "wrong", 9.0), ("lm_head", "exact", 1.0)), run(("lm_head", "exact", 1.0)))
    (change,) = found.changes
    assert (change.kind, change.before, change.after) == ("lost", "wrong 9.00x", "absent")


def test_sites_of_a_family_that_changed_alike_are_one_change() -> None:
    old = run(*((f"m.layers.{i}.a", "rounding", 1.0) for i in range(4)))
    new = run(*((f"m.layers.{i}.a", "wrong" if i else "rounding", 10.0 * i or 1.0) for i in range(4)))
    (change,) = changes(old, new).changes
    assert (change.family, change.layers) == ("m.layers.*.a", (1, 2, 3))
    assert (change.before, change.after) == ("rounding 1.00x", "wrong 30x")


SITES = st.lists(
    st.tuples(
        st.sampled_from(["m.layers.0.a", "m.layers.1.a", "m.b"]), st.sampled_from(VERDICTS), st.floats(min_value=0)
    ),
    unique_by=lambda site: site[0],
)


@given(SITES, SITES)
def test_the_way_back_is_the_way_forth_reversed(
    a: list[tuple[str, SiteVerdict, float]], b: list[tuple[str, SiteVerdict, float]]
) -> None:
    old, new = run(*a), run(*b)
    forth, back = changes(old, new), changes(new, old)
    for kind, reverse in (("worse", "better"), ("better", "worse")):
        assert {s for c in forth.of(kind) for s in c.sites} == {s for c in back.of(reverse) for s in c.sites}  # type: ignore[arg-type]
    fixed = {s for c in forth.of("fixed") for s in c.sites}
    assert fixed <= {s for c in back.of("new") for s in c.sites}
    assert not changes(old, old).changes
    counted = [s for c in forth.changes for s in c.sites]
    assert len(counted) == len(set(counted)), "no site changes in two ways"


def test_text() -> None:
    bad = everything()
    other = dataclasses.replace(matching(), environment=environment(working_dtype="float16", prompt="else"))
    goldens.check("changes-new.txt", printed(matching(), bad))
    goldens.check("changes-fixed.txt", printed(bad, other))
    goldens.check("changes-none.txt", printed(bad, bad))


def test_names_stay_text_and_lines_short() -> None:
    text = printed(hostile(), everything()) + printed(everything(), hostile())
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("sides", [(matching(), everything()), (hostile(), hostile())], ids=["new", "hostile"])
def test_the_page_has_each_change_and_runs_nothing(sides: tuple[Comparison, Comparison]) -> None:
    found = changes(*sides)
    page = render_changes(sides, found)
    assert page.count('<article class="finding">') == len(found.changes)
    assert "<script" not in page
    assert EVIL not in page
    for change in found.changes:
        assert change.after in page
