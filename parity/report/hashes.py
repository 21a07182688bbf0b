"""Where the bits of two hashed runs part, as text."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from parity.hash_report import HashContrast, Parting
from parity.report.terminal import STYLES, line
from parity.report.text import plural, visible

_SHOWN = 6


def hash_headline(c: HashContrast) -> str:
    """What the verdict rests on."""
    known = c.same + len(c.parted)
    if c.parted:
        return f"other bits at {len(c.parted)} of {plural(known, 'site')}; the first is {_where(c.parted[0])}"
    if not known:
        return "no site is in both files"
    alone = len(c.only_first) + len(c.only_second)
    said = f"the same bits at {'all ' if not alone else ''}{plural(known, 'site')}"
    return f"{said}; {plural(alone, 'site')} in one file only" if alone else said


def hash_sentences(c: HashContrast) -> Iterator[str]:
    """What follows the headline, a sentence each."""
    yield f"first: {c.first}; second: {c.second}"
    yield from (f"the runs differ in their {difference}" for difference in c.differences)
    firsts = [p.first_token for p in c.parted if p.first_token is not None]
    if firsts:
        yield f"the first token with other bits is {min(firsts)}"
    for parting in c.parted[1:_SHOWN]:
        yield f"then {_where(parting)}"
    if len(c.parted) > _SHOWN:
        yield f"and {plural(len(c.parted) - _SHOWN, 'site')} more"
    for name, alone in (("first", c.only_first), ("second", c.only_second)):
        if alone:
            yield f"only the {name} has {', '.join(alone[:4])}{' …' if len(alone) > 4 else ''}"


def show_hashes(c: HashContrast, console: Console) -> None:
    """Print the verdict, and where the runs part."""
    line(console, Text.assemble((c.verdict.upper(), STYLES[c.verdict]), "  ", visible(hash_headline(c))))
    for sentence in hash_sentences(c):
        line(console, Text(visible(sentence)))


def _where(p: Parting) -> str:
    call = "" if p.call is None else f", call {p.call + 1}"
    if p.kinds:
        return f"{p.site}{call}: {p.kinds}"
    return f"{p.site}{call}: {p.rows} of {plural(p.of, 'row')}" + (f", from {p.place}" if p.place else "")
