"""A candidate that has run already: a dump that a port in any language wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from parity.candidates.base import Candidate
from parity.candidates.tokens import (
    padding_remark,
    require_same_model,
    require_same_padding,
    require_same_tokens,
    token_check,
)
from parity.dump import Array, Dump, NameMap, RunInfo, left_out, open_dump, rename
from parity.record.arrays import to_torch
from parity.reference.checkpoint import Checkpoint
from parity.results import Check
from parity.run_spec import DTYPES, RunSpec
from parity.sites import Site

_SAMPLE = 65536


class DumpFile(Candidate):
    """A recorded run on disk; `name` is its path."""

    in_calls = True
    pads = True

    def __init__(self, path: Path, names: NameMap) -> None:
        self.name = str(path)
        self._path, self._names, self.not_observable = path, names, left_out(names)

    def said(self) -> RunInfo:
        """What the dump says of its run; the dtype is what its numbers were made in, whatever they are stored in."""
        with self._open() as dump:
            return replace(dump.info, dtype=working_dtype(dump))

    def record(self, run: RunSpec, sites: Sequence[Site], path: Path) -> Dump:
        """The dump itself. Raises IncomparableError if it holds a run on other tokens or another checkpoint."""
        dump = self._open()
        try:
            require_same_model(dump, run.checkpoint)
            require_same_tokens(dump, run.token_ids)
            require_same_padding(dump, run.batch)
        except BaseException:
            dump.close()
            raise
        return dump

    def checks(self, checkpoint: Checkpoint) -> list[Check]:
        """Whether the dump's token ids are those of its prompt, and whether they look padded."""
        with self._open() as dump:
            found = (token_check(dump.info, checkpoint), padding_remark(dump.info, checkpoint))
        return [check for check in found if check is not None]

    def _open(self) -> Dump:
        dump = open_dump(self._path)
        return rename(dump, self._names) if self._names else dump


def working_dtype(dump: Dump) -> str:
    """The dtype that a dump's numbers were made in, read off their bits: most sites decide.

    A float32 dump of bfloat16 tensors holds only numbers that bfloat16 has.
    """
    kinds = [_grid(dump.read(site)) for site in dump.entries]
    return max(DTYPES, key=kinds.count)


def _grid(array: Array) -> str:
    """The narrowest working dtype that has all of (the first and last 64K) numbers of an array."""
    if array.dtype.name != "float32":
        return str(array.dtype.name)
    flat = array.reshape(-1)
    sample = to_torch(np.concatenate([flat[:_SAMPLE], flat[_SAMPLE:][-_SAMPLE:]]))
    sample = sample[sample.isfinite() & (sample != 0)]  # padding may hold anything
    narrow = [name for name in ("bfloat16", "float16") if bool((sample.to(DTYPES[name]).float() == sample).all())]
    return narrow[0] if narrow else "float32"
