"""Rollouts as tensors in a safetensors file: padded batches, as verl's DataProto and TRL's trainers hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parity.dump import open_safetensors
from parity.errors import DumpError

Array = NDArray[np.float64]

_PROMPT = ("prompts", "prompt_ids")
_COMPLETION = ("responses", "completion_ids", "response_ids")
_LOGPROBS = ("rollout_log_probs", "sampling_per_token_logps", "old_per_token_logps", "logprobs")
_MASKS = ("prompt_mask", "attention_mask", "response_mask", "completion_mask")


@dataclass(frozen=True)
class Row:
    """One prompt and completion, and the log-probability of each of the completion's tokens where there is one."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    logprobs: tuple[float | None, ...]


def read_tensors(path: Path) -> tuple[Row, ...]:
    """The rows of a batch: prompts (b, p), responses (b, r), log-probabilities (b, r) and masks.

    Raises DumpError where they do not fit each other.
    """
    with open_safetensors(path) as dump:
        known = (*_PROMPT, *_COMPLETION, *_LOGPROBS, *_MASKS)
        found = {name: dump.read(name).astype(np.float64) for name in dump.entries if name in known}
        there = ", ".join(list(dump.entries)[:6])
    prompts, completions, values = (_first(found, names) for names in (_PROMPT, _COMPLETION, _LOGPROBS))
    if prompts is None or completions is None or values is None:
        raise DumpError(
            f"{path}: is no batch of rollouts — found {there} — "
            "write prompts, responses and rollout_log_probs (and attention_mask, response_mask)"
        )
    rows, width = len(prompts), prompts.shape[-1]
    if prompts.ndim != 2 or completions.shape != values.shape or len(completions) != rows or values.ndim != 2:
        shapes = ", ".join(str(one.shape) for one in (prompts, completions, values))
        raise DumpError(f"{path}: shapes {shapes} do not fit — (b, p), (b, r), (b, r) expected — write them so")
    real = _real(path, found, prompts, completions)
    judged = real[:, width:] * found.get("response_mask", np.ones_like(values))
    return tuple(
        _row(prompts[i], completions[i], values[i], real[i], judged[i]) for i in range(rows) if real[i, width:].any()
    )


def _real(path: Path, found: Mapping[str, Array], prompts: Array, completions: Array) -> Array:
    """Which tokens (b, p + r) are no padding."""
    whole = found.get("attention_mask")
    if whole is None:
        parts = [found.get(name, np.ones_like(like)) for name, like in _of_masks(prompts, completions)]
        whole = np.concatenate(parts, axis=-1)
    if whole.shape != (len(prompts), prompts.shape[1] + completions.shape[1]):
        raise DumpError(f"{path}: a mask has the shape {whole.shape} — one number for each token is expected")
    return whole


def _of_masks(prompts: Array, completions: Array) -> tuple[tuple[str, Array], tuple[str, Array]]:
    return ("prompt_mask", prompts), ("completion_mask", completions)


def _row(prompt: Array, completion: Array, values: Array, real: Array, judged: Array) -> Row:
    width = len(prompt)
    kept = np.flatnonzero(real[width:])
    return Row(
        tuple(int(token) for token in prompt[real[:width] > 0]),
        tuple(int(completion[i]) for i in kept),
        tuple(float(values[i]) if judged[i] else None for i in kept),
    )


def _first(found: Mapping[str, Array], names: tuple[str, ...]) -> Array | None:
    return next((found[name] for name in names if name in found), None)
