"""impl/ is guarded by parity itself: an item for each layer of the embedded model."""

from __future__ import annotations

import parity.testing

_PROMPT = "The capital of France is"

test_impl_in_float32 = parity.testing.cases(candidate="impl.qwen3:load", prompts=[_PROMPT], dtype="float32")
test_impl_in_bfloat16 = parity.testing.cases(candidate="impl.qwen3:load", prompts=[_PROMPT], dtype="bfloat16")
