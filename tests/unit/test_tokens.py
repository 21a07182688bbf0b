"""Other tokens are the cheapest of all bugs, and are named as what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parity.candidates.tokens import difference, require_same_model, require_same_tokens
from parity.dump import Dump, RunInfo
from parity.errors import IncomparableError
from parity.reference.checkpoint import EMBEDDED, find
from parity.reference.tokenizer import PromptIds


def dump(**info: object) -> Dump:
    return Dump(Path("port.h5"), RunInfo(**info), {}, lambda _site: np.zeros(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("own", "theirs", "said"),
    [
        ((1, 7, 8), (7, 8), "the ids carry no BOS (1), the tokenizer adds one"),
        ((7, 8), (1, 7, 8), "the ids carry the mark BOS (1), the tokenizer adds none"),
        ((1, 7, 8), (1, 1, 7, 8), "the ids carry BOS (1) twice"),
        ((7, 8, 2), (7, 8), "the ids carry no EOS (2), the tokenizer adds one"),
        ((7, 8), (7, 8, 2), "the ids carry the mark EOS (2), the tokenizer adds none"),
        ((7, 8), (7, 9), "tokenizers give other ids for this prompt: position 1 has 9, expected 8"),
        ((7, 8), (7,), "tokenizers give other ids for this prompt: position 1 has no more, expected 8"),
        ((7,), (7, 8), "tokenizers give other ids for this prompt: position 1 has 8, expected no more"),
        ((1, 7), (1, 7), ""),
    ],
)
def test_how_ids_differ(own: tuple[int, ...], theirs: tuple[int, ...], said: str) -> None:
    assert difference(PromptIds(own, 1, 2), theirs) == said


def test_a_mark_that_the_tokenizer_does_not_have_is_no_bos() -> None:
    assert "position 0" in difference(PromptIds((1, 7), None, None), (7,))


def test_runs_on_other_tokens_are_not_compared() -> None:
    require_same_tokens(dump(token_ids=((1, 2),)), ((1, 2),))
    require_same_tokens(dump(), ((1, 2),))
    with pytest.raises(IncomparableError, match=r"\[1, 2\] \(1 x 2\).* asked \[1, 3\] .*position 1 has 2, expected 3"):
        require_same_tokens(dump(token_ids=((1, 2),)), ((1, 3),))
    with pytest.raises(IncomparableError, match=r"1 rows against 2"):
        require_same_tokens(dump(token_ids=((1, 2),)), ((1, 2), (3, 4)))


def test_runs_of_two_checkpoints_are_not_compared() -> None:
    checkpoint = find(EMBEDDED)
    require_same_model(dump(), checkpoint)
    require_same_model(dump(fingerprint=checkpoint.fingerprint()), checkpoint)
    with pytest.raises(IncomparableError, match=r"^port\.h5: these are two checkpoints: it records model 'mine'"):
        require_same_model(dump(fingerprint="0" * 16, model="mine"), checkpoint)
