"""Rollouts by a plain transformers model with its own cache, and the files that engines write of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

Row = tuple[list[int], list[int], list[float]]  # prompt, completion, log-probabilities


def sample(
    model: Path,
    dtype: str,
    *,
    rows: int = 5,
    tokens: int = 16,
    temperature: float = 1.0,
    change: Callable[[nn.Module], None] = lambda _model: None,
    cache_dtype: torch.dtype | None = None,
    late: bool = False,
    seed: int = 3,
    attention: str = "sdpa",
    together: int = 1,
) -> list[Row]:
    """Sample completions token by token, as an engine does; with `cache_dtype` keys and values are rounded to it.

    `late` rounds them when they are read again in a later call, not for the tokens of their own. Each row is the first
    of a batch of so many that run `together`.
    """
    from transformers import AutoModelForCausalLM

    engine = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation=attention)
    engine.eval()
    change(engine)
    generator = torch.Generator().manual_seed(seed)
    draws = [random.Random(number + 1000 * (seed - 3)) for number in range(rows)]
    batches = [
        [[draw.randrange(5, 190) for _ in range(6 + n)] for _ in range(together)] for n, draw in enumerate(draws)
    ]
    new_cache = partial(_Cache, cache_dtype, late) if cache_dtype else DynamicCache
    return [_row(engine, prompts, tokens, temperature, generator, new_cache()) for prompts in batches]


class _Cache(DynamicCache):
    """Keys and values in a narrower dtype."""

    def __init__(self, dtype: torch.dtype, late: bool) -> None:
        super().__init__()
        self.dtype, self.late = dtype, late

    def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store what is new, and give back all there is."""
        if not self.late:
            keys, values = self._stored(keys), self._stored(values)
        found = super().update(keys, values, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        layer.keys, layer.values = self._stored(layer.keys), self._stored(layer.values)
        return found

    def _stored(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype).to(x.dtype)


def _row(
    engine: Any, prompts: list[list[int]], tokens: int, temperature: float, generator: torch.Generator, cache: Any
) -> Row:
    """The first row of a batch of prompts of one length."""
    completion, values, ids = [], [], torch.tensor(prompts)
    for _ in range(tokens):
        with torch.no_grad():
            output = engine(ids, past_key_values=cache, use_cache=True)
        logs = (output.logits[:, -1].float() / temperature).log_softmax(-1)
        ids = torch.multinomial(logs.exp(), 1, generator=generator)
        completion.append(int(ids[0]))
        values.append(float(logs[0, ids[0]]))
    return prompts[0], completion, values


def scored(model: Path, dtype: str, rows: Sequence[Row], change: Callable[[nn.Module], None]) -> list[Row]:
    """The same rows with the log-probabilities of a changed model, all tokens at once."""
    from transformers import AutoModelForCausalLM

    engine = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="eager")
    change(engine)
    found = []
    for prompt, completion, _ in rows:
        with torch.no_grad():
            logits = engine(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logs = logits.float().log_softmax(-1)
        found.append((prompt, completion, logs[torch.arange(len(completion)), completion].tolist()))
    return found


def lines(path: Path, records: Sequence[Any]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def trl(path: Path, rows: Sequence[Row]) -> Path:
    """One row a line, as TRL's server answers for one prompt."""
    return lines(path, [{"prompt_ids": p, "completion_ids": c, "logprobs": v} for p, c, v in rows])
