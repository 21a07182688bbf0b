"""The end of the run: what both sides would say next, and whether rounding explains where they differ."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from parity.metrics import kl_divergence
from parity.record.arrays import to_numpy
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

    def see(self, logits: Replayed) -> None:
        """Look at the logits (b, t, vocab) of both sides; without a candidate there is nothing to say."""
        if logits.candidate is None or not bool(logits.candidate.isfinite().all()):
            return
        own, candidate = logits.own.float(), logits.candidate.to(logits.own.device).float()
        noise = _noise(own, logits.ideal.float())
        flips, unexplained = _flips(candidate, logits.ideal.float(), own, noise)
        name = _Names(self._checkpoint.path)
        self._result = NextToken(
            reference=_top(own[-1, -1], name),
            candidate=_top(candidate[-1, -1], name),
            flips=flips,
            unexplained_flips=unexplained,
            positions=own.shape[0] * own.shape[1],
            max_kl=float(kl_divergence(to_numpy(candidate), to_numpy(own)).max()),
            margin_sigma=float(noise[-1, -1]),
        )

    def result(self) -> NextToken | None:
        """What was seen, or None if the candidate has no finite logits."""
        return self._result


def _noise(own: Tensor, ideal: Tensor) -> Tensor:
    """Standard deviation (b, t) of the difference of two logits by rounding.

    The reference's own error, centred for each token because a shift of all logits changes nothing.
    """
    error = own - ideal
    error = error - error.mean(-1, keepdim=True)
    return error.square().mean(-1).sqrt() * 2**0.5


def _flips(candidate: Tensor, ideal: Tensor, own: Tensor, noise: Tensor) -> tuple[int, int]:
    """Positions where the top token differs from the reference's, and how many of them rounding does not explain."""
    chosen, expected = candidate.argmax(-1), own.argmax(-1)
    lost = ideal.gather(-1, expected[..., None]) - ideal.gather(-1, chosen[..., None])
    flipped = chosen != expected
    unexplained = flipped & (lost[..., 0] > _SIGMAS * noise)
    return int(flipped.sum()), int(unexplained.sum())


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
