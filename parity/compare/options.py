"""From the options of the command line to a question."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parity.errors import UsageError

if TYPE_CHECKING:
    from parity.compare.run_spec import Question
    from parity.faults import Fault
    from parity.reference.checkpoint import Checkpoint

EMBEDDED = "tiny-qwen3"


@dataclass
class Ask:
    """The options that say what to run, and the question they amount to."""

    prompt: str | None = None
    prompt_file: Path | None = None
    tokens: str | None = None
    model: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    attention: str = "eager"
    inner: bool = False
    faults: str | None = None
    noise: int = 0

    def __post_init__(self) -> None:
        options = {"--prompt": self.prompt, "--prompt-file": self.prompt_file, "--tokens": self.tokens}
        given = [name for name, value in options.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{given[0]} and {given[1]} both say what to run. Give one of them.")
        self.says_what_to_run = bool(given)

    def question(self, token_ids: tuple[tuple[int, ...], ...] | None = None, model: str | None = None) -> Question:
        """The question; token ids and model may come from a dump instead of the options."""
        from parity.compare.run_spec import Question
        from parity.reference.checkpoint import default_dtype, find

        checkpoint = find(self.model or model or EMBEDDED)
        prompt = self._text()
        if token_ids is None:
            token_ids = self._ids(checkpoint, prompt)
        _check_device(self.device)
        return Question(
            checkpoint,
            token_ids,
            self.dtype or default_dtype(checkpoint),
            self.device,
            self.attention,
            prompt,
            self.inner,
            shlex.join(["parity", *sys.argv[1:]]),
            self._faults(),
            self.noise,
        )

    def _faults(self) -> tuple[Fault, ...]:
        from parity.faults import CATALOGUE, load_user_faults

        return CATALOGUE + (load_user_faults(self.faults) if self.faults else ())

    def _text(self) -> str | None:
        return self.prompt if self.prompt_file is None else _read_text("prompt file", self.prompt_file)

    def _ids(self, checkpoint: Checkpoint, prompt: str | None) -> tuple[tuple[int, ...], ...]:
        if self.tokens is not None:
            return _parse_tokens(self.tokens)
        if prompt is None:
            raise UsageError("nothing to run. Give --prompt TEXT, --prompt-file FILE or --tokens IDS.")
        if not prompt:
            raise UsageError("the prompt is empty: no token to run. Give it some text.")
        from parity.reference.tokenizer import tokenize

        return (tokenize(checkpoint, prompt).ids,)


def _read_text(what: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UsageError(f"{what} {path}: not a readable text file ({reason}).") from error


def _parse_tokens(text: str) -> tuple[tuple[int, ...], ...]:
    if not set(text) <= set("0123456789, \n"):
        text = _read_text("--tokens", Path(text))
    try:
        rows = tuple(
            tuple(int(t) for t in line.replace(",", " ").split()) for line in text.strip().splitlines() if line.strip()
        )
    except ValueError as error:
        raise UsageError(f"--tokens: {error}. Give numbers such as '1 2 3', or a file with one row a line.") from error
    if len({len(row) for row in rows}) > 1:
        raise UsageError(
            f"--tokens: rows of {', '.join(str(len(r)) for r in rows)} ids. All rows must be equally long."
        )
    return rows


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r}: not usable here ({str(error).splitlines()[0]}).") from error
