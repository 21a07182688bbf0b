"""Candidates that run in a runtime of their own: a program in another process records them and answers with a dump.

So an engine that crashes is one line of text, and one whose versions clash with ours may live in another environment:
`?python=PATH` names its interpreter. The program needs numpy and the engine, not parity.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from parity.candidates.base import Candidate
from parity.candidates.tapping import tapping_check
from parity.dump import Dump, NameMap, RunInfo, open_dump, rename
from parity.errors import CandidateError
from parity.reference.checkpoint import Checkpoint
from parity.results import Check
from parity.run_spec import RunSpec
from parity.sites import Site

_PRODUCERS = Path(__file__).parent / "producers"
_FLOAT32 = 2.0**-24  # its unit roundoff


class Foreign(Candidate):
    """A file that a producer can run. A subclass names the program and the options with their values, default first."""

    kind: str
    program: str
    options: Mapping[str, tuple[str, ...]]

    def __init__(self, rest: str, options: Mapping[str, str], names: NameMap) -> None:
        chosen = {key: options.get(key, values[0]) for key, values in self.options.items()}
        self.name = f"{self.kind}:{rest}?{'&'.join(f'{key}={value}' for key, value in chosen.items())}"
        self._file, self._options, self._names = Path(rest), chosen, names
        self._python = options.get("python", sys.executable)
        self._checks: list[Check] = []
        self._check_options(options)
        if not self._file.is_file():
            raise CandidateError(f"candidate {self.kind}:{rest}: no such file. Give its path from {Path.cwd()}.")

    def _check_options(self, given: Mapping[str, str]) -> None:
        for key in given.keys() - {"python"} - self.options.keys():
            known = ", ".join([*self.options, "python"])
            raise CandidateError(f"candidate {self.name!r}: no option {key!r}. It has {known}.")
        for key, values in self.options.items():
            if self._options[key] not in values:
                known = ", ".join(values)
                raise CandidateError(f"candidate {self.name!r}: {key}={self._options[key]!r} is not one of {known}.")

    def said(self) -> RunInfo:
        """The dtype in which the engine computes."""
        return RunInfo(dtype="float32")

    def record(self, run: RunSpec, sites: Sequence[Site], path: Path) -> Dump:
        """Let the producer run the file twice, with taps and without. Raises CandidateError if it fails."""
        out, untapped = path.with_suffix(".npz"), path.with_suffix(".untapped.npy")
        request = {
            "file": str(self._file.resolve()),
            "token_ids": run.token_ids,
            "options": self._options,
            "out": str(out),
            "untapped": str(untapped),
        }
        self._produce(json.dumps(request))
        dump = rename(open_dump(out), self._names)
        tapped, plain = dump.read(sites[-1].name).astype(np.float64), np.load(untapped).astype(np.float64)
        moved = float(np.linalg.norm(tapped - plain) / np.linalg.norm(plain))
        self._checks = [tapping_check(moved, _FLOAT32, len(dump.entries))]
        return dump

    def checks(self, checkpoint: Checkpoint) -> list[Check]:
        """Whether taps have changed the run."""
        return self._checks

    def _produce(self, request: str) -> None:
        command = [self._python, str(_PRODUCERS / self.program)]
        try:
            done = subprocess.run(command, input=request, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise CandidateError(f"candidate {self.name!r}: python={self._python}: {error.strerror}.") from error
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            code = done.returncode
            how = f"crashed with {signal.Signals(-code).name}" if code < 0 else "failed"
            raise CandidateError(f"candidate {self.name!r}: its runtime {how}: {said[-1][:400]}")


class Gguf(Foreign):
    """`gguf:FILE?kv=f32&fa=off`: a Qwen3 in llama.cpp, on the CPU.

    `kv` is the type of the cache, `fa` flash attention. llama.cpp's own defaults, kv=f16 and fa=on, round keys, values
    and products of attention to float16; those here are the ones that compute in float32.
    """

    kind = "gguf"
    program = "run_gguf.py"
    options = {"kv": ("f32", "f16", "q8_0"), "fa": ("off", "on")}  # noqa: RUF012 - nobody writes to it
    not_observable = frozenset({"model.layers.*.mlp.act_fn"})
