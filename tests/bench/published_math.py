"""Published figures on RoPE in bfloat16, computed again: phases, positions, and what becomes of keys and attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# How a port makes its angles: frequencies rounded and multiplied in float32; all in bfloat16; all in float32.
WAYS = ("frequencies in bfloat16", "all in bfloat16", "all in float32")
_QUERIES = 256  # the last ones, which look furthest back


def frequencies(theta: float, head_dim: int) -> Tensor:
    """RoPE's frequencies in float64, (head_dim / 2,)."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def angles(way: str, theta: float, head_dim: int, tokens: int) -> Tensor:
    """The angles (t, head_dim / 2) that a port computes in one of WAYS, in float64."""
    exact, positions = frequencies(theta, head_dim), torch.arange(tokens, dtype=torch.float64)
    if way == WAYS[0]:
        return (positions.float()[:, None] * exact.bfloat16().float()).double()
    if way == WAYS[1]:
        return (positions.bfloat16()[:, None] * exact.bfloat16()).double()
    return (positions.float()[:, None] * exact.float()).double()


def phase_error(way: str, theta: float, head_dim: int, tokens: int) -> float:
    """The largest error of the phase, in radians up to π, of tables that are stored in bfloat16."""
    made = angles(way, theta, head_dim, tokens)
    cosine, sine = made.cos().bfloat16().double(), made.sin().bfloat16().double()
    exact = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies(theta, head_dim)
    error = torch.remainder(torch.atan2(sine, cosine) - exact + math.pi, 2 * math.pi) - math.pi
    return float(error.abs().max())


def neighbours(position: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """The number that a position becomes in a dtype, and the numbers of that dtype below and above the position."""
    near = torch.tensor(float(position)).to(dtype)
    step = torch.tensor(float("inf"), dtype=dtype)
    below = near if float(near) <= position else torch.nextafter(near, -step)
    above = near if float(near) >= position else torch.nextafter(near, step)
    return float(near), float(below), float(above)


def correlations(way: str, theta: float, head_dim: int, tokens: int) -> tuple[float, float]:
    """PCC of rotated keys, and of one head's output at the last tokens, against exact angles; random q, k, v."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, head_dim, generator=generator) for _ in range(3))
    exact = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies(theta, head_dim)
    made = angles(way, theta, head_dim, tokens)
    keys = [_rotated(k, table) for table in (made, exact)]
    last = slice(max(0, tokens - _QUERIES), tokens)
    heads = [_attended(_rotated(q, table)[last], key, v) for table, key in zip((made, exact), keys, strict=True)]
    return pcc(*keys), pcc(*heads)


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cosine, sine = table.cos().float(), table.sin().float()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head, causal; q are the last of the tokens. The scores have a spread of 1, as random q and k give them."""
    scores = q @ k.T / k.shape[-1] ** 0.5
    number = torch.arange(len(k))
    hidden = number[None] > number[-len(q) :, None]
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def pcc(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of all numbers of two tensors of one shape."""
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])
