"""Several calls of one model: dumps that hold them, and modules that are run so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity.candidates.base import dump_file, open_candidate
from parity.compare.pipeline import diff
from parity.dump import open_dump, write_safetensors
from parity.dump.calls import call_name
from parity.errors import IncomparableError
from parity.options import RunOptions
from parity.results import Comparison
from parity.run_spec import RunSpec, run_spec

TOKENS = tuple((97 * i * i + 31 * i + 7) % 200 for i in range(13))


def ask(path: Path, dtype: str = "bfloat16", **options: Any) -> RunSpec:
    options = {"power": False, "dtype": dtype, "tokens": " ".join(map(str, TOKENS)), **options}
    return run_spec(RunOptions(model=str(path), **options))


def parts(array: np.ndarray[Any, Any], axis: int, calls: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    return np.split(array, np.cumsum(calls)[:-1], axis=axis)


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of one pass over all tokens."""
    path = tmp_path_factory.mktemp("whole") / "whole.h5"
    run = ask(small)
    open_candidate("impl.qwen3:load").record(run, run.model().sites, path).close()
    return path


def in_calls(whole: Path, path: Path, calls: Sequence[int], keep: Sequence[int] | None = None) -> Path:
    """The same run as arrays of single calls; with `keep`, the arrays of those calls alone, as if they were all."""
    with open_dump(whole) as dump:
        tensors: dict[str, Any] = {}
        for site in dump.entries:
            array = dump.read(site)
            axis = array.shape.index(len(TOKENS))
            for i, part in enumerate(parts(array, axis, calls)):
                tensors[call_name(site, i) if keep is None else site] = part
        metadata = {"parity.token_ids": json.dumps(dump.info.token_ids), "parity.model": dump.info.model}
    if keep is None:
        metadata["parity.calls"] = json.dumps(calls)
    write_safetensors(path, tensors, metadata)
    return path


def compare(path: Path, dump: Path) -> Comparison:
    return diff(ask(path), dump_file(dump))


@pytest.mark.parametrize("calls", [(9, 1, 1, 1, 1), (5, 5, 3)])
def test_calls_in_a_dump_are_compared_with_one_pass(small: Path, whole: Path, tmp_path: Path, calls: Any) -> None:
    found = compare(small, in_calls(whole, tmp_path / "calls.safetensors", calls))
    expected = compare(small, whole)
    assert (found.verdict, found.coverage) == ("match", expected.coverage)
    assert found.sites == expected.sites


def test_the_last_step_alone_is_told_to_bring_the_others(small: Path, whole: Path, tmp_path: Path) -> None:
    step = in_calls(whole, tmp_path / "step.safetensors", (12, 1), keep=(1,))
    with pytest.raises(IncomparableError) as error:
        compare(small, step)
    assert "13 token ids but the arrays of one call on 1" in str(error.value)
    assert "Join the arrays of all calls" in str(error.value)
