"""Rows of a cache that no token of the run could have written: another prompt's, or what memory held before."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from parity.diagnose.workbench import Workbench
from parity.results import Finding
from parity.sites import CACHED

# Rows whose cosine is below this are not the same numbers rounded or scaled. Chosen.
_LIKE = 0.8
_VALUES = CACHED[1]  # keys turn with their position, values do not


def with_foreign_rows(finding: Finding, bench: Workbench) -> Finding:
    """A finding without a cause, with the rows of cached values that are like those of no token of the run."""
    names = [name for name in finding.sites if name.endswith(f".{_VALUES}")]
    if finding.fault is not None or not names:
        return finding
    with bench.piece(bench.reference.working.piece_of(names[0])) as at:
        if at is None:
            return finding
        right = bench.compute(at, names[:1], bench.reference.precise)[names[0]]
        tokens = foreign_rows(bench.candidate(at, names[0])[:, :, -1], right[:, :, -1])
    if not tokens:
        return finding
    which = ", ".join(map(str, tokens[:8])) + (" …" if len(tokens) > 8 else "")
    said = f"rows of tokens {which} are unlike the values of any token of this run, as those of another prompt are"
    return replace(finding, evidence=(*finding.evidence, said))


def foreign_rows(read: Tensor, right: Tensor) -> list[int]:
    """The tokens at which every head of values that were read is like no head of any token's right ones.

    Both are (b, g, t, d). Rows of zeros are like nothing, and are not told.
    """
    mine, all_ = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (read, right.to(read.device)))
    nearest = (mine @ all_.reshape(-1, all_.shape[-1]).T).abs().amax(-1)  # (b, g, t)
    foreign = (nearest < _LIKE).all(1) & read.ne(0).any(-1).all(1)
    return torch.nonzero(foreign.any(0)).flatten().tolist()
