"""The logit lens: what the model would say if it ended after each layer.

nostalgebraist, "interpreting GPT: the logit lens" (2020): the hidden states that go into a layer are given to the
model's own final norm and head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parity.dump import Dump
from parity.errors import IncomparableError, UsageError
from parity.reference.batch import Batch
from parity.reference.checkpoint import find
from parity.reference.pieces import HEAD, PiecewiseModel
from parity.reference.tokenizer import TokenTexts
from parity.show.layout import layout


@dataclass(frozen=True)
class LensLine:
    """What the last token of the first sequence would be followed by, read off one site of the residual stream.

    share   probability of `text`, the likeliest token
    rank    of the token that the model says in the end, from 1
    nats    KL divergence of the final distribution from this one
    """

    site: str
    text: str
    share: float
    rank: int
    nats: float


def logit_lens(dump: Dump, model: str, *, trust_remote_code: bool = False) -> tuple[LensLine, ...]:
    """A line for each recorded site of the stream between layers, in order.

    Raises UsageError where the model is not a chain of layers or nothing of its stream was recorded, ModelError where
    there is no such model, IncomparableError where the dump says that it holds another one.
    """
    checkpoint = find(model, trust_remote_code=trust_remote_code)
    theirs = dump.info.fingerprint
    if theirs is not None and theirs != (ours := checkpoint.fingerprint()):
        raise IncomparableError(
            f"{dump.path}: holds other weights than --model {checkpoint.name} (fingerprint {theirs}, not {ours}). "
            "Give the checkpoint that was recorded."
        )
    built = PiecewiseModel(checkpoint, torch.float32)
    if not built.is_cut:
        raise UsageError(f"{checkpoint.name}: its layers are no plain chain: it has no lens. Leave --model out.")
    sources = [site for piece in built.pieces if (site := built.source_of(piece)) is not None]
    recorded = [site for site in dict.fromkeys(sources) if site in dump.entries]
    last = sources[-1]
    if last not in recorded:
        raise UsageError(f"{dump.path}: does not hold {last}, from which the model speaks. Record the layers' outputs.")
    width, found = built.config.hidden_size, dump.entries[last].shape
    if any(layout(dump.entries[site], dump.info).width != width for site in recorded):
        raise IncomparableError(f"{dump.path}: {last} has shape {found}, but {checkpoint.name} has {width} channels.")
    names = TokenTexts()
    names.read(checkpoint.path)
    with built.loaded(HEAD):
        logits = [built.head(_ANY, _last_token(dump, site), lambda _site, value: value)[0, -1] for site in recorded]
    return tuple(_lines(recorded, torch.stack(logits).double(), names))


# Of the token before the head nothing but its hidden states matters.
_ANY = Batch.of(torch.zeros(1, 1, dtype=torch.long))


def _last_token(dump: Dump, site: str) -> Tensor:
    """Hidden states (1, 1, hidden) of the last token of text of the first sequence."""
    lies = layout(dump.entries[site], dump.info)
    rows = np.transpose(dump.read(site), (*lies.rows, *lies.channels)).reshape(-1, *lies.sequences[1:], lies.width)[0]
    mask = dump.info.attention_mask
    place = int(np.flatnonzero(mask[0])[-1]) if mask is not None and lies.has_token else -1
    return torch.from_numpy(np.array(rows[place], dtype=np.float32))[None, None]


def _lines(sites: list[str], logits: Tensor, names: TokenTexts) -> list[LensLine]:
    """The lines of logits (site, vocabulary); the last site is what the model says in the end."""
    logs = logits.log_softmax(-1)
    final = int(logits[-1].argmax())
    lines = []
    for site, row in zip(sites, logs, strict=True):
        top = int(row.argmax())
        # What has no share in the end adds nothing, however unlikely it was.
        kl = torch.where(logs[-1].exp() > 0, logs[-1].exp() * (logs[-1] - row), 0.0).sum()
        lines.append(
            LensLine(site, names(top), float(row[top].exp()), 1 + int((row > row[final]).sum()), max(float(kl), 0.0))
        )
    return lines
