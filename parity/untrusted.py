"""What comes from outside: JSON that is bounded, and files that are files. Nothing of it may hang or grow."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from parity.errors import DumpError

DEEPEST = 32  # levels of nesting: the deepest of ours are 3


def parse_json(text: str | bytes, *, unique: bool = True) -> Any:
    """The value of a JSON text. Raises ValueError, too if it nests deeply or a `unique` table repeats a key."""
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level for inner in _children(outer) if isinstance(inner, dict | list)]
        if not level:
            return value
    raise ValueError(f"nested more than {DEEPEST} deep")


def require_content(path: Path) -> None:
    """Raise DumpError unless `path` is a file with something in it."""
    if not path.exists():
        raise DumpError(f"{path}: does not exist — no such file — check the name, or record the run first")
    if what := what_is_no_file(path):
        raise DumpError(f"{path}: is {what} — expected a file — name a file that holds the dump")
    if path.stat().st_size == 0:
        raise DumpError(f"{path}: is an empty file — 0 bytes — record the run again")


def what_is_no_file(path: Path) -> str:
    """What a path is that cannot be read as a file; empty where it is one, or is nothing.

    Opening a FIFO waits for ever, and a device may have no end.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return ""
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key stand twice, and the last one wins: here it would hide a tensor."""
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r:.60} is there twice")
    return table
