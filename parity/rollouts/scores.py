"""The reference's log-probabilities of a rollout's tokens: as it computes them, exactly, and rounded at random.

Rows are run in groups, padded on the right: a causal model's earlier tokens do not see what comes later. One pass's
logits are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parity.observer import Observer
from parity.record.tap import Tap
from parity.reference.pieces import Piece, PiecewiseModel
from parity.reference.precision import stochastically_rounded
from parity.reference.replay import Reference
from parity.rollouts.tensors import Row

Floats = NDArray[np.float64]
# held while a loaded piece of a model runs: the place for a fault
Changing = Callable[[PiecewiseModel, Piece], AbstractContextManager[None]]

# Passes that are rounded at random.
DRAWS = 4
# Tokens, padding included, that are run at once; a longer row is run alone.
_TOGETHER = 1024
# So many tokens keep all their logits, for what is asked of whole distributions.
SAMPLE = 128
# How many tokens earlier or later a log-probability may belong.
SHIFTS = (-1, 1)


@dataclass(frozen=True)
class Tokens:
    """Where the judged tokens (n) are: the number of the row, and of the token in the row's completion."""

    row: NDArray[np.int64]
    at: NDArray[np.int64]
    engine: Floats
    """The file's log-probability of each."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Tokens:
        """Those that have a log-probability."""
        found = [(i, j, v) for i, row in enumerate(rows) for j, v in enumerate(row.logprobs) if v is not None]
        row, at, engine = zip(*found, strict=True)
        return cls(np.array(row, dtype=np.int64), np.array(at, dtype=np.int64), np.array(engine, dtype=np.float64))


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the judged tokens (n), at the temperature that was asked for.

    own is in the working dtype, ideal exact, noise (k, n) of passes that are rounded at random. All end in a
    log-softmax, whose float32 may be off by an ulp of the logit. `sampled` are tokens whose exact logits (m, vocab)
    `logits` keeps, before the temperature, and `token` the ids of these.
    """

    own: Floats
    ideal: Floats
    noise: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    sampled: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    token: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    logits: Tensor = field(default_factory=lambda: torch.zeros(0, 0))


