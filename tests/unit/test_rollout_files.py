"""Rollout files of each program, in the shape that its documentation gives, come down to the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity.dump import write_safetensors
from parity.errors import DumpError
from parity.rollouts.files import read_rollouts
from parity.rollouts.tensors import Row

ROWS = (Row((1, 2, 3), (7, 8), (-0.5, -1.25)), Row((4, 5), (9, 6), (-2.0, -0.125)))

VLLM_SERVER = [
    {
        "object": "text_completion",
        "choices": [
            {
                "index": 0,
                "text": "x",
                "prompt_token_ids": list(row.prompt),
                "token_ids": list(row.completion),
                "logprobs": {
                    "tokens": [f"token_id:{t}" for t in row.completion],
                    "token_logprobs": list(row.logprobs),
                    "top_logprobs": None,
                },
            }
        ],
    }
    for row in ROWS
]
VLLM_CHAT = [
    {
        "prompt_token_ids": list(row.prompt),
        "choices": [
            {
                "message": {"role": "assistant", "content": "x"},
                "logprobs": {
                    "content": [
                        {"token": f"token_id:{t}", "logprob": v, "bytes": None, "top_logprobs": []}
                        for t, v in zip(row.completion, row.logprobs, strict=True)
                    ]
                },
            }
        ],
    }
    for row in ROWS
]
VLLM_OUTPUT = [
    {
        "prompt_token_ids": list(row.prompt),
        "outputs": [
            {
                "token_ids": list(row.completion),
                "logprobs": [
                    {"0": {"logprob": -0.01, "rank": 1}, str(t): {"logprob": v, "rank": 2, "decoded_token": "x"}}
                    for t, v in zip(row.completion, row.logprobs, strict=True)
                ],
            }
        ],
    }
    for row in ROWS
]
SGLANG = [
    {
        "text": "x",
        "output_ids": list(row.completion),
        "meta_info": {
            "prompt_tokens": len(row.prompt),
            "input_token_logprobs": [[None, row.prompt[0], None], *([-1.0, t, None] for t in row.prompt[1:])],
            "output_token_logprobs": [[v, t, None] for t, v in zip(row.completion, row.logprobs, strict=True)],
        },
    }
    for row in ROWS
]
TRL_BATCH = {
    "prompt_ids": [list(row.prompt) for row in ROWS],
    "completion_ids": [list(row.completion) for row in ROWS],
    "logprobs": [[[-0.01, v] for v in row.logprobs] for row in ROWS],
    "logprob_token_ids": [[[0, t] for t in row.completion] for row in ROWS],
}
VERL = [
    {
        "prompt_ids": list(row.prompt),
        "response_ids": list(row.completion),
        "response_mask": [1] * len(row.completion),
        "response_logprobs": list(row.logprobs),
        "num_turns": 2,
    }
    for row in ROWS
]
SLIME = [
    {
        "tokens": list(row.prompt + row.completion),
        "response_length": len(row.completion),
        "rollout_log_probs": list(row.logprobs),
    }
    for row in ROWS
]


def write(path: Path, value: Any) -> Path:
    text = json.dumps(value) if isinstance(value, dict) else "".join(json.dumps(each) + "\n" for each in value)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("value", "format"),
    [
        (VLLM_SERVER, "vLLM, server"),
        (VLLM_CHAT, "vLLM, server"),
        (VLLM_OUTPUT, "vLLM, RequestOutput"),
        (SGLANG, "SGLang"),
        (TRL_BATCH, "TRL or verl"),
        (VERL, "TRL or verl"),
        (SLIME, "slime"),
    ],
    ids=["vllm-server", "vllm-chat", "vllm-output", "sglang", "trl-batch", "verl", "slime"],
)
def test_each_shape_is_the_same_rows(tmp_path: Path, value: Any, format: str) -> None:
    found = read_rollouts(write(tmp_path / "rollout.jsonl", value))
    assert found.rows == ROWS
    assert found.format == format


def test_several_completions_of_a_prompt(tmp_path: Path) -> None:
    batch = {"prompt_ids": [[1, 2]], "completion_ids": [[7], [8]], "logprobs": [[[-0.5]], [[-0.25]]]}
    rows = read_rollouts(write(tmp_path / "rollout.json", batch)).rows
    assert rows == (Row((1, 2), (7,), (-0.5,)), Row((1, 2), (8,), (-0.25,)))


def test_masked_tokens_and_nulls_are_not_judged(tmp_path: Path) -> None:
    record = {"prompt_ids": [1], "response_ids": [2, 3, 4], "response_mask": [1, 0, 1]}
    rows = read_rollouts(write(tmp_path / "r.jsonl", [record | {"response_logprobs": [-0.5, 0.0, None]}])).rows
    assert rows[0].logprobs == (-0.5, None, None)


def test_padded_tensors(tmp_path: Path) -> None:
    path = tmp_path / "batch.safetensors"
    arrays = {
        "prompts": np.array([[1, 2, 3], [0, 4, 5]]),
        "responses": np.array([[7, 8, 0], [9, 6, 0]]),
        "attention_mask": np.array([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]]),
        "rollout_log_probs": np.array([[-0.5, -1.25, 0], [-2.0, -0.125, 0]], dtype=np.float32),
    }
    write_safetensors(path, arrays, {})
    found = read_rollouts(path)
    assert (found.rows, found.format) == (ROWS, "safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no log-probability"),
        ("{", "line 1 is not JSON"),
        ("3\n", "record 1: is no JSON object — found int"),
        ('{"text": "x"}', "has the keys text — write prompt_ids, completion_ids and logprobs"),
        ('{"prompt_ids": [1], "completion_ids": [2, 3], "logprobs": [-1]}', "1 log-probabilities for 2 tokens"),
        ('{"prompt_ids": ["a"], "completion_ids": [2], "logprobs": [-1]}', "no token ids of the prompt"),
        ('{"prompt_ids": [1], "completion_ids": [2], "logprobs": [true]}', "that is no number"),
        ('{"prompt_ids": [1], "completion_ids": [2], "logprobs": [null]}', "has no log-probability"),
        ('{"prompt_ids": [1], "completion_ids": [2], "logprobs": [[-1, -2]]}', "several log-probabilities for a token"),
        ('{"choices": [{"text": "x", "logprobs": null}]}', "ask with return_token_ids"),
        ('{"meta_info": {"output_token_logprobs": [[-1, 2, null]], "prompt_tokens": 4}}', "has 0 of 4 prompt tokens"),
        ('{"outputs": [{"token_ids": [2], "logprobs": [{"3": -1}]}]}', "not of the shape of vLLM, RequestOutput"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rollout.jsonl"
    path.write_text(text)
    with pytest.raises(DumpError, match=message) as caught:
        read_rollouts(path)
    assert "\n" not in str(caught.value)
