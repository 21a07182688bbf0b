"""A model while it is probed: with weights that take no memory, and afterwards as it was before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_SMALL = 1 << 16  # a model may write into its small buffers, so they are real


@contextmanager
def weightless(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers that lie on the meta device are numbers on the CPU in the block.

    The rows of each are windows on one vector of random numbers: where a model asks for values, as a router does,
    tokens go different ways.
    """
    modules = list(model.modules())
    before = [(dict(m._parameters), dict(m._buffers)) for m in modules]
    generator = torch.Generator().manual_seed(0)
    try:
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[name] = nn.Parameter(_windows(parameter, generator), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = _windows(buffer, generator)
        yield
    finally:
        for module, (parameters, buffers) in zip(modules, before, strict=True):
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _windows(like: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of the same shape and dtype whose element [i, j, …] is the (i + j + …)th of random numbers."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    count = 1 + sum(size - 1 for size in like.shape)
    numbers = torch.randn(count, generator=generator)
    # What has one axis is a norm's weight or a bias, and decides nothing.
    numbers = numbers / math.sqrt(like.shape[-1]) if like.dim() > 1 else 1 + numbers / 64
    windows = numbers.to(like.dtype).as_strided(like.shape, (1,) * like.dim())
    return windows.contiguous() if like.numel() <= _SMALL else windows


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """What a forward pass leaves in modules (RoPE tables made for its length) is gone after the block."""
    modules = list(model.modules())
    before = [(dict(vars(m)), dict(m._buffers), set(m._non_persistent_buffers_set)) for m in modules]
    try:
        yield
    finally:
        for module, (attributes, buffers, passing) in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
            for kept, was in ((module._buffers, buffers), (module._non_persistent_buffers_set, passing)):
                kept.clear()
                kept.update(was)  # type: ignore[arg-type]
