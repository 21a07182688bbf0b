"""A prompt's token ids, by the checkpoint's own tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parity.candidates.tokens import padding_remark, token_check
from parity.dump import RunInfo
from parity.errors import UsageError
from parity.reference.checkpoint import EMBEDDED, Checkpoint, find
from parity.reference.tokenizer import tokenize

TEXT = "The capital of France is"


def test_a_chat_is_the_prompt_in_the_template(chatting: Checkpoint) -> None:
    assert tokenize(chatting, TEXT, chat=True).ids == tokenize(chatting, f"<user>{TEXT}<bot>").ids
    assert tokenize(chatting, TEXT).ids == tokenize(find(EMBEDDED), TEXT).ids


def test_no_chat_without_a_template() -> None:
    with pytest.raises(UsageError, match=r"has no chat template\. Leave --chat out\."):
        tokenize(find(EMBEDDED), TEXT, chat=True)


def test_a_template_that_fails_is_one_line(chatting: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(chatting.path, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    broken = {"chat_template": "{{ raise_exception('first\\nsecond') }}"}
    path.write_text(json.dumps(json.loads(path.read_text()) | broken))
    with pytest.raises(UsageError, match=r"its chat template fails: first second\. Leave --chat out\."):
        tokenize(find(str(tmp_path / "model")), TEXT, chat=True)


def test_a_tokenizer_that_is_broken_or_absent_is_named_as_such(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"its tokenizer cannot be loaded: .*--tokens"):
        tokenize(find(str(tmp_path / "model")), TEXT)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"has no tokenizer \(found: README\.md, config\.json"):
        tokenize(find(str(tmp_path / "model")), TEXT)


def test_the_ids_of_a_dump_are_checked_against_its_prompt(chatting: Checkpoint, small: Path) -> None:
    own = tokenize(chatting, TEXT).ids
    chat = tokenize(chatting, TEXT, chat=True).ids

    def check(*ids: int, checkpoint: Checkpoint = chatting) -> tuple[bool, str] | None:
        found = token_check(RunInfo(prompt=TEXT, token_ids=(ids,)), checkpoint)
        return None if found is None else (found.ok, found.detail)

    assert check(*own) == (True, "those of the tokenizer")
    assert check(*chat) == (True, "those of the tokenizer, among others (of a chat template?)")
    assert check(*own[:-1], 3) == (
        False,
        f"tokenizers give other ids for this prompt: position {len(own) - 1} has 3, expected {own[-1]}",
    )
    assert check(*own, checkpoint=find(str(small))) is None, "it has no tokenizer"
    assert token_check(RunInfo(token_ids=(own,)), chatting) is None
    assert token_check(RunInfo(prompt=TEXT), chatting) is None


UNMASKED = "pad ids (0): read as text, for want of parity.attention_mask"


@pytest.mark.parametrize(
    ("rows", "pad", "detail"),
    [
        (
            ((5, 6, 7, 8), (0, 0, 5, 6)),
            0,
            f"row 1 begins in 2 {UNMASKED}",
        ),
        (
            ((5, 0, 0, 0), (5, 6, 7, 8)),
            0,
            f"row 0 ends in 3 {UNMASKED}",
        ),
        (((5, 6, 7, 0), (0, 6, 7, 8)), 0, None),  # one may be a mark of the tokenizer's
        (((5, 0, 0, 6),), 0, None),
        (((5, 0, 0, 0),), None, None),
    ],
)
def test_ids_that_look_padded_are_remarked(tmp_path: Path, small: Path, rows: Any, pad: Any, detail: Any) -> None:
    shutil.copytree(small, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": pad}))
    found = padding_remark(RunInfo(token_ids=rows), find(str(tmp_path / "model")))
    assert (None if found is None else (found.ok, found.detail)) == (None if detail is None else (True, detail))


@pytest.mark.parametrize("agreed", [False, True])
def test_code_of_a_checkpoint_runs_only_if_asked(checkpoint: Callable[..., Path], tmp_path: Path, agreed: bool) -> None:
    """And nobody is asked on standard input, where there may be nobody."""
    from parity.errors import ModelError
    from parity.reference.pieces import PiecewiseModel

    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3", layers=2), folder)
    config = json.loads((folder / "config.json").read_text())
    foreign = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config | foreign))
    (folder / "mine.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'it-ran')!r}).touch()\n"
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class MineConfig(Qwen3Config):\n    model_type = 'mine'\n"
        "class Mine(Qwen3ForCausalLM):\n    config_class = MineConfig\n"
    )
    found = find(str(folder), trust_remote_code=agreed)
    if agreed:
        import torch

        assert PiecewiseModel(found, torch.float32).config.hidden_size == 80
    else:
        import torch

        with pytest.raises(
            ModelError, match=r"wants Python code that the checkpoint brings along .*--trust-remote-code"
        ):
            PiecewiseModel(found, torch.float32)
    assert (tmp_path / "it-ran").exists() == agreed
