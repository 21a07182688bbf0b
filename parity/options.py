"""The options of a run, written once: command line, `parity.diff`, `cases()` and rerun command read this table."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parity.errors import UsageError
from parity.preflight import parse_tokens, prompts_of
from parity.reference.checkpoint import EMBEDDED

WHAT = "What both sides are asked"
HOW = "How they run"
IMPL = "impl.qwen3:load"  # the candidate that is meant where none is given


def _option(default: Any, panel: str, help: str, *flags: str) -> Any:
    """A field of RunOptions and its row on the command line; `flags` where they are not --field-name."""
    return field(default=default, metadata={"panel": panel, "help": help, "flags": flags})


@dataclass(frozen=True)
class RunOptions:
    """What a user may say of a run. Raises UsageError where two options contradict each other."""

    model: str | None = _option(
        None, WHAT, f"A directory or hub id; without it the embedded {EMBEDDED}.", "--model", "-m"
    )
    prompt: str | tuple[str, ...] | None = _option(
        None, WHAT, "Text to run; given again, one more row of the batch.", "--prompt", "-p"
    )
    prompt_file: Path | None = _option(None, WHAT, "A file that holds the text.")
    prompts: Path | None = _option(None, WHAT, "A file with a prompt a line, the rows of one batch.")
    tokens: str | None = _option(None, WHAT, "Token ids: '1 2 3', or a file with one row a line.")
    chat: bool = _option(False, WHAT, "The prompt is what a user says: apply the tokenizer's chat template.", "--chat")
    trust_remote_code: bool = _option(
        False, WHAT, "Let transformers run Python that the checkpoint brings along.", "--trust-remote-code"
    )
    decode: int = _option(
        0, WHAT, "Feed the last K tokens one by one, with the candidate's own cache, the others before them at once."
    )
    greedy: bool = _option(
        False, WHAT, "With --decode: the tokens are those that the reference says after the prompt.", "--greedy"
    )
    chunks: str | None = _option(None, WHAT, "Feed the prompt in chunks of so many tokens: 5,5,3.")
    pad: str | None = _option(
        None, WHAT, "Where shorter rows of a batch are padded, left or right. [default: left, of prompts]"
    )
    faults: str | None = _option(None, WHAT, "Your own faults: module:FAULTS or file.py:FAULTS.")
    dtype: str | None = _option(None, HOW, "float32, bfloat16 or float16. [default: the checkpoint's]")
    device: str = _option("cpu", HOW, "cpu, cuda, cuda:1, …")
    attention: str = _option("eager", HOW, "The reference's attention: eager or sdpa.")
    layers: str | None = _option(None, HOW, "Measure these layers and the ends alone, and call it no match: 0,13,27.")
    inner: bool = _option(False, HOW, "Also scores and probs, in memory of tokens².", "--inner")
    noise: int = _option(0, HOW, "Passes with stochastic rounding that say how far rounding may go.")
    exact: bool = _option(False, HOW, "Only the same bits are a match, on the same inputs at every site.", "--exact")
    allow_unexamined: bool = _option(
        False, HOW, "Call it a match although some operations were not recorded.", "--allow-unexamined"
    )
    weights: str | None = _option(
        None,
        HOW,
        "The weights of the reference, as the candidate has them: gguf:FILE, mlx:DIR, onnx:FILE; 'checkpoint' for the "
        "model's.",
    )
    rank_weights: bool = _option(
        False, HOW, "Rank the candidate's quantized weights by how far each alone moves the logits.", "--rank-weights"
    )
    accept: str | None = _option(
        None, HOW, "Precision regimes that are no fault: ids of `parity faults`, such as attention-operands-fp16."
    )
    power: bool = _option(True, HOW, "Say which known bugs this run could not have seen.")

    def __post_init__(self) -> None:
        if isinstance(self.prompt, (list, tuple)):
            one_or_none = self.prompt[0] if self.prompt else None
            object.__setattr__(self, "prompt", tuple(self.prompt) if len(self.prompt) > 1 else one_or_none)
        given = [flag(name) for name in _ASKING if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"{given[0]} and {given[1]} both say what to run. Give one of them.")
        if self.pad not in (None, "left", "right"):
            raise UsageError(f"--pad {self.pad!r}: rows are padded on the left or on the right. Give left or right.")
        if self.decode < 0:
            raise UsageError(f"--decode {self.decode}: how many tokens are decoded is 1 or more.")
        if self.greedy and not self.decode:
            raise UsageError("--greedy says which tokens are decoded. Say with --decode how many.")
        if self.chunks is not None and not re.fullmatch(r"[1-9][0-9]{0,6}(,[1-9][0-9]{0,6})*", self.chunks):
            raise UsageError(f"--chunks {self.chunks!r}: no list of sizes. Give numbers of tokens, such as 5,5,3.")
        if self.layers is not None and not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", self.layers):
            raise UsageError(f"--layers {self.layers!r}: no list of layers. Give their numbers, such as 0,13,27.")

    @property
    def says_what_to_run(self) -> bool:
        """Whether there is a prompt or token ids."""
        return any(getattr(self, name) is not None for name in _ASKING)

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts, one for each row of the batch; none if there are token ids, or nothing. Raises UsageError."""
        return prompts_of(self)

    @property
    def token_ids(self) -> tuple[tuple[int, ...], ...] | None:
        """The token ids that were given as such, of any lengths if they are to be padded. Raises UsageError."""
        return None if self.tokens is None else parse_tokens(self.tokens, ragged=self.pad is not None)

    def given(self) -> dict[str, str]:
        """What is not as it would be without a word, by name: the environment block of a report."""
        rows = (row for row in dataclasses.fields(self) if row.name not in _ASKING)
        return {row.name: str(value) for row in rows if (value := getattr(self, row.name)) != row.default}

    def calls(self, tokens: int) -> tuple[int, ...]:
        """How many tokens each call of the model takes, of `tokens` in all. Raises UsageError if they do not add up."""
        prompt = tokens - self.decode
        if prompt < 1:
            raise UsageError(
                f"--decode {self.decode}: the prompt has {tokens} tokens, so that none is left before them."
            )
        chunks = tuple(map(int, self.chunks.split(","))) if self.chunks else (prompt,)
        if sum(chunks) != prompt:
            decoded = f" before the {self.decode} decoded ones" if self.decode else ""
            raise UsageError(f"--chunks {self.chunks}: {sum(chunks)} tokens, but the prompt has {prompt}{decoded}.")
        return chunks + (1,) * self.decode

    def command(self, candidate: str, names: Path | str | None = None) -> list[str]:
        """The comparison of a candidate with these options as a command line."""
        given = {"--candidate": candidate, "--names": names}
        said = [part for name, value in given.items() if value is not None for part in (name, str(value))]
        return ["parity", "diff", *said, *self._arguments()]

    def _arguments(self) -> Iterator[str]:
        for row in dataclasses.fields(self):
            value = getattr(self, row.name)
            if value == row.default:
                continue
            if isinstance(value, bool):
                yield flag(row.name) if value else f"--no-{row.name}"
            elif isinstance(value, tuple):
                yield from (part for one in value for part in (flag(row.name), one))
            else:
                yield from (flag(row.name), str(value))


_ASKING = ("prompt", "prompt_file", "prompts", "tokens")
NAMES = tuple(row.name for row in dataclasses.fields(RunOptions))


def flag(name: str) -> str:
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"


def run_options(given: dict[str, Any], what: str) -> RunOptions:
    """Options given by name, as `parity.diff` and `cases()` take them. Raises UsageError for one there is not."""
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise UsageError(f"{what}: no option {unknown[0]!r}. The options of a run are {', '.join(NAMES)}.")
    return RunOptions(**given)


def shell(command: list[str]) -> str:
    """A command line as it can be pasted."""
    return shlex.join(command)
