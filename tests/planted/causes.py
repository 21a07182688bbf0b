"""What each planted bug should be called, and the number that should be read off it: the bench's ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from impl.qwen3 import Config
from parity.faults import bounds, cache_rows, cache_seen, experts, padding, rope_scaling, rope_tables, router, scans

# The wrong number of a bug, on a checkpoint and a prompt of so many tokens.
Truth = Callable[[Config, int], float]


@dataclass(frozen=True)
class Cause:
    """Ids of the catalogue that are right names for a bug (none: it must stay `unknown`), and its wrong number."""

    faults: tuple[str, ...] = ()
    number: Truth | None = None


def _is(value: float) -> Truth:
    return lambda _config, _tokens: value


# A bug bears the id of its fault, unless several bugs are planted for one fault.
_VARIANTS: dict[str, tuple[str, ...]] = {
    "rope-theta": ("rope-theta-default", "rope-theta-half"),
    "norm-eps": ("norm-eps-1e-5", "norm-eps-1e-3", "norm-eps-1e-3-all"),
    "norm-one-plus-w": ("norm-one-plus-w-final",),
    "norm-skipped": ("norm-skipped-final",),
    "norm-unweighted": ("norm-unweighted-in-file",),
    "qk-norm-skipped": ("qk-norm-skipped-q", "qk-norm-skipped-k"),
    "attention-scale": ("attention-scale-1.01",),
    "window-applied": ("window-applied-32", "window-applied-half", "window-applied-all-but-one"),
    "softcap-applied": ("softcap-applied-50",),
    "weight-rows-for-interleaved": ("weight-rows-for-interleaved-k",),
    "weight-stored-transposed": ("weight-stored-transposed-in-file",),
    "weight-gate-up-exchanged": ("weight-gate-up-exchanged-in-file",),
    "weight-read-as-fp16": ("weight-read-as-fp16-in-file",),
    "weight-bytes-swapped": ("weight-bytes-swapped-in-file",),
    "weight-int8": ("weight-int8-in-file",),
}

# Names of readings: they are no rows of the catalogue.
READINGS = ("bias-other", "columns-reordered")

# Bugs with more than one right name.
_SEVERAL: dict[str, tuple[str, ...]] = {
    # No eps is an eps of zero, and every scale is another scale.
    "norm-eps-missing": ("norm-eps-missing", "norm-eps"),
    "attention-scale-hidden": ("attention-scale-hidden", "attention-scale"),
    "attention-scale-missing": ("attention-scale-missing", "attention-scale"),
    "attention-scale-twice": ("attention-scale-twice", "attention-scale"),
    "embedding-scaled": ("embedding-scaled", "embedding-gain"),
    # One factor on the head's output, whoever put it there.
    "logits-scale": ("logits-scale", "weight-gain"),
    # Read off the values: a constant at each output, and which channel each output is.
    "bias-added": ("bias-other",),
    "file-columns-rolled": ("columns-reordered",),
    # Norms and projections alike.
    "file-layers-off-by-one": ("weight-next-layer", "norm-next-layer"),
}

NUMBERS: dict[str, Truth] = {
    "rope-theta-default": _is(1e4),
    "rope-theta-half": lambda config, _tokens: config.rope_theta / 2,
    "position-offset": _is(1.0),
    "position-offset-q": _is(1.0),
    "position-offset-k": _is(1.0),
    "rope-stretched": _is(2.0),
    "rope-partial-sliced": _is(0.5),
    "rope-partial": _is(0.5),
    "rope-attention-factor": _is(1.25),
    "position-chunk-restart": _is(64.0),
    "position-decode-zero": lambda _config, tokens: tokens - 1,
    "norm-eps-1e-5": _is(1e-5),
    "norm-eps-1e-3": _is(1e-3),
    "norm-eps-1e-3-all": _is(1e-3),
    "norm-eps-missing": _is(0.0),
    "attention-scale-hidden": lambda config, _tokens: (config.hidden_size / config.num_attention_heads) ** -0.5,
    "attention-scale-1.01": lambda config, _tokens: 1.01 * config.head_dim**-0.5,
    "attention-scale-missing": _is(1.0),
    "attention-scale-twice": lambda config, _tokens: 1 / config.head_dim,
    "window-applied-32": _is(32.0),
    "window-applied-half": lambda _config, tokens: tokens // 2,
    "window-applied-all-but-one": lambda _config, tokens: tokens - 1,
    "softcap-applied": _is(30.0),
    "softcap-applied-50": _is(50.0),
    "residual-multiplier": _is(0.5),
    "embedding-scaled": lambda config, _tokens: config.hidden_size**0.5,
    "embedding-gain": _is(1.5),
    "logits-softcap": _is(30.0),
    "logits-scale": _is(1.02),
    "weight-gain": _is(1.01),
}

# Nothing of the kind is in the catalogue.
_UNKNOWN = (
    "norm-mean-size",
    "kv-projections-exchanged",
    "heads-rolled",
    "attention-dropout",
    "act-elu",
    "act-dropout",
    "residual-averaged",
    "embedding-position-added",
    "head-never-loaded",
    "logits-logprobs",
    "weight-nan",
    "channel-zero",
    "sums-bf16-in-fp32",
    "file-int4",
    "file-cut-to-4-bits",
    "file-never-loaded",
)


NAMES: dict[str, tuple[str, ...]] = {
    **{bug: (fault,) for fault, bugs in _VARIANTS.items() for bug in bugs},
    **_SEVERAL,
    **dict.fromkeys(_UNKNOWN, ()),
}


def causes(bugs: Iterable[str]) -> dict[str, Cause]:
    """The cause of each of these bugs, by its id."""
    return {id: Cause(NAMES.get(id, (id,)), NUMBERS.get(id)) for id in bugs}


_DECODING = "several calls: tests.planted.decoding"
_FOREIGN = "another architecture"
_PADDING = "a padded batch: tests.planted.padding"
_WINDOW = "a config with a sliding window, which impl does not implement"

# Faults of the catalogue that are planted nowhere here, and what that would need.
UNPLANTED: dict[str, str] = {
    "attention-sums-fp16": "llama.cpp has it, a loop over keys in float16: tests/e2e/test_gguf.py",
    "products-q8-k-inputs": "rows of 256 numbers: tests/model/test_regimes.py, and llama.cpp in tests/e2e/test_gguf.py",
    "kv-cache-q8-0": "heads of 32 numbers: tests/model/test_regimes.py, and llama.cpp in tests/e2e/test_gguf.py",
    "norm-rounding-order": "nothing: it is legal, the clean variant norm-weight-fp32",
    "head-untied": "a file with a head beside a tied embedding, which impl refuses to load",
    "rope-scaling-ignored": "a config with scaled RoPE, which impl does not implement",
    **{fault.id: _DECODING for fault in cache_seen.FAULTS},
    **dict.fromkeys(("position-decode-ahead", "position-decode-behind", "position-restart"), _DECODING),
    **dict.fromkeys(("position-prefix-twice", "position-retained-rows"), _DECODING),
    **{fault.id: "several calls: tests.planted.caches" for fault in cache_rows.FAULTS},
    **{fault.id: _PADDING for fault in padding.FAULTS},
    **dict.fromkeys(("window-ignored", "window-plus-one", "window-minus-one", "window-of-other-layers"), _WINDOW),
    **dict.fromkeys(("rope-full", "qk-norm-separate", "norm-rms-for-layernorm", "norm-one-forgotten"), _FOREIGN),
    **dict.fromkeys(("attention-scale-head-dim", "sinks-dropped", "softcap-dropped", "act-silu"), _FOREIGN),
    "gate-up-interleaved": _FOREIGN,
    **dict.fromkeys(
        ("parallel-attention-multiplier", "parallel-mlp-multiplier", "branch-multiplier-before-norm"), _FOREIGN
    ),
    **{fault.id: _FOREIGN for fault in (*router.FAULTS, *experts.FAULTS, *scans.FAULTS)},
    **dict.fromkeys(("embedding-scale-missing", "embedding-scale-rounded"), _FOREIGN),
    **{fault.id: _FOREIGN for fault in (*rope_tables.FAULTS, *rope_scaling.FAULTS, *bounds.FAULTS)},
    **dict.fromkeys(("clip-qkv-missing", "temperature-missing", "qkv-in-blocks", "norm-one-twice"), _FOREIGN),
}
