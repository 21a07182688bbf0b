"""`parity show` on a recording: the logit lens, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import parity
from parity.dump import copy_as_safetensors, open_dump
from parity.errors import IncomparableError, UsageError
from parity.show.lens import logit_lens
from tests.conftest import Ran

TOKENS = "5 17 3 120 44"


@pytest.fixture(scope="module")
def recorded(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("show") / "ref.h5"
    parity.record(path, model=str(small), tokens=TOKENS, dtype="float32", inner=True)
    return path


def test_the_lens_ends_with_what_the_model_says(recorded: Path, small: Path) -> None:
    with open_dump(recorded) as dump:
        lines = logit_lens(dump, str(small))
        logits = np.asarray(dump.read("lm_head"), dtype=np.float64)[0, -1]
    assert [line.site for line in lines] == ["model.embed_tokens", "model.layers.0", "model.layers.1"]
    shares = np.exp(logits - logits.max())
    assert lines[-1].text == f"[{logits.argmax()}]"
    assert lines[-1].share == pytest.approx(shares.max() / shares.sum(), rel=1e-4)
    assert (lines[-1].rank, lines[-1].nats) == (1, 0.0)
    assert lines[0].nats > 1e-3


def test_a_lens_of_another_model_or_of_nothing_is_refused(
    recorded: Path, checkpoint: Callable[..., Path], small: Path, tmp_path: Path
) -> None:
    with open_dump(recorded) as dump:
        with pytest.raises(IncomparableError, match="other weights"):
            logit_lens(dump, str(checkpoint("qwen3", layers=2, tied=True)))
        dump.entries.pop("model.layers.1")
        with pytest.raises(UsageError, match=r"does not hold model.layers.1"):
            logit_lens(dump, str(small))


@pytest.mark.slow
def test_the_command(recorded: Path, small: Path, cli: Callable[..., Ran], tmp_path: Path) -> None:
    with open_dump(recorded) as dump:
        copy_as_safetensors(dump, tmp_path / "copy.safetensors")
    ran = cli("show", recorded, "probs", "--against", tmp_path / "copy.safetensors", "--model", small, "--out", "page")
    assert ran.code == 0
    assert "model.layers.1" in ran.out
    assert "page/index.html" in ran.out
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("<svg") == 4, "two of each site"
    assert "Logit lens" in page
    found = json.loads(cli("show", recorded, "model.layers.1.self_attn.probs", "--json").out)
    assert len(found["views"][0]["heads"]) == found["views"][0]["statistics"]["shape"][1]
    wrong = cli("show", recorded, "nothing")
    assert wrong.code == 2
    assert "has no site 'nothing'" in wrong.err
