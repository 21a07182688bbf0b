"""What both sides are asked: the model, the tokens, and how to run."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from parity.dump import RunInfo
from parity.dump.tokens import TokenIds
from parity.errors import UsageError
from parity.faults import CATALOGUE, Fault, load_user_faults, regimes
from parity.options import RunOptions
from parity.reference.batch import Batch, padded
from parity.reference.checkpoint import EMBEDDED, Checkpoint, default_dtype, find
from parity.reference.own_weights import open_weights
from parity.reference.pieces import PiecewiseModel
from parity.reference.tokenizer import tokenize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What attention reads of a cache is looked at in so many calls at most: each of them reads all rows again.
_MOST_CALLS = 16


@dataclass(frozen=True)
class RunSpec:
    """What both sides are asked: the model, the tokens, and how to run.

    `token_ids` (b, t) are the rows of the batch, `prompt` the text they came from, if any; `attention_mask` is 1 where
    they are text and 0 where they are padding, `position_ids` what both sides are given where text is not counted from
    0 (None both for a batch without padding). `faults` are the known bugs that a diagnosis tries; `command` repeats the
    run. `calls` are the numbers of tokens that each call of the candidate takes, all at once if there are none.
    Everything else is as the `options` say.
    """

    checkpoint: Checkpoint
    token_ids: tuple[tuple[int, ...], ...]
    dtype: str
    options: RunOptions = field(default_factory=RunOptions)
    prompt: str | None = None
    attention_mask: TokenIds | None = None
    position_ids: TokenIds | None = None
    faults: tuple[Fault, ...] = CATALOGUE
    command: str = ""
    calls: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.calls and self.token_ids:
            object.__setattr__(self, "calls", (len(self.token_ids[0]),))

    @property
    def accepted(self) -> tuple[Fault, ...]:
        """The precision regimes that are no fault in this run. Raises UsageError for what is no regime."""
        return regimes(self.options.accept or "", self.faults)

    @property
    def device(self) -> str:
        """Where both sides compute."""
        return self.options.device

    @property
    def ids(self) -> Tensor:
        """Token ids as a tensor (b, t) of int64."""
        return self.batch.ids

    @cached_property
    def batch(self) -> Batch:
        """Token ids, which of them are text, their positions and their calls."""
        batch = Batch.of_rows(self.token_ids, self.attention_mask, self.position_ids)
        return replace(batch, calls=self.calls) if len(self.calls) > 1 else batch

    def info(self, producer: str) -> RunInfo:
        """The metadata of a dump of this run."""
        text, positions = self.batch.text, self.batch.positions
        return RunInfo(
            producer=producer,
            model=self.checkpoint.name,
            fingerprint=self.checkpoint.fingerprint(),
            token_ids=self.token_ids,
            dtype=self.dtype,
            device=self.device,
            attention=self.options.attention,
            prompt=self.prompt,
            versions=versions(),
            calls=self.calls if len(self.calls) > 1 else None,
            attention_mask=None if text is None else _rows(text.long()),
            position_ids=None if positions is None else _rows(positions),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def model(self) -> PiecewiseModel:
        """The reference's model, no weight of it loaded. Raises UsageError if the run makes no sense to it."""
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}.")
        model = PiecewiseModel(
            self.checkpoint, DTYPES[self.dtype], self.device, self.options.attention, self.options.inner
        )
        if 1 < len(self.calls) <= _MOST_CALLS and not self.options.inner:
            model = model.with_caches()
        self._check_tokens(model.config.vocab_size, getattr(model.config, "max_position_embeddings", None))
        return model

    def continued(self, model: PiecewiseModel) -> RunSpec:
        """The run with the tokens that `model` says after the prompt, where these are to be decoded (`--greedy`)."""
        if not self.options.greedy or self.ids.shape[1] == sum(self.calls):
            return self
        if self.position_ids is not None:
            raise UsageError("--greedy: the dump has positions of its own. Give the prompt, or leave --greedy out.")
        batch = self.batch
        for _ in range(self.options.decode):
            hidden: Tensor | None = None
            for piece in model.pieces:
                with model.loaded(piece):
                    hidden = model.run(piece, batch, hidden, lambda _site, value: value)
            assert hidden is not None, "unreachable because a model has pieces"
            batch = batch.followed_by(hidden.cpu()[torch.arange(len(hidden)), batch.last()].argmax(-1))
        mask = None if batch.text is None else _rows(batch.text.long())
        return replace(self, token_ids=_rows(batch.ids), attention_mask=mask)

    def _check_tokens(self, vocabulary: int, positions: int | None) -> None:
        rows, name = self.token_ids, self.checkpoint.name
        if not rows or not rows[0]:
            raise UsageError("the prompt is empty: no token to run. Give --prompt, --prompt-file or --tokens.")
        if positions and len(rows[0]) > positions > 0:
            raise UsageError(
                f"the prompt has {len(rows[0])} tokens, but {name} has positions for {positions}. Shorten it."
            )
        outside = [token for row in rows for token in row if not 0 <= token < vocabulary]
        if outside:
            raise UsageError(f"token id {outside[0]} is outside the vocabulary of {name} (0 … {vocabulary - 1}).")


