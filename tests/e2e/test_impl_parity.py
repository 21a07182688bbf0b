"""impl/ is guarded by parity itself: an item for each layer of the embedded model."""

from __future__ import annotations

import pytest

import parity.testing

_PROMPT = "The capital of France is"

test_impl_in_float32 = parity.testing.cases(candidate="impl.qwen3:load", prompts=[_PROMPT], dtype="float32")
test_impl_in_bfloat16 = parity.testing.cases(candidate="impl.qwen3:load", prompts=[_PROMPT], dtype="bfloat16")
# With its own cache, tokens one by one; and a batch whose shorter row is padded.
test_impl_decoding = pytest.mark.slow(
    parity.testing.cases(candidate="impl.qwen3:load", prompts=[_PROMPT], decode=2, dtype="bfloat16")
)
test_impl_padding = pytest.mark.slow(
    parity.testing.cases(
        candidate="impl.qwen3:load", prompts=[[_PROMPT, "Once upon a time"]], pad="left", decode=2, dtype="float32"
    )
)
