"""What is read where no known bug fits: said in words that are true, of the layers where it is, and of no other bug."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parity.results import Comparison
from tests.bench import case_changes as changes
from tests.bench.case_list import CASES, Case
from tests.bench.cases import compare, make, port
from tests.conftest import in_turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("read")


def result(case: Case, dtype: str, folder: Path) -> Comparison:
    path = make(case.architecture, folder)
    return compare(path, port(path, dtype, case), dtype, True, folder, ())


def said(case: Case, dtype: str, folder: Path) -> list[str]:
    """The titles of what is found, with nothing known but what is read."""
    return [f.fault.title if f.fault else "unknown" for f in result(case, dtype, folder).findings]


WORDS: dict[str, str | set[str]] = {
    "longrope-one-factor": "RoPE turns by other angles than the reference: 1.1 times for pair 3",
    "positions-bounded": "RoPE counts positions in another way: token 51 is at 50, token 52 is at 50,"
    " token 53 is at 50, token 54 is at 50, and 17 more",
    "norm-of-first-layer": "the norm has the weights of layer 0",
    "bias-of-first-layer": "the projection has the bias of layer 0",
    "fused-k-v-q": "the output channels are in another order than the checkpoint's: blocks of 80 in the order 1, 2, 0",
    "heads-merged-late": "the input channels are in another order than the checkpoint's columns: (16, 5) transposed to"
    " (5, 16)",
    "qkv-cut-late": {
        f"the output channels are those of other projections: channels 64 to 79 are channels 0 to 15 of {other}_proj"
        for other in "kvq"
    },
    "ids-of-64-bits-halved": "the embedding was given other token ids: 5 0 111 0 93 0 102 0 …; they are"
    " 5 111 93 102 138 50 140 106 …, read as halves of 64-bit integers",
}


@pytest.mark.parametrize(("name", "dtype"), in_turn(["positions-bounded"], WORDS, ["float32", "bfloat16"]))
def test_what_is_read_is_said_in_numbers_of_the_port(name: str, dtype: str, folder: Path) -> None:
    case = next(case for case in CASES if case.id == name)
    words = WORDS[name]
    assert set(said(case, dtype, folder)) == ({words} if isinstance(words, str) else words)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bug_that_is_none_of_an_order_a_weight_or_a_table_is_read_as_none(dtype: str, folder: Path) -> None:
    def other(model: torch.nn.Module) -> None:
        for layer in changes.layers(model):
            own = layer.self_attn.q_proj.forward
            layer.self_attn.q_proj.forward = lambda x, own=own: own(x).tanh()
            layer.input_layernorm.variance_epsilon = 0.5

    assert set(said(Case("other", "mistral", frozenset(), {}, other), dtype, folder)) == {"unknown"}
