"""Readings: what a candidate computes where no known bug fits, estimated from what it recorded."""

from __future__ import annotations

from parity.diagnose.read_experts import read_experts
from parity.diagnose.read_order import read_columns, read_ids, read_rows, read_siblings
from parity.diagnose.read_rope import read_rope
from parity.diagnose.read_rope_gap import read_rope_across
from parity.diagnose.read_weights import read_norm, read_offset
from parity.diagnose.trial import Case
from parity.faults import Fault

_READERS = (
    read_rope,
    read_rope_across,
    read_norm,
    read_rows,
    read_siblings,
    read_columns,
    read_ids,
    read_experts,
    read_offset,
)


def read(case: Case) -> list[Fault]:
    """The faults that are read off a site. Nothing is said of one whose operation cannot be read."""
    return [fault for reader in _READERS if (fault := reader(case)) is not None]
