"""Which runs the localization bench makes: checkpoints, prompts, dtypes, variants and the layers to plant them in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from impl.qwen3 import Config
from parity.reference.checkpoint import find
from tests.bench.localization_run import Plant, Run
from tests.planted import BUGS, CLEAN, Variant
from tests.planted.kinds import KINDS, checkpoint

TINY = "tiny-qwen3"
DTYPES = ("float32", "bfloat16", "float16")
Tokens = tuple[int, ...]

# The legal variants that are run on both checkpoints with every prompt; the others on the random one with two.
CLEAN_IN_FULL = (
    "plain",
    "sdpa",
    "online-softmax",
    "attention-fp32",
    "q-scaled-first",
    "ops-fp32",
    "norm-weight-fp32",
    "rope-fp32",
    "stream-fp32",
    "split-4",
    "swiglu-fused",
    "batch-3",
)
# The bugs that are run in all layers and in one, in float32 and in bfloat16; the others in all layers in one
# dtype and in one layer in the other, or in one of the two ways if there is but one dtype to see them in.
IN_FULL = (
    "rope-interleaved",
    "rope-theta-default",
    "rope-sin-sign",
    "rope-partial-sliced",
    "rope-skipped",
    "position-offset-q",
    "norm-one-plus-w",
    "norm-eps-1e-3",
    "norm-layernorm",
    "norm-unweighted",
    "norm-exchanged",
    "qk-norm-skipped",
    "qk-norm-after-rope",
    "attention-scale-hidden",
    "attention-scale-missing",
    "mask-none",
    "mask-next-token",
    "window-applied-half",
    "gqa-tile",
    "v-is-k",
    "softmax-plus-one",
    "act-gelu",
    "act-gelu-tanh",
    "act-on-up",
    "residual-dropped-attention",
    "residual-doubled-mlp",
    "mlp-parallel",
    "weight-kv-exchanged",
    "weight-gain",
    "weight-int8",
    "weight-transposed",
    "weight-previous-layer",
)
# On the trained checkpoint, in one layer, with a natural prompt.
BUGS_ON_TINY = (
    "rope-interleaved",
    "rope-theta-half",
    "norm-one-plus-w",
    "qk-norm-skipped",
    "window-applied-half",
    "gqa-tile",
    "act-gelu",
    "residual-dropped-mlp",
    "weight-fp8",
)
# Independent bugs at once, in different layers.
TOGETHER = (
    (("rope-interleaved", 0), ("act-gelu", 2)),
    (("gqa-tile", 1), ("residual-dropped-mlp", 3)),
    (("weight-zero", 3), ("window-applied-32", 1)),
    (("qk-norm-skipped-q", 1), ("act-relu", 0), ("mask-none", 3)),
    (("rope-theta-default", 0), ("softmax-plus-one", 2), ("norm-one-plus-w", 3)),
    (("weight-fp8", 0), ("residual-multiplier", 2), ("position-offset-k", 3)),
)
# With --few, on a device.
FEW = (
    "rope-interleaved",
    "rope-theta-default",
    "norm-one-plus-w",
    "qk-norm-skipped-q",
    "attention-scale-hidden",
    "mask-none",
    "window-applied-half",
    "gqa-tile",
    "act-gelu",
    "residual-dropped-attention",
    "weight-gain",
    "embedding-row",
)


@dataclass(frozen=True)
class Material:
    """Checkpoints by the kind of tests.planted.kinds, or `tiny`; prompts of both models, the longest last."""

    paths: dict[str, str]
    prompts: Sequence[Tokens]
    tiny_prompts: Sequence[Tokens]


def material(folder: Path) -> Material:
    """Make the random checkpoints in a folder."""
    paths = {kind: str(checkpoint(kind, folder, layers=4 if kind == "plain" else 3)) for kind in KINDS}
    short, long = _natural()
    return Material(
        paths | {"tiny": TINY},
        [_tokens(n, 301) for n in (1, 7, 20, 33, 80)],
        [_tokens(1, 1000), short, _tokens(20, 1000), _tokens(33, 1000), long],
    )


def clean_runs(made: Material, *, everything: bool) -> Iterator[Run]:
    """Legal variants on both checkpoints, in every dtype, with every prompt; `everything` adds the slow ones."""
    for kind, prompts in (("tiny", made.tiny_prompts), ("plain", made.prompts)):
        for variant in CLEAN:
            # Compiling takes most of a minute, whatever the prompt.
            if variant.compile and not (everything and kind == "plain"):
                continue
            in_full = everything or variant.id in CLEAN_IN_FULL
            if kind == "tiny" and not in_full:
                continue
            for dtype in _dtypes(variant):
                for tokens in prompts[2:3] if variant.compile else prompts if in_full else prompts[2::2]:
                    yield Run(made.paths[kind], dtype, tokens, (Plant(variant.id),))


def bug_runs(made: Material, *, everything: bool, half: bool) -> Iterator[Run]:
    """Every planted bug on a random checkpoint with a long prompt, some on the trained one; `half` adds float16."""
    configs = {kind: Config.read(find(path).path / "config.json") for kind, path in made.paths.items()}
    for number, bug in enumerate(BUGS):
        kind = next(kind for kind in KINDS if bug.fits(configs[kind]))
        dtypes = (*bug.dtypes, *["float16"] * (half and "bfloat16" in bug.dtypes))
        for plant, dtype in _places(bug, number, dtypes, configs[kind], everything=everything):
            yield Run(made.paths[kind], dtype, made.prompts[-1], (plant,))
    for number, id in enumerate(BUGS_ON_TINY):
        bug = next(b for b in BUGS if b.id == id)
        for dtype in bug.dtypes:
            yield Run(TINY, dtype, made.tiny_prompts[-1], (_one_layer(bug, number, configs["tiny"]),))


def combined_runs(made: Material) -> Iterator[Run]:
    """Two and three independent bugs at once, in different layers."""
    for group in TOGETHER:
        for dtype in ("float32", "bfloat16"):
            plants = tuple(Plant(id, (layer,)) for id, layer in group)
            yield Run(made.paths["plain"], dtype, made.prompts[-1], plants)


def _places(
    bug: Variant, number: int, dtypes: Sequence[str], config: Config, *, everything: bool
) -> Iterator[tuple[Plant, str]]:
    """Where a bug is planted and in which dtypes."""
    one = Plant(bug.id) if bug.everywhere_only else _one_layer(bug, number, config)
    places = [Plant(bug.id), *([] if bug.everywhere_only else [one])]
    if everything or bug.id in IN_FULL:
        yield from ((place, dtype) for place in places for dtype in dtypes)
    elif len(places) == len(dtypes) == 2:
        yield from zip(places, dtypes[:: 1 if number % 2 else -1], strict=True)
    else:
        yield from ((places[number % len(places)], dtype) for dtype in dtypes)


def _one_layer(bug: Variant, number: int, config: Config) -> Plant:
    """The first, the middle or the last layer in which a bug can be."""
    possible = bug.places(config.num_hidden_layers)
    return Plant(bug.id, ((possible[0], possible[len(possible) // 2], possible[-1])[number % 3],))


def _dtypes(variant: Variant) -> tuple[str, ...]:
    """What makes sense in both of the others does in float16."""
    return DTYPES if {"float32", "bfloat16"} <= set(variant.dtypes) else variant.dtypes


def _tokens(count: int, vocabulary: int) -> Tokens:
    return tuple((97 * i * i + 31 * i + 7 * count) % vocabulary for i in range(count))


def _natural() -> tuple[Tokens, Tokens]:
    """A short prompt and a longer one, in words."""
    from transformers import AutoTokenizer

    path = find(TINY).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = (path / "prompts" / "long.txt").read_text()
    return tuple(tokenizer("The capital of France is").input_ids), tuple(tokenizer(text).input_ids[:64])
