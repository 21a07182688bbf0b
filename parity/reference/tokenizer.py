"""The checkpoint's tokenizer: what a prompt's token ids are, as plain text or as a chat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity.errors import UsageError
from parity.reference.checkpoint import Checkpoint, first_sentence, foreign_code

# A tokenizer has one of these; its configuration alone names a class, and no vocabulary.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tokenizer*.py", "tekken.json")
_ADVICE = "Copy the tokenizer's files there, or give token ids in place of text (--tokens)."


@dataclass(frozen=True)
class PromptIds:
    """A prompt as token ids, and the ids that mark a begin and an end, if the tokenizer has such."""

    ids: tuple[int, ...]
    begin: int | None
    end: int | None


def require_tokenizer(checkpoint: Checkpoint) -> None:
    """Raise UsageError if no file of the checkpoint can be a tokenizer."""
    if not any(next(checkpoint.path.glob(pattern), None) for pattern in _VOCABULARIES):
        found = ", ".join(sorted(file.name for file in checkpoint.path.iterdir())[:5])
        raise UsageError(f"{checkpoint.path}: has no tokenizer (found: {found}). {_ADVICE}")


def tokenize(checkpoint: Checkpoint, text: str, *, chat: bool = False) -> PromptIds:
    """The ids of a prompt; with `chat`, of a user's message in the tokenizer's chat template. Raises UsageError."""
    require_tokenizer(checkpoint)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=checkpoint.trust_remote_code)
    except Exception as error:  # of many classes, some of them of other libraries
        reason = foreign_code(checkpoint, error) or first_sentence(error)
        raise UsageError(f"{checkpoint.path}: its tokenizer cannot be loaded: {reason}. {_ADVICE}") from error
    ids = tokenizer(_chat(checkpoint, tokenizer, text), add_special_tokens=False) if chat else tokenizer(text)
    if not ids.input_ids:
        raise UsageError(f"{checkpoint.path}: its tokenizer makes no token of the prompt. Give token ids (--tokens).")
    return PromptIds(tuple(ids.input_ids), tokenizer.bos_token_id, tokenizer.eos_token_id)


def _chat(checkpoint: Checkpoint, tokenizer: Any, text: str) -> str:
    """The text of a chat with one message, up to where the model answers. The template itself writes special tokens."""
    if not tokenizer.chat_template:
        raise UsageError(f"{checkpoint.path}: its tokenizer has no chat template. Leave --chat out.")
    try:
        said: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program, which raises what it likes
        raise UsageError(
            f"{checkpoint.path}: its chat template fails: {first_sentence(error)}. Leave --chat out."
        ) from error
    return said


class TokenTexts:
    """Token ids as text; a number in brackets where the model has no tokenizer."""

    _tokenizer: Any = None

    def read(self, path: Path) -> None:
        """Read the tokenizer of the model in a directory, if it has one."""
        if (path / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))

    def __call__(self, token: int) -> str:
        """The text of a token."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False)) if self._tokenizer else f"[{token}]"
