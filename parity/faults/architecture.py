"""What only some architectures have, forgotten: clipping, temperatures, fused layouts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from parity.faults.fault import Change, Fault, Scope, attribute, fault
from parity.faults.patches.modules import attention_of, forward


@fault(
    id="clip-qkv-missing",
    title="queries, keys and values are not clipped; the reference clips what the projections return",
    sites=("q_norm", "k_norm", "q_rope", "k_rope", "context"),
    fix="clamp q, k and v to ±clip_qkv of config.json after their projections",
    source="vllm#35523",
    needs="projections beyond the bound",
    applies=lambda s: attention_of(s) is not None and bool(getattr(s.config, "clip_qkv", None)),
)
def clip_qkv_missing(scope: Scope) -> Change:
    return attribute(attention_of(scope).config, "clip_qkv", None)


def _has_temperature(scope: Scope) -> bool:
    attention = attention_of(scope)
    return bool(getattr(attention, "attn_temperature_tuning", False)) and not getattr(attention, "use_rope", True)


@fault(
    id="temperature-missing",
    title="queries of a layer without RoPE are not scaled by their position",
    sites=("q_rope", "scores", "context"),
    fix="multiply q by 1 + attn_scale * log(1 + floor((position + 1) / floor_scale)) where the layer has no RoPE",
    source="TensorRT-LLM#3491",
    needs="a prompt longer than floor_scale",
    applies=_has_temperature,
)
def temperature_missing(scope: Scope) -> Change:
    return attribute(attention_of(scope), "attn_temperature_tuning", False)


# -- fused projections -----------------------------------------------------------------------------------------


class _InBlocks(nn.Module):
    """A projection whose rows are read as all queries, all keys, all values: put into the order by heads."""

    def __init__(self, inner: nn.Module, heads: int) -> None:
        super().__init__()
        self.inner, self.heads = inner, heads

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, 3 * heads * d) in blocks to the same by heads."""
        out: Tensor = self.inner(x)
        blocks = out.reshape(*out.shape[:-1], 3, self.heads, -1)
        return blocks.transpose(-3, -2).flatten(-3)


def _is_fused_by_heads(scope: Scope) -> bool:
    attention = attention_of(scope)
    fused = getattr(attention, "query_key_value", None)
    return isinstance(fused, nn.Linear) and type(attention).__name__.startswith("GPTNeoX")


@fault(
    id="qkv-in-blocks",
    title="the fused projection is cut into three blocks; it holds q, k and v of one head after another",
    sites=("q_rope", "k_rope", "scores", "context"),
    fix="view the output as (heads, 3, head_dim), or reorder the rows when converting the checkpoint",
    source="bumblebee#204",
    applies=_is_fused_by_heads,
)
def qkv_in_blocks(scope: Scope) -> Change:
    attention = attention_of(scope)
    blocks, own = _InBlocks(attention.query_key_value, int(scope.config.num_attention_heads)), attention.forward

    def compute(*args: Any, **kwargs: Any) -> Any:
        # Only now: what the projection returns is right, and has been recorded under its own name.
        with attribute(attention, "query_key_value", blocks):
            return own(*args, **kwargs)

    return forward(attention, compute)


FAULTS: tuple[Fault, ...] = (
    clip_qkv_missing,
    temperature_missing,
    qkv_in_blocks,
)
