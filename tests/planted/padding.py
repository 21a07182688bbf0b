"""Bugs of padded batches, planted in copies of `impl`: what hides padding, and where text is counted from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from impl.qwen3 import Cache, Qwen3
from tests.planted.base import ROPE, rebind
from tests.planted.decoding import CONTEXT

# (attention mask (b, s), position ids (b, t), tokens of earlier calls) -> what the model goes by instead
Given = tuple[Tensor, Tensor]
Edit = Callable[[Tensor, Tensor, int], Given]


@dataclass(frozen=True)
class PaddingBug:
    """`apply` plants it; `guilty` are the families that it makes wrong, `faults` its right names.

    `pad` are the sides on which it shows, `options` what else the run needs.
    """

    id: str
    apply: Callable[[Qwen3], None]
    guilty: tuple[str, ...]
    faults: tuple[str, ...]
    pad: tuple[str, ...] = ("left",)
    options: tuple[tuple[str, Any], ...] = ()


def _given(edit: Edit) -> Callable[[Qwen3], None]:
    """The model goes by another mask and other positions than it is given."""

    def apply(model: Qwen3) -> None:
        def forward(
            self: Qwen3,
            input_ids: Tensor,
            cache: Cache | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
        ) -> Tensor:
            if attention_mask is None or position_ids is None:
                return Qwen3.forward(self, input_ids, cache, attention_mask, position_ids)
            mask, positions = edit(attention_mask, position_ids, cache.length if cache else 0)
            return Qwen3.forward(self, input_ids, cache, mask, positions)

        rebind(model, forward)

    return apply


def _columns(positions: Tensor, past: int) -> Tensor:
    return torch.arange(past, past + positions.shape[1]).expand(positions.shape)


def _last_alone(model: Qwen3) -> None:
    """Answers for the last column alone."""

    def forward(self: Qwen3, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return Qwen3.forward(self, input_ids, *args, **kwargs)[:, -1:]

    rebind(model, forward)


def _right_last(model: Qwen3) -> None:
    """Answers for the last token of text alone, which is right."""

    def forward(self: Qwen3, input_ids: Tensor, cache: Any = None, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        logits = Qwen3.forward(self, input_ids, cache, attention_mask, **kwargs)
        if attention_mask is None:
            return logits[:, -1:]
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
        return logits[torch.arange(len(logits)), last][:, None]

    rebind(model, forward)


def _garbage(model: Qwen3) -> None:
    """Padding is not computed: whatever stands there is not a number. Legal."""

    def forward(self: Qwen3, input_ids: Tensor, cache: Any = None, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        if attention_mask is not None:
            padding = attention_mask[:, -input_ids.shape[1] :, None] == 0
            handles = [
                layer.register_forward_hook(lambda _m, _a, out: out.masked_fill(padding, torch.nan))
                for layer in (self.model.norm, self.lm_head)
            ]
        logits = Qwen3.forward(self, input_ids, cache, attention_mask, **kwargs)
        if attention_mask is not None:
            for handle in handles:
                handle.remove()
        return logits

    rebind(model, forward)


BUGS: tuple[PaddingBug, ...] = (
    PaddingBug(
        "positions-count-padding",
        _given(lambda m, p, past: (m, _columns(p, past))),
        ROPE,
        ("position-ignores-padding",),
    ),
    PaddingBug(
        "positions-of-first-row", _given(lambda m, p, _: (m, p[:1].expand_as(p))), ROPE, ("position-first-row",)
    ),
    PaddingBug("positions-off", _given(lambda m, p, _: (m, p + 1)), ROPE, ("position-offset",)),
    PaddingBug(
        "decoded-count-padding",
        _given(lambda m, p, past: (m, _columns(p, past) if past else p)),
        ROPE,
        ("position-decode-counts-padding",),
        ("left",),
        (("decode", 4),),
    ),
    PaddingBug(
        "mask-ignored",
        _given(lambda m, p, _: (torch.ones_like(m), p)),
        CONTEXT,
        ("mask-ignores-padding",),
    ),
    PaddingBug(
        "mask-ignored-in-decoding",
        _given(lambda m, p, past: (torch.ones_like(m) if past else m, p)),
        CONTEXT,
        ("mask-decode-ignores-padding",),
        ("left",),
        (("decode", 4),),
    ),
    PaddingBug(
        "mask-of-first-row", _given(lambda m, p, _: (m[:1].expand_as(m), p)), CONTEXT, ("mask-first-row",),
        ("left", "right"),
    ),
    PaddingBug(
        "mask-on-the-other-side", _given(lambda m, p, _: (m.flip(1), p)), CONTEXT, ("mask-padding-side",),
        ("left", "right"),
    ),
    PaddingBug("answer-at-padding", _last_alone, ("lm_head",), ("last-token-padding",), ("right",)),
)  # fmt: skip

CLEAN: dict[str, Callable[[Qwen3], None]] = {"nan-in-padding": _garbage, "answer-at-text": _right_last}
