"""The end of the run: what both sides would say next, and whether rounding explains where they differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from parity.reference.checkpoint import Checkpoint
from parity.reference.replay import Replayed
from parity.results import NextToken, Token

_TOP = 5
# A top token that rounding flipped lost by at most this many standard deviations of the noise.
_SIGMAS = 5.0


class NextTokenWatch:
    """Keeps what is needed of the logits, and turns it into a NextToken."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._result: NextToken | None = None
        self._noise_ratio: float | None = None

    def see(self, logits: Replayed) -> None:
        """Look at the logits (b, t, vocab) of both sides; without a candidate there is nothing to say."""
        if logits.candidate is None or not bool(logits.candidate.isfinite().all()):
            return
        if logits.noise:
            self._noise_ratio = _in_sigmas(logits.candidate.to(logits.own.device), logits.ideal, logits.noise)
        rows = [_row(*row) for row in _rows(logits)]
        name = _Names(self._checkpoint.path)
        self._result = NextToken(
            reference=_top(logits.own[-1, -1].float(), name),
            candidate=_top(logits.candidate[-1, -1].float(), name),
            flips=sum(row.flipped for row in rows),
            unexplained_flips=sum(row.unexplained for row in rows),
            positions=len(rows),
            max_kl=max(row.kl for row in rows),
            margin_sigma=rows[-1].noise,
        )

    def noise_ratio(self) -> float | None:
        """Distance of the candidate's logits from the exact ones, in standard deviations of stochastic rounding."""
        return self._noise_ratio

    def result(self) -> NextToken | None:
        """What was seen, or None if the candidate has no finite logits."""
        return self._result


def _in_sigmas(candidate: Tensor, ideal: Tensor, noise: Sequence[Tensor]) -> float:
    """RMS error over that of stochastic rounding, which is √2 times as large as that of rounding to nearest."""
    error = float((candidate.to(ideal.dtype) - ideal).square().mean().sqrt())
    spread = sum(float((one - ideal).square().mean()) for one in noise) / len(noise)
    return error / (spread / 2) ** 0.5 if spread else 0.0


@dataclass(frozen=True)
class _Row:
    """One token: the noise of a difference of two logits, KL, and whether its top token was flipped."""

    noise: float
    kl: float
    flipped: bool
    unexplained: bool


def _rows(logits: Replayed) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Candidate, reference and exact logits (vocab) of one token after another: a vocabulary is large enough."""
    assert logits.candidate is not None, "unreachable because the caller has looked"
    sides = (logits.candidate.to(logits.own.device), logits.own, logits.ideal)
    for tokens in zip(*(side.flatten(0, -2) for side in sides), strict=True):
        candidate, own, ideal = (token.double() for token in tokens)
        yield candidate, own, ideal


def _row(candidate: Tensor, own: Tensor, ideal: Tensor) -> _Row:
    # The reference's own error, centred because a shift of all logits changes nothing; √2 for a difference of two.
    error = own - ideal
    noise = float((error - error.mean()).square().mean().sqrt()) * 2**0.5
    chosen, expected = int(candidate.argmax()), int(own.argmax())
    lost = float(ideal[expected] - ideal[chosen])
    theirs, ours = candidate.log_softmax(-1), own.log_softmax(-1)
    kl = float((ours.exp() * (ours - theirs)).sum())
    return _Row(noise, kl, chosen != expected, chosen != expected and lost > _SIGMAS * noise)


def _top(logits: Tensor, names: _Names) -> tuple[Token, ...]:
    values, ids = torch.topk(logits, min(_TOP, logits.numel()))
    return tuple(Token(int(i), names(int(i)), float(v)) for i, v in zip(ids, values, strict=True))


class _Names:
    """Token ids as text; a number in brackets where the model has no tokenizer."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = None
        if (path / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))

    def __call__(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False) if self._tokenizer else f"[{token}]"
