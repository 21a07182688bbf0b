"""Bugs of many architectures, as ports have had them: is each found, and is its name right?

    python -m tests.bench.cases                 every case in both dtypes, as it is and as a port without taps
    python -m tests.bench.cases --only rope     cases whose name holds this

A case is a small random checkpoint and the transformers model with one bug, mostly a misread config. Every checkpoint
without its bug is run as well, and must match. Prints each run and the shares; exits with 1 if any name was wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from parity.candidates.base import open_candidate
from parity.compare.pipeline import diff
from parity.faults import CATALOGUE, Fault
from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.results import Comparison
from parity.run_spec import RunSpec
from tests.bench.case_list import ARCHITECTURES, CASES, SIZES, Case
from tests.checkpoints import randomize
from tests.planted.dumps import TAPS, dump_without

TOKENS = tuple((89 * i * i + 17 * i + 5) % 151 for i in range(72))
DTYPES = ("float32", "bfloat16")
# Shares of bugs named rightly that a release must reach.
NAMED = {"float32": 0.85, "bfloat16": 0.75}


def make(architecture: str, folder: Path) -> Path:
    """The checkpoint of an architecture, written once."""
    path = folder / architecture
    if not path.exists():
        given = SIZES | deepcopy(ARCHITECTURES[architecture])
        config = AutoConfig.for_model(architecture, **given)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(model, seed=7)
        model.save_pretrained(path)
    return path


def port(path: Path, dtype: str, case: Case | None = None) -> nn.Module:
    """The transformers model with the case's bug in it, or without any."""
    config = AutoConfig.from_pretrained(path)
    for name, value in (case.config if case else {}).items():
        setattr(config, name, deepcopy(value))
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    if case and case.change:
        case.change(model)
    return model


def compare(
    path: Path, model: nn.Module, dtype: str, taps: bool, folder: Path, faults: tuple[Fault, ...] = CATALOGUE
) -> Comparison:
    """The comparison of a port at all its sites, or at what its modules return alone; `faults` are tried."""
    run = RunSpec(find(str(path)), (TOKENS,), dtype, faults=faults, options=RunOptions(power=False))
    reference = Reference(run.model())
    if taps:
        return diff(run, open_candidate(model), reference=reference)
    dump = dump_without(_Plain(model), run, reference, folder / "dump.h5", TAPS)
    return diff(run, open_candidate(dump), reference=reference)


class _Plain(nn.Module):
    """A model under the names of its own modules, called with token ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules = model._modules
        self.__dict__["own"] = model

    def forward(self, ids: torch.Tensor) -> Any:
        """Logits and all else that the model returns, for ids (b, t)."""
        return self.__dict__["own"](input_ids=ids, use_cache=False)


def naming(case: Case, result: Comparison) -> str:
    """`right`, `tied` (the right name is among those that cannot be told apart), `wrong`, `unnamed` or `missed`."""
    if result.verdict != "diverged":
        return "missed"
    causes = [finding.fault for finding in result.findings]
    wrong = [c for c in causes if c and c.id not in case.names and not case.names & set(c.rivals)]
    if wrong:
        return "wrong"
    if any(cause is None for cause in causes):
        return "unnamed"
    return "right" if all(cause and cause.id in case.names for cause in causes) else "tied"


def run(cases: Sequence[Case], folder: Path, dtypes: Sequence[str] = DTYPES) -> list[tuple[str, str]]:
    """Every case in every way: its dtype and what became of its name. Prints each."""
    outcomes = []
    for case in cases:
        path = make(case.architecture, folder)
        for dtype in dtypes:
            for taps in (True, False):
                result = compare(path, port(path, dtype, case), dtype, taps, folder)
                said = "; ".join(dict.fromkeys(f.fault.id if f.fault else "unknown" for f in result.findings))
                outcomes.append((dtype, naming(case, result)))
                print(f"{case.id:22} {dtype:9} {'all sites' if taps else 'plain':9} {outcomes[-1][1]:8} {said}")
    return outcomes


def false_alarms(architectures: Sequence[str], folder: Path, dtypes: Sequence[str] = DTYPES) -> list[str]:
    """The checkpoints whose right port does not match, with the dtype and whether it is seen at all sites."""
    alarms = []
    for name in architectures:
        path = make(name, folder)
        for dtype in dtypes:
            for taps in (True, False):
                if compare(path, port(path, dtype), dtype, taps, folder).verdict == "diverged":
                    alarms.append(f"{name} {dtype} {'all sites' if taps else 'plain'}")
    return alarms


def main() -> None:
    """Run the cases and print the shares."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="cases whose name holds this")
    options.add_argument("--dtypes", nargs="*", default=DTYPES, choices=DTYPES)
    given = options.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        cases = [case for case in CASES if given.only in case.id]
        outcomes = run(cases, Path(name), given.dtypes)
        alarms = false_alarms(sorted({case.architecture for case in cases}), Path(name), given.dtypes)
    print(f"false alarms: {', '.join(alarms) or 'none'}")
    failed = bool(alarms)
    for dtype in given.dtypes:
        namings = [naming for of, naming in outcomes if of == dtype]
        right = sum(naming in ("right", "tied") for naming in namings) / len(namings)
        print(f"{dtype}: {len(namings)} runs, {right:.0%} named rightly, {namings.count('wrong')} wrongly")
        failed |= right < NAMED[dtype] or "wrong" in namings or "missed" in namings
    sys.exit(failed)


if __name__ == "__main__":
    main()
