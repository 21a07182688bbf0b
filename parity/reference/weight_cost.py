"""Which quantized tensor costs most: how far each of them, put into the checkpoint's own model alone, moves the logits.

One walk through the pieces serves all: hidden states of the model as it is flow beside those of one model for each
tensor so far, which differs from it in this tensor alone. So for n layers of k tensors k · n² / 2 layers are run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from parity.reference.batch import Batch
from parity.reference.checkpoint import Checkpoint
from parity.reference.pieces import Piece, PiecewiseModel
from parity.reference.sharing import shares


@torch.no_grad()
def weight_costs(checkpoint: Checkpoint, batch: Batch, device: str, attention: str) -> dict[str, float]:
    """‖logits with one tensor quantized − logits‖ / ‖logits‖ in float32, by the tensor's name; over text alone.

    Empty where `checkpoint.weights` are not quantized, and for a model whose layers share more than hidden states.
    """
    model = PiecewiseModel(replace(checkpoint, weights=None), torch.float32, device, attention)
    model.prepare(batch)
    if any(shares(model.arguments(piece)) for piece in model.pieces if isinstance(piece, int)):
        return {}
    plain: Tensor | None = None
    moved: dict[str, Tensor] = {}
    ends: dict[str, Tensor] = {}  # what is held outside the layers may be used at both ends
    for piece in model.pieces:
        with model.loaded(piece):
            own = _quantized(model, piece, checkpoint)
            ends |= own if not isinstance(piece, int) else {}
            for name in {**moved, **own}:
                numbers = {**own, **({} if isinstance(piece, int) else ends)}.get(name)
                with nullcontext() if numbers is None else _holding(model.model, name, numbers):
                    moved[name] = _run(model, piece, batch, moved.get(name, plain))
            plain = _run(model, piece, batch, plain)
    assert plain is not None, "unreachable because a model has pieces"
    size = float(_text(plain, batch).norm()) or 1.0
    return {name: float((_text(logits, batch) - _text(plain, batch)).norm()) / size for name, logits in moved.items()}


def _run(model: PiecewiseModel, piece: Piece, batch: Batch, hidden: Tensor | None) -> Tensor:
    return model.run(piece, batch, hidden, lambda _site, value: value)


def _text(logits: Tensor, batch: Batch) -> Tensor:
    """Logits (n, vocab) at what is no padding, of (b, t, vocab)."""
    wide = logits.double().cpu()
    return wide.flatten(0, 1) if batch.text is None else wide[batch.text.cpu()]


def _quantized(model: PiecewiseModel, piece: Piece, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The numbers of a piece's quantized tensors, each under the first of its names."""
    weights = checkpoint.weights
    if weights is None:
        return {}
    inside = {id(p) for layer in model.layers for p in layer.parameters()}
    mine = {id(p) for p in model.layers[piece].parameters()} if isinstance(piece, int) else None
    found: dict[str, Tensor] = {}
    for name, parameter in model.model.named_parameters():
        is_here = id(parameter) in mine if mine is not None else id(parameter) not in inside
        if is_here and weights.format(name) and weights.as_kept(name, parameter.cpu()) is None:
            numbers: Any = weights.tensor(name)
            found[name] = numbers.to(parameter.device)
    return found


@contextmanager
def _holding(model: nn.Module, name: str, numbers: Tensor) -> Iterator[None]:
    """The model with other numbers in one parameter, and so wherever that is tied to."""
    parameter = model.get_parameter(name)
    before = parameter.data
    parameter.data = numbers
    try:
        yield
    finally:
        parameter.data = before
