"""What both sides are asked: the model, the tokens, and how to run."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from parity.dump import RunInfo
from parity.errors import UsageError
from parity.faults import CATALOGUE, Fault
from parity.reference.checkpoint import Checkpoint
from parity.reference.pieces import PiecewiseModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Question:
    """What both sides are asked: the model, the tokens, and how to run.

    `token_ids` (b, t) are the rows of the batch, `prompt` the text they came from, if any; `faults` are the
    known bugs that a diagnosis tries, `noise` how many stochastically rounded passes estimate the total noise;
    `power` asks which of the faults the run would have revealed.
    """

    checkpoint: Checkpoint
    token_ids: tuple[tuple[int, ...], ...]
    dtype: str
    device: str = "cpu"
    attention: str = "eager"
    prompt: str | None = None
    inner: bool = False
    command: str = ""
    faults: tuple[Fault, ...] = CATALOGUE
    noise: int = 0
    power: bool = True

    @property
    def ids(self) -> Tensor:
        """Token ids as a tensor (b, t) of int64."""
        return torch.tensor(self.token_ids, dtype=torch.long)

    def info(self, producer: str) -> RunInfo:
        """What a dump of an answer to this question says of itself."""
        return RunInfo(
            producer=producer,
            model=self.checkpoint.name,
            fingerprint=self.checkpoint.fingerprint(),
            token_ids=self.token_ids,
            dtype=self.dtype,
            device=self.device,
            attention=self.attention,
            prompt=self.prompt,
            versions=versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def reference(self) -> PiecewiseModel:
        """The model that answers, no weight of it loaded. Raises UsageError if the question makes no sense to it."""
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}.")
        model = PiecewiseModel(self.checkpoint, DTYPES[self.dtype], self.device, self.attention, self.inner)
        self._check_tokens(model.config.vocab_size, getattr(model.config, "max_position_embeddings", None))
        return model

    def _check_tokens(self, vocabulary: int, positions: int | None) -> None:
        rows, name = self.token_ids, self.checkpoint.name
        if not rows or not rows[0]:
            raise UsageError("the prompt is empty: no token to run. Give --prompt, --prompt-file or --tokens.")
        if positions and len(rows[0]) > positions:
            raise UsageError(
                f"the prompt has {len(rows[0])} tokens, but {name} has positions for {positions}. Shorten it."
            )
        outside = [token for row in rows for token in row if not 0 <= token < vocabulary]
        if outside:
            raise UsageError(f"token id {outside[0]} is outside the vocabulary of {name} (0 … {vocabulary - 1}).")


def versions() -> dict[str, str]:
    """Versions of everything that changes numbers."""
    packages = ("parity", "torch", "transformers", "numpy")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
