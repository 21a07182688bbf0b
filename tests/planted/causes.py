"""What each planted bug should be called, and the number that should be read off it: the bench's ground truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from impl.qwen3 import Config

# The wrong number of a bug, on a checkpoint and a prompt of so many tokens.
Truth = Callable[[Config, int], float]


@dataclass(frozen=True)
class Cause:
    """Ids of the catalogue that are right names for a bug (none: it must stay `unknown`), and its wrong number."""

    faults: tuple[str, ...] = ()
    number: Truth | None = None


def _is(value: float) -> Truth:
    return lambda _config, _tokens: value


_NAMED: dict[str, str | tuple[str, ...]] = {
    # RoPE and positions
    "rope-interleaved": "rope-interleaved",
    "rope-theta-default": "rope-theta",
    "rope-theta-half": "rope-theta",
    "rope-sign": "rope-sin-sign",
    "rope-sign-k": "rope-sin-sign-k",
    "rope-position-plus-1": "position-offset",
    "rope-position-plus-1-q": "position-offset-q",
    "rope-position-plus-1-k": "position-offset-k",
    "rope-positions-halved": "rope-stretched",
    "rope-partial": "rope-partial-sliced",
    "rope-small-head": "rope-partial",
    "rope-hidden-per-head": "rope-head-dim",
    "rope-tables-larger": "rope-attention-factor",
    "rope-nowhere": "rope-skipped",
    "rope-not-on-q": "rope-skipped-q",
    "rope-not-on-k": "rope-skipped-k",
    "rope-sin-cos-swapped": "rope-sin-cos-exchanged",
    "rope-last-at-zero": "position-decode-zero",
    "rope-restart-64": "position-chunk-restart",
    "rope-phase-bf16": "rope-phase-bf16",
    "rope-phase-fp16": "rope-phase-fp16",
    "rope-inv-freq-bf16": "rope-inv-freq-bf16",
    "rope-tables-bf16": "rope-tables-bf16",
    # norms
    "norm-one-plus-w": "norm-one-plus-w",
    "norm-final-one-plus-w": "norm-one-plus-w",
    "norm-eps-1e-5": "norm-eps",
    "norm-eps-1e-3": "norm-eps",
    "norm-eps-1e-3-all": "norm-eps",
    "norm-eps-outside": "norm-eps-outside",
    # No eps is an eps of zero.
    "norm-no-eps": ("norm-eps-missing", "norm-eps"),
    "norm-layernorm": "norm-layernorm",
    "norm-l2": "norm-length",
    "norm-no-weight": "norm-unweighted",
    "norm-next-layer": "norm-next-layer",
    "norm-previous-layer": "norm-previous-layer",
    "norm-exchanged": "norm-exchanged",
    "norm-skipped": "norm-skipped",
    "norm-final-missing": "norm-skipped",
    "norm-not-upcast": "norm-not-upcast",
    "norm-inverse-bf16": "norm-inverse-bf16",
    "qk-norm-skipped": "qk-norm-skipped",
    "qk-norm-skipped-q": "qk-norm-skipped",
    "qk-norm-skipped-k": "qk-norm-skipped",
    "qk-norm-after-rope": "qk-norm-after-rope",
    "qk-norm-joint": "qk-norm-joint",
    "qk-norm-exchanged": "qk-norm-exchanged",
    # attention
    "attention-scale-hidden": ("attention-scale-hidden", "attention-scale"),
    "attention-scale-1.01": "attention-scale",
    "attention-scale-missing": ("attention-scale-missing", "attention-scale"),
    "attention-scale-twice": ("attention-scale-twice", "attention-scale"),
    "mask-none": "mask-none",
    "mask-next-token": "mask-next-token",
    "mask-hides-self": "mask-hides-self",
    "mask-inverted": "mask-inverted",
    "mask-window-32": "window-applied",
    "mask-window-half": "window-applied",
    "mask-window-off-by-one": "window-applied",
    "gqa-tile": "gqa-tile",
    "gqa-first-v-head": "v-first-head",
    "kv-heads-reversed": "kv-heads-reversed",
    "v-heads-shifted": "v-head-shifted",
    "kv-exchanged-late": "kv-exchanged",
    "v-is-k": "v-is-k",
    "v-rope": "v-rope",
    "heads-last": "heads-split-wrong",
    "heads-merged-wrong": "heads-merged-wrong",
    "softcap-scores": "softcap-applied",
    "softcap-scores-50": "softcap-applied",
    "attention-sink": "softmax-plus-one",
    "softmax-bf16": "softmax-bf16",
    "softmax-stored-bf16": "softmax-bf16",
    "softmax-not-upcast": "softmax-low",
    "kv-fp8": "kv-cache-fp8",
    "kv-int8": "kv-cache-int8",
    # MLP and residual stream
    "act-gelu": "act-gelu",
    "act-gelu-tanh": "act-gelu-tanh",
    "act-quick-gelu": "act-quick-gelu",
    "act-relu": "act-relu",
    "act-sigmoid": "act-sigmoid",
    "act-missing": "act-missing",
    "act-on-up": "act-on-up",
    "mlp-sum": "mlp-sum",
    "mlp-no-up": "mlp-no-up",
    "residual-dropped-attention": "residual-dropped-attention",
    "residual-dropped-mlp": "residual-dropped-mlp",
    "residual-doubled": "residual-doubled-attention",
    "residual-doubled-mlp": "residual-doubled-mlp",
    "attention-ignored": "attention-ignored",
    "mlp-ignored": "mlp-ignored",
    "residual-from-normed-attention": "residual-normed-attention",
    "residual-from-normed-mlp": "residual-normed-mlp",
    "residual-of-input": "residual-input-mlp",
    "residual-half-branches": "residual-multiplier",
    "mlp-of-attention": "mlp-of-attention",
    "mlp-parallel": "mlp-parallel",
    # both ends
    "embed-scaled": ("embedding-scaled", "embedding-gain"),
    "embed-larger": "embedding-gain",
    "embed-row-plus-1": "embedding-row",
    "head-tied-wrongly": "head-tied",
    "head-row-plus-1": "head-row",
    "head-before-norm": "head-before-norm",
    "head-normed-twice": "head-normed-twice",
    "softcap-logits": "logits-softcap",
    # One factor on the head's output, whoever put it there.
    "logits-scaled": ("logits-scale", "weight-gain"),
    # weights and products
    "q-of-next-layer": "weight-next-layer",
    "kv-weights-swapped": "weight-kv-exchanged",
    "gate-up-swapped": "weight-gate-up-exchanged",
    "k-rows-interleaved": "weight-rows-for-interleaved",
    "qk-rows-interleaved": "weight-rows-for-interleaved",
    "weight-column-major": "weight-stored-transposed",
    "weight-read-as-fp16": "weight-read-as-fp16",
    "weight-byte-swapped": "weight-bytes-swapped",
    "weight-1.01": "weight-gain",
    "bias-dropped": "bias-missing",
    "bias-twice": "bias-twice",
    "weights-int8": "weight-int8",
    "sums-bf16": "sums-low",
    "products-tf32": "products-tf32",
    "products-bf16-inputs": "products-bf16-inputs",
    "products-bf16": "products-bf16",
    "products-fp16": "products-fp16",
    "truncation": "outputs-truncated",
    # files
    "file-read-by-columns": "weight-transposed",
    "file-written-by-columns": "weight-stored-transposed",
    "file-pairs-to-halves": "weight-rows-for-halves",
    "file-k-by-query-heads": "weight-k-rows-by-query-heads",
    "file-qk-exchanged": "weight-qk-exchanged",
    "file-gate-up-exchanged": "weight-gate-up-exchanged",
    "file-previous-layer": "weight-previous-layer",
    "file-layers-off-by-one": ("weight-next-layer", "norm-next-layer"),
    "file-bits-as-fp16": "weight-read-as-fp16",
    "file-other-endian": "weight-bytes-swapped",
    "file-int8": "weight-int8",
    "file-fp8": "weight-fp8",
    "file-q8-0": "weight-8bit-blocks",
    "file-cut-to-bf16": "weight-truncated-bf16",
    "file-rounded-to-bf16": "weight-rounded-bf16",
    "file-zero": "weight-zero",
    "file-norm-ones": "norm-unweighted",
}

_NUMBERS: dict[str, Truth] = {
    "rope-theta-default": _is(1e4),
    "rope-theta-half": lambda config, _tokens: config.rope_theta / 2,
    "rope-position-plus-1": _is(1.0),
    "rope-position-plus-1-q": _is(1.0),
    "rope-position-plus-1-k": _is(1.0),
    "rope-positions-halved": _is(2.0),
    "rope-partial": _is(0.5),
    "rope-small-head": _is(0.5),
    "rope-tables-larger": _is(1.25),
    "rope-restart-64": _is(64.0),
    "norm-eps-1e-5": _is(1e-5),
    "norm-eps-1e-3": _is(1e-3),
    "norm-eps-1e-3-all": _is(1e-3),
    "norm-no-eps": _is(0.0),
    "attention-scale-hidden": lambda config, _tokens: (config.hidden_size / config.num_attention_heads) ** -0.5,
    "attention-scale-1.01": lambda config, _tokens: 1.01 * config.head_dim**-0.5,
    "attention-scale-missing": _is(1.0),
    "attention-scale-twice": lambda config, _tokens: 1 / config.head_dim,
    "mask-window-32": _is(32.0),
    "mask-window-half": lambda _config, tokens: tokens // 2,
    "mask-window-off-by-one": lambda _config, tokens: tokens - 1,
    "softcap-scores": _is(30.0),
    "softcap-scores-50": _is(50.0),
    "residual-half-branches": _is(0.5),
    "embed-scaled": lambda config, _tokens: config.hidden_size**0.5,
    "embed-larger": _is(1.5),
    "softcap-logits": _is(30.0),
    "logits-scaled": _is(1.02),
    "weight-1.01": _is(1.01),
}

# Nothing of the kind is in the catalogue.
_UNKNOWN = (
    "norm-mean-size",
    "kv-exchanged",
    "heads-rolled",
    "attention-dropout",
    "act-elu",
    "act-dropout",
    "residual-averaged",
    "embed-position-added",
    "head-never-loaded",
    "logits-logprobs",
    "weight-nan",
    "channel-zero",
    "bias-added",
    "sums-bf16-in-fp32",
    "file-columns-rolled",
    "file-int4",
    "file-cut-to-4-bits",
    "file-never-loaded",
)

CAUSES: dict[str, Cause] = {
    **{id: Cause((names,) if isinstance(names, str) else names, _NUMBERS.get(id)) for id, names in _NAMED.items()},
    **dict.fromkeys(_UNKNOWN, Cause()),
}

_FOREIGN = "another architecture"
_PADDING = "a batch padded on the left"
_WINDOW = "a config with a sliding window, which impl does not implement"

# Faults of the catalogue that are planted nowhere here, and what that would need.
UNPLANTED: dict[str, str] = {
    "norm-rounding-order": "nothing: it is legal, the clean variant norm-weight-fp32",
    "head-untied": "a file with a head beside a tied embedding, which impl refuses to load",
    "rope-scaling-ignored": "a config with scaled RoPE, which impl does not implement",
    **dict.fromkeys(("position-ignores-padding", "position-skips-padding", "mask-first-row"), _PADDING),
    **dict.fromkeys(("window-ignored", "window-plus-one", "window-minus-one", "window-of-other-layers"), _WINDOW),
    **dict.fromkeys(("rope-full", "qk-norm-separate", "norm-rms-for-layernorm", "norm-one-forgotten"), _FOREIGN),
    **dict.fromkeys(("attention-scale-head-dim", "sinks-dropped", "softcap-dropped", "act-silu"), _FOREIGN),
    **dict.fromkeys(("gate-up-interleaved", "moe-not-renormalized", "moe-renormalized"), _FOREIGN),
    **dict.fromkeys(("embedding-scale-missing", "embedding-scale-rounded"), _FOREIGN),
}