def run_spec(options: RunOptions, said: RunInfo | None = None, command: str = "") -> RunSpec:
    """The run that options amount to; model, token ids and dtype that they leave out are those `said` by a dump.

    Raises UsageError and ModelError.
    """
    said = said or RunInfo()
    checkpoint = find(options.model or said.model or EMBEDDED, trust_remote_code=options.trust_remote_code)
    checkpoint = replace(checkpoint, weights=open_weights(options.weights))
    texts = options.texts
    _check_device(options.device)
    if said.token_ids and not options.says_what_to_run:
        token_ids, mask, positions = said.token_ids, said.attention_mask, said.position_ids
    else:
        rows = options.token_ids or _tokenized(checkpoint, texts, options.chat, said)
        (token_ids, mask), positions = _padded(rows, options, checkpoint), None
    run = RunSpec(
        checkpoint=checkpoint,
        token_ids=token_ids,
        attention_mask=mask,
        position_ids=positions,
        calls=_calls(options, len(token_ids[0]), said),
        dtype=options.dtype or said.dtype or default_dtype(checkpoint),
        options=options,
        prompt="\n".join(texts) or None,
        faults=CATALOGUE + (load_user_faults(options.faults) if options.faults else ()),
        command=command,
    )
    if checkpoint.weights is not None and run.dtype != "float32":
        raise UsageError(f"--weights are kept in float32, but the run is in {run.dtype}. Give --dtype float32.")
    _ = run.accepted  # what is no regime is said before anything runs
    return run


def _calls(options: RunOptions, tokens: int, said: RunInfo) -> tuple[int, ...]:
    if not (options.decode or options.chunks):
        return said.calls or ()
    calls = options.calls(tokens + (options.decode if options.greedy else 0))
    if said.calls not in (None, calls):
        raise UsageError(
            f"the dump was run in calls of {_sizes(said.calls)} tokens, not {_sizes(calls)}. Ask for those."
        )
    return calls


def _sizes(calls: tuple[int, ...]) -> str:
    return ", ".join(map(str, calls[:8])) + (", …" if len(calls) > 8 else "")


def _rows(values: Tensor) -> TokenIds:
    return tuple(map(tuple, values.tolist()))


def _padded(rows: TokenIds, options: RunOptions, checkpoint: Checkpoint) -> tuple[TokenIds, TokenIds | None]:
    """The rows made equally long, and their mask."""
    tail = 0 if options.greedy else options.decode
    short = [number for number, row in enumerate(rows) if len(row) <= tail]
    if short and len(rows) > 1:
        raise UsageError(
            f"--decode {tail}: row {short[0]} has {len(rows[short[0]])} tokens, so that none is left before them."
        )
    config = checkpoint.config()
    named = (config.get("pad_token_id"), config.get("eos_token_id"))
    known = config.get("vocab_size", 0)
    pad = next((token for token in named if type(token) is int and 0 <= token < known), 0)
    return padded(rows, options.pad or "left", pad, tail)


def _tokenized(checkpoint: Checkpoint, prompts: tuple[str, ...], chat: bool, said: RunInfo) -> TokenIds:
    if not prompts:
        where = "" if said == RunInfo() else ": the dump does not say its token ids (parity.token_ids)"
        raise UsageError(f"nothing to run{where}. Give --prompt TEXT, --prompt-file FILE or --tokens IDS.")
    if not all(prompts):
        raise UsageError("the prompt is empty: no token to run. Give it some text.")
    return tuple(tokenize(checkpoint, prompt, chat=chat).ids for prompt in prompts)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r}: not usable here ({str(error).splitlines()[0]}).") from error


def versions() -> dict[str, str]:
    """Versions of everything that changes numbers."""
    packages = ("parity", "torch", "transformers", "numpy")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
