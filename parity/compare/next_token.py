"""The end of the run: what both sides would say next, and whether rounding explains where they differ.

A top token that was flipped is explained if it had lost by no more than the noise of that difference. The reference's
own error at the token says how large that is, but it is one draw: where it is not enough, the noise of just these two
logits is measured by rounding all of the run at random, again and again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from parity.observer import Observer
from parity.predictions import LogitSample, NextToken, Token
from parity.reference.batch import Batch
from parity.reference.checkpoint import Checkpoint
from parity.reference.products import Values
from parity.reference.replay import Replayed
from parity.reference.tokenizer import TokenTexts
from parity.reference.transfer import row_blocks

_TOP = 5
# So many logits are kept for drawing, and of these so many because they are the largest of one side.
_SAMPLE, _LARGEST = 512, 64
# A top token that rounding flipped lost by at most this many standard deviations of the noise.
_SIGMAS = 5.0
# Runs that are rounded at random, to measure it: with as many the limit is passed by chance once in a thousand flips.
DRAWS = 8


@dataclass(frozen=True)
class Ending:
    """What the logits say of the whole run.

    noise_ratio  distance of the candidate's logits from the exact ones, in standard deviations of stochastic rounding
    """

    next_token: NextToken | None = None
    noise_ratio: float | None = None


def ending(logits: Replayed, batch: Batch, checkpoint: Checkpoint, observer: Observer) -> Ending:
    """What both sides say at the end, from the logits (b, t, vocab); nothing if the candidate's are not finite.

    The end is the last token of text of the last row.
    """
    if logits.candidate is None or not _is_finite(logits.compared(logits.candidate)):
        return Ending()
    last = (-1, int(batch.last()[-1]))
    theirs, ours = logits.candidate[last].float(), logits.plain[last].float()
    logits = _of_text(logits)
    assert logits.candidate is not None, "unreachable because it was there before"
    rows = _rows(logits)
    flipped = rows.chosen != rows.expected
    noise = torch.maximum(rows.noise, _of_margins(logits, rows))
    name = TokenTexts()
    with observer.surviving("token names"):
        name.read(checkpoint.path)
    next_token = NextToken(
        reference=_top(ours, name),
        candidate=_top(theirs, name),
        flips=int(flipped.sum()),
        unexplained_flips=int((flipped & (rows.lost > _SIGMAS * noise)).sum()),
        positions=len(flipped),
        max_kl=float(rows.kl.max()),
        margin_sigma=float(rows.noise[-1]),
        sample=sample_of(ours.cpu(), theirs.cpu()),
    )
    ratio = _in_sigmas(logits.candidate.to(logits.own.device), logits.ideal, logits.noise) if logits.noise else None
    return Ending(next_token, ratio)


def _is_finite(logits: Tensor) -> bool:
    blocks = row_blocks(logits.flatten(0, -2))
    return bool(torch.stack([block.isfinite().all() for (block,) in blocks]).all())


def _of_text(logits: Replayed) -> Replayed:
    """The same with the rows (n, vocab) that are compared alone."""
    if logits.text is None or logits.candidate is None:
        return logits
    kept = logits.compared
    return Replayed(
        logits.site,
        own=kept(logits.own),
        ideal=kept(logits.ideal),
        candidate=kept(logits.candidate),
        truth=kept(logits.truth),
        floor=kept(logits.floor),
        jitter=kept(logits.jitter),
        summands=logits.summands,
        noise=tuple(map(kept, logits.noise)),
        apart=None if logits.apart is None else kept(logits.apart),
    )


def _in_sigmas(candidate: Tensor, ideal: Values, noise: Sequence[Values]) -> float:
    """RMS error over that of stochastic rounding, which is √2 times as large as that of rounding to nearest."""
    flat = [x.flatten(0, -2) for x in (ideal, candidate, *noise)]
    squares = torch.stack(
        [
            torch.stack([(one.to(exact.dtype) - exact).square().sum(dtype=torch.float64) for one in others])
            for exact, *others in row_blocks(*flat)
        ]
    ).sum(0)
    error, *spreads = squares.tolist()
    return float((error / (sum(spreads) / len(noise) / 2)) ** 0.5) if sum(spreads) else 0.0


class _Rows(NamedTuple):
    """Of each token (n): the noise of a difference of two logits, KL, both sides' top tokens, and how much less likely
    the candidate's is in the exact logits.
    """

    noise: Tensor
    kl: Tensor
    chosen: Tensor
    expected: Tensor
    lost: Tensor


def _rows(logits: Replayed) -> _Rows:
    """All tokens in blocks, for a vocabulary is large."""
    assert logits.candidate is not None, "unreachable because the caller has looked"
    sides = (logits.candidate.to(logits.own.device), logits.own, logits.ideal)
    blocks = [_block(*(side.double() for side in block)) for block in row_blocks(*(x.flatten(0, -2) for x in sides))]
    return _Rows(*(torch.cat(part).cpu() for part in zip(*blocks, strict=True)))


def _block(candidate: Tensor, own: Tensor, ideal: Tensor) -> _Rows:
    # The reference's own error, centred because a shift of all logits changes nothing; √2 for a difference of two.
    noise = (own - ideal).std(-1, correction=0) * 2**0.5
    chosen, expected = candidate.argmax(-1), own.argmax(-1)
    right, given = (ideal.gather(-1, token[:, None])[:, 0] for token in (expected, chosen))
    return _Rows(noise, kl_divergence(candidate, own), chosen, expected, right - given)


def _of_margins(logits: Replayed, rows: _Rows) -> Tensor:
    """How far stochastic rounding moves the difference of both sides' top tokens, of each token (n): RMS of the passes.

    0 if no such passes were made.
    """
    moved = torch.zeros(len(rows.lost), dtype=torch.float64)
    for one in logits.noise:
        tokens = [token.to(one.device)[:, None] for token in (rows.expected, rows.chosen)]
        blocks = row_blocks(one.flatten(0, -2), *tokens)
        apart = [
            values.gather(-1, right).double() - values.gather(-1, given).double() for values, right, given in blocks
        ]
        moved += (torch.cat(apart)[:, 0].cpu() - rows.lost).square()
    return (moved / max(len(logits.noise), 1)).sqrt()


def kl_divergence(candidate: Tensor, reference: Tensor) -> Tensor:
    """KL(reference ‖ candidate), in nats, of the distributions that logits (…, vocab) stand for: (…).

    A logit of −inf is a token of probability zero: inf if the candidate excludes a token that the reference allows.
    inf too where a side is not a distribution (NaN, +inf, −inf throughout).
    """
    theirs, ours = candidate.double().log_softmax(-1), reference.double().log_softmax(-1)
    share = ours.exp()
    # In place, for a vocabulary is large; an excluded token has no share in the sum, however far off it is.
    total = ours.sub_(theirs).mul_(share).masked_fill_(share == 0, 0.0).sum(-1)
    return total.clamp_min(0.0).nan_to_num(math.inf, math.inf)


def sample_of(own: Tensor, candidate: Tensor) -> LogitSample:
    """A part of the last token's logits (vocab) that shows the whole: all where there are few."""
    ranked = own.argsort(descending=True, stable=True)
    size = len(ranked)
    chosen = torch.ones(size, dtype=torch.bool)
    if size > _SAMPLE:
        chosen[:] = False
        chosen[candidate.argsort(descending=True, stable=True)[:_LARGEST]] = True
        spaced = torch.linspace(0, size - 1, _SAMPLE - 2 * _LARGEST, dtype=torch.float64).round().long()
        chosen[ranked[:_LARGEST]] = chosen[ranked[spaced]] = True
    shown = ranked[chosen[ranked]]
    # Six digits are more than a picture shows.
    rounded = ([float(f"{value:.6g}") for value in side[shown].tolist()] for side in (own, candidate))
    reference, theirs = map(tuple, rounded)
    return LogitSample(reference, theirs, size)


def _top(logits: Tensor, names: TokenTexts) -> tuple[Token, ...]:
    values, ids = torch.topk(logits, min(_TOP, logits.numel()))
    return tuple(Token(int(i), names(int(i)), float(v)) for i, v in zip(ids, values, strict=True))