@dataclass(frozen=True)
class Question:
    """What is asked of a reference: the log-probabilities of the judged tokens of rows, at a temperature."""

    reference: Reference
    rows: Sequence[Row]
    tokens: Tokens
    temperature: float

    def ids_of(self, judged: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids (m) of judged tokens (m)."""
        rows, tokens = self.rows, self.tokens
        return np.array([rows[int(tokens.row[i])].completion[int(tokens.at[i])] for i in judged], dtype=np.int64)


def score(question: Question, observer: Observer) -> Scores:
    """The reference's log-probabilities of all judged tokens."""
    exact, working = question.reference.precise, question.reference.working
    passes: list[_Pass] = [(working, _unchanged), (exact, _unchanged)]
    passes += [(exact, _rounding(working, seed)) for seed in range(DRAWS)]
    count = len(question.tokens.row)
    sampled = np.unique(np.linspace(0, count - 1, SAMPLE).round().astype(np.int64))
    kept: dict[int, Tensor] = {}
    size = np.zeros(count)

    def read(number: int, logits: Tensor, judged: NDArray[np.int64]) -> None:
        if number == 1:
            size[judged] = logits.abs().amax(-1).double().cpu().numpy()
            wanted = [place for place, token in enumerate(judged) if token in chosen]
            kept.update({int(judged[place]): logits[place].cpu() for place in wanted})

    chosen = set(sampled.tolist())
    values = _run(question, passes, observer=observer, read=read)
    softmax = np.random.default_rng(0).uniform(-1, 1, (DRAWS, count)) * 2.0**-24 * size / question.temperature
    logits = torch.stack([kept[int(i)] for i in sampled])
    return Scores(values[0], values[1], values[2:] + softmax, sampled, question.ids_of(sampled), logits)


def score_changed(question: Question, change: Changing) -> Scores:
    """The same with a change to the reference, as it computes it and exactly."""
    passes: list[_Pass] = [(question.reference.working, _unchanged), (question.reference.precise, _unchanged)]
    own, ideal = _run(question, passes, change=change, observer=Observer())
    return Scores(own, ideal)


Read = Callable[[int, Tensor, NDArray[np.int64]], None]
_Pass = tuple[PiecewiseModel, Tap]


def _run(
    question: Question,
    passes: Sequence[_Pass],
    *,
    observer: Observer,
    change: Changing = lambda _model, _piece: nullcontext(),
    read: Read = lambda _number, _logits, _judged: None,
) -> Floats:
    """Log-probabilities (passes, n); `read(number of the pass, logits (m, vocab), judged tokens (m))` sees them all."""
    rows, tokens = question.rows, question.tokens
    found = np.zeros((len(passes), len(tokens.row)))
    groups = list(_groups(rows))
    for done, group in enumerate(groups):
        observer.show("log-probabilities", done, len(groups))
        ids = _padded([rows[i] for i in group])
        judged = np.flatnonzero(np.isin(tokens.row, group))
        if not judged.size:
            continue
        place = {number: position for position, number in enumerate(group)}
        of_batch = torch.tensor([place[int(i)] for i in tokens.row[judged]])
        # The logits of a token are those after the one before it.
        before = torch.tensor([len(rows[int(tokens.row[i])].prompt) + int(tokens.at[i]) - 1 for i in judged])
        wanted = torch.from_numpy(question.ids_of(judged))
        for number, logits in enumerate(_ends(question.reference, ids, passes, change)):
            at = logits[of_batch.to(logits.device), before.to(logits.device)]
            read(number, at, judged)
            found[number, judged] = logprobs(at, wanted, question.temperature)
    return found


def logprobs(logits: Tensor, token: Tensor, temperature: float) -> Floats:
    """Natural logarithms of the probabilities of tokens (n), of logits (n, vocab) over a temperature."""
    wide = logits.double() / temperature
    chosen = wide.gather(-1, token.to(wide.device)[:, None])[:, 0]
    result: Floats = (chosen - wide.logsumexp(-1)).cpu().numpy()
    return result


def _ends(reference: Reference, ids: Tensor, passes: Sequence[_Pass], change: Changing) -> Iterator[Tensor]:
    """The logits (b, t, vocab) of each pass, one after the other."""
    reference.prepare(ids)
    *inner, last = reference.working.pieces
    hidden: list[Tensor | None] = [None] * len(passes)

    def run(piece: Piece, number: int) -> Tensor:
        model, tap = passes[number]
        with change(model, piece):
            return model.run(piece, ids, hidden[number], tap)

    for piece in inner:
        with reference.working.loaded(piece), reference.precise.loaded(piece):
            hidden = [run(piece, number) for number in range(len(passes))]
    with reference.working.loaded(last), reference.precise.loaded(last):
        for number in range(len(passes)):
            yield run(last, number)


def _unchanged(_site: str, value: Tensor) -> Tensor:
    return value


def _rounding(working: PiecewiseModel, seed: int) -> Tap:
    generator = torch.Generator(working.device).manual_seed(seed)

    def rounded(_site: str, value: Tensor) -> Tensor:
        return stochastically_rounded(value, working.dtype, generator) if value.is_floating_point() else value

    return rounded


def _groups(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Rows that are run together, of similar lengths."""
    lengths = [len(row.prompt) + len(row.completion) for row in rows]
    group: list[int] = []
    for i in sorted(range(len(rows)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[i] > _TOGETHER:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _padded(rows: Sequence[Row]) -> Tensor:
    """Token ids (b, t); the last token of a shorter row is repeated."""
    whole = [row.prompt + row.completion for row in rows]
    longest = max(map(len, whole))
    return torch.tensor([one + one[-1:] * (longest - len(one)) for one in whole])
