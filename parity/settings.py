"""`[tool.parity]` of pyproject.toml: which limits hold at which sites. Reads text only, loads no library.

[tool.parity]
allow_unmeasured = ["*.self_attn.context"]
accept = ["attention-operands-fp16"]     # precision regimes that are no fault

[tool.parity.thresholds]        # ordered: the last glob that matches a site decides
"*.mlp.*" = { ratio = 4 }
lm_head = { mse = 1e-3, cosine = 0.999 }
next_token = { kl = 0.01 }
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from parity.columns import BY_KEY, LIMITED
from parity.errors import UsageError

NEXT_TOKEN = "next_token"
SITE_KEYS = tuple(column.key for column in LIMITED)
TOKEN_KEYS = ("kl",)
KEYS = ("accept", "allow_unmeasured", "thresholds")


@dataclass(frozen=True)
class Limits:
    """The numbers that hold where `glob` matches: maxima, and minima where a larger number is the better one.

    Without any number the verdict decides, as where no glob matches.
    """

    glob: str
    numbers: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Settings:
    """What a site must hold to pass, which sites need not be measured, and which precision regimes are no fault."""

    thresholds: tuple[Limits, ...] = ()
    allow_unmeasured: tuple[str, ...] = ()
    accept: tuple[str, ...] = ()

    def limits(self, site: str) -> tuple[tuple[str, float], ...]:
        """The numbers of the last glob that matches; none if the verdict decides."""
        return next((t.numbers for t in reversed(self.thresholds) if fnmatchcase(site, t.glob)), ())

    def may_be_unmeasured(self, site: str) -> bool:
        """Whether a site without a measurement is accepted."""
        return any(fnmatchcase(site, glob) for glob in self.allow_unmeasured)

    def and_then(self, other: Settings) -> Settings:
        """Both, `other` being looked at last and therefore winning."""
        return Settings(
            self.thresholds + other.thresholds,
            self.allow_unmeasured + other.allow_unmeasured,
            self.accept + other.accept,
        )

    def check_globs(self, sites: Sequence[str], names: Iterable[str]) -> None:
        """Raise UsageError for a glob that matches no site. `names` are what a misspelt one may have meant."""
        for glob in [t.glob for t in self.thresholds if t.glob != NEXT_TOKEN] + list(self.allow_unmeasured):
            if not any(fnmatchcase(site, glob) for site in sites):
                meant = _meant(glob, [*dict.fromkeys(names), NEXT_TOKEN])
                raise UsageError(f"{glob!r}: matches none of the {len(sites)} sites.{meant}")


def load(root: Path) -> Settings:
    """The settings in root/pyproject.toml; none if there is no such file or table. Raises UsageError."""
    path = root / "pyproject.toml"
    if not path.is_file():
        return Settings()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("parity", {})
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as TOML ({error}). Correct it.") from error
    where = f"{path.name} [tool.parity]"
    for key in table:
        if key not in KEYS:
            raise UsageError(f"{where}: unknown key {key!r}.{_meant(key, KEYS)} Known keys: {', '.join(KEYS)}.")
    accept = table.get("accept", [])
    if not isinstance(accept, list) or not all(isinstance(id, str) and id for id in accept):
        raise UsageError(f"{where}: accept is {accept!r}. Give a list of regimes, such as ['kv-cache-fp16'].")
    found = parse(table.get("thresholds", {}), table.get("allow_unmeasured", ()), where)
    return replace(found, accept=tuple(accept))


def parse(thresholds: Mapping[str, Any], allow_unmeasured: Sequence[str], where: str) -> Settings:
    """Settings from plain values; `where` is what an error names as their place. Raises UsageError."""
    if not isinstance(thresholds, Mapping):
        raise UsageError(f"{where}: thresholds is {thresholds!r}. Give a table such as {{'*.mlp.*': {{'ratio': 4}}}}.")
    if isinstance(allow_unmeasured, str) or not all(isinstance(glob, str) for glob in allow_unmeasured):
        raise UsageError(f"{where}: allow_unmeasured is {allow_unmeasured!r}. Give a list of globs.")
    limits = tuple(_limits(glob, numbers, f"{where} threshold {glob!r}") for glob, numbers in thresholds.items())
    return Settings(limits, tuple(allow_unmeasured))


def _limits(glob: str, numbers: Any, where: str) -> Limits:
    known = TOKEN_KEYS if glob == NEXT_TOKEN else SITE_KEYS
    if not isinstance(numbers, Mapping):
        raise UsageError(f"{where}: is {numbers!r}. Give a table such as {{ {known[0]} = 1 }}.")
    for key, value in numbers.items():
        if key not in known:
            raise UsageError(f"{where}: {_unknown(key, value, known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= _least(key):
            raise UsageError(f"{where}: {key} is {value!r}. Give a number, not negative.")
    return Limits(glob, tuple((key, float(value)) for key, value in numbers.items()))


def _least(key: str) -> float:
    return BY_KEY[key].least if key in BY_KEY else 0.0


def _unknown(key: str, value: Any, known: Sequence[str]) -> str:
    if isinstance(value, Mapping):
        return f"holds another table, {key!r}. Put a site's name in quotes: otherwise TOML reads its dots as tables."
    if key in TOKEN_KEYS:
        return f"{key!r} is known of {NEXT_TOKEN} alone. Write it under {NEXT_TOKEN}."
    return f"unknown key {key!r}.{_meant(key, known)} Known keys: {', '.join(known)}."


def _meant(word: str, words: Sequence[str]) -> str:
    close = get_close_matches(word, words, n=1, cutoff=0.4)
    return f" Did you mean {close[0]!r}?" if close else ""
