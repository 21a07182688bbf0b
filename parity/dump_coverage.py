"""What `parity check` finds in a dump, family by family: plain data, as results are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SiteState = Literal["present", "missing", "misshapen", "ambiguous"]


@dataclass(frozen=True)
class FamilyCheck:
    """The sites of one family that are in the same state, and what that means for them."""

    family: str
    state: SiteState
    layers: tuple[int, ...]
    sites: int
    detail: str


@dataclass(frozen=True)
class DumpCheck:
    """What `parity check` knows of a dump.

    `unknown` are names that the reference does not have, `near` the site most like each that the dump does not have.
    """

    families: tuple[FamilyCheck, ...]
    unknown: tuple[str, ...]
    near: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether every site can be measured."""
        return all(f.state == "present" for f in self.families)
