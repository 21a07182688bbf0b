"""What options and dumps say of a batch with padding, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity.dump import ArchiveWriter, RunInfo, open_dump, write_safetensors
from parity.dump.safetensors import copy_as_safetensors
from parity.errors import DumpError, UsageError
from parity.options import RunOptions
from parity.preflight import check_options, parse_tokens

IDS, MASK, POSITIONS = [[5, 6, 7], [0, 8, 9]], [[1, 1, 1], [0, 1, 1]], [[0, 1, 2], [0, 0, 1]]
ARRAYS = {"lm_head": np.zeros((2, 3, 4), np.float32)}


def written(path: Path, **said: Any) -> Path:
    write_safetensors(path, ARRAYS, {f"parity.{key}": json.dumps(value) for key, value in said.items()})
    return path


def test_a_dump_says_its_mask_and_positions(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", token_ids=IDS, attention_mask=MASK, position_ids=POSITIONS)
    with open_dump(path) as dump:
        assert dump.info.attention_mask == ((1, 1, 1), (0, 1, 1))
        assert dump.info.position_ids == ((0, 1, 2), (0, 0, 1))


def test_they_may_be_tensors(tmp_path: Path) -> None:
    tensors = {**ARRAYS, "token_ids": np.array(IDS), "attention_mask": np.array(MASK, bool)}
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    with open_dump(tmp_path / "a.safetensors") as dump:
        assert dump.info.attention_mask == ((1, 1, 1), (0, 1, 1))
        assert list(dump.entries) == ["lm_head"]


def test_they_survive_parity_s_own_formats(tmp_path: Path) -> None:
    rows = (tuple(map(tuple, rows)) for rows in (IDS, MASK, POSITIONS))
    info = RunInfo(**dict(zip(("token_ids", "attention_mask", "position_ids"), rows, strict=True)))
    with ArchiveWriter(tmp_path / "a.h5", info) as writer:
        writer.add("lm_head", ARRAYS["lm_head"], ("batch", "token", "vocab"))
    with open_dump(tmp_path / "a.h5") as dump:
        assert dump.info == info
        copy_as_safetensors(dump, tmp_path / "b.safetensors")
    with open_dump(tmp_path / "b.safetensors") as dump:
        assert (dump.info.attention_mask, dump.info.position_ids) == (info.attention_mask, info.position_ids)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"attention_mask": MASK}, "attention_mask does not fit the token ids"),
        ({"token_ids": IDS, "attention_mask": MASK[:1]}, "attention_mask does not fit the token ids — 1 rows of 3"),
        ({"token_ids": IDS, "attention_mask": [[1, 1, 1], [0, 0, 0]]}, "has a row without text"),
        ({"token_ids": IDS, "attention_mask": [[1, 1, 1], [-9, 1, 1]]}, "attention_mask holds -9"),
        ({"token_ids": IDS, "position_ids": [[0, 1, 2], [-1, 0, 1]]}, "position_ids holds -1"),
    ],
)
def test_what_makes_no_sense_is_one_line(tmp_path: Path, said: Any, message: str) -> None:
    with pytest.raises(DumpError, match=message):
        open_dump(written(tmp_path / "a.safetensors", **said))


def test_prompts_are_the_rows_of_a_batch(tmp_path: Path) -> None:
    assert RunOptions(prompt=("one", "two three")).texts == ("one", "two three")
    assert RunOptions(prompt=("one",)).prompt == "one"
    (tmp_path / "prompts.txt").write_text("one\n\ntwo three\n")
    options = RunOptions(prompts=tmp_path / "prompts.txt", pad="right")
    assert options.texts == ("one", "two three")
    command = RunOptions(prompt=("one", "two three"), pad="right").command("port.py:load")
    assert command[-6:] == ["--prompt", "one", "--prompt", "two three", "--pad", "right"]


def test_rows_of_ids_may_be_of_several_lengths_if_they_are_padded() -> None:
    assert parse_tokens("1 2 3\n4 5", ragged=True) == ((1, 2, 3), (4, 5))
    assert RunOptions(tokens="1 2 3\n4 5", pad="left").token_ids == ((1, 2, 3), (4, 5))
    with pytest.raises(UsageError, match="Rows are equally long, or padded: give --pad left or"):
        parse_tokens("1 2 3\n4 5")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "one", "prompts": Path("x")}, "--prompt and --prompts both say what to run"),
        ({"prompt": ("one", "two"), "pad": "middle"}, "--pad 'middle': rows are padded on the left or on the right"),
        ({"prompt": "one", "pad": "left"}, "--pad fills up the shorter rows of a batch"),
        ({"prompt": ("one", "")}, "the prompt is empty"),
    ],
)
def test_options_that_make_no_sense_are_one_line(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_options(RunOptions(**given))


def test_an_empty_file_of_prompts_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n\n")
    with pytest.raises(UsageError, match="empty, no prompt to run"):
        check_options(RunOptions(prompts=tmp_path / "prompts.txt"))
