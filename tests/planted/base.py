"""What a planted variant is, and the helpers that plant one."""

from __future__ import annotations

import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from impl.qwen3 import Attention, Cache, Config, DecoderLayer, Qwen3, RMSNorm, load, read_weights, rotate

Change = Callable[[Qwen3, Sequence[int]], None]
# (tensors of a checkpoint by name, its config, layers): what a conversion script does to the file
Damage = Callable[[dict[str, Tensor], Config, Sequence[int]], None]
BOTH = ("bfloat16", "float32")
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
ROPE = ("self_attn.q_rope", "self_attn.k_rope")
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Variant:
    """One change to a freshly loaded model: a bug to be found, or a legal difference to be tolerated.

    `guilty` are the sites that are wrong on their own recorded inputs: names inside a layer ("" for its output)
    or whole names outside the layers. `inner` replaces `self_attn.context` among them where scores and probs
    are recorded as well. `kind` is `bug`, `precision`, `rounding-mode`, `nonfinite` or `clean`. `dtypes` are
    those of the reference in which a long prompt shows it, or in which a clean run makes sense. `needs` is
    `no bias`, `untied`, `wide` or `mha` where the checkpoint must be so (the last two: tests.planted.kinds).
    `damage` is done to the checkpoint's file before the port loads it. `step` is not 0 where weights come from
    that many layers on, which the last layers (or the first) do not have.

    The last five fields are how a legal variant is run. `build` sees to `compile` (the end of the names of the
    modules to compile, `.` for the whole model) and `engine_dtype`; the rest is up to the caller.
    """

    id: str
    about: str
    guilty: tuple[str, ...]
    apply: Change
    kind: str = "bug"
    inner: tuple[str, ...] = ()
    everywhere_only: bool = False
    note: str = ""
    dtypes: tuple[str, ...] = BOTH
    min_tokens: int = 1
    needs: str = ""
    damage: Damage | None = None
    step: int = 0
    batch: int = 1
    threads: int | None = None
    compile: str = ""
    engine_dtype: str = ""
    dump_dtype: str = ""

    def guilty_sites(self, layers: Iterable[int], *, inner: bool = False) -> set[str]:
        """Full names of the sites that are wrong when the variant is planted in `layers`."""
        names = self.guilty
        if inner and self.inner:
            names = (*(n for n in names if n != "self_attn.context"), *self.inner)
        ends = {n for n in names if is_end(n)}
        inside = [n for n in names if not is_end(n)]
        return ends | {f"model.layers.{i}.{n}".rstrip(".") for i in layers for n in inside}

    def fits(self, config: Config) -> bool:
        """Whether a checkpoint has what this variant changes."""
        return {
            "": True,
            "wide": config.attention_bias,
            "mha": config.num_key_value_heads == config.num_attention_heads,
            "no bias": not config.attention_bias,
            "untied": not config.tie_word_embeddings,
        }[self.needs]

    def places(self, count: int) -> tuple[int, ...]:
        """The layers, of so many, in which the variant can be planted."""
        return tuple(i for i in range(count) if 0 <= i + self.step < count)


def is_end(name: str) -> bool:
    """Whether a guilty name stands outside the layers."""
    return name == "lm_head" or name.startswith("model.")


def build(
    variant: Variant, model_dir: str | Path, dtype: str = "bfloat16", layers: Sequence[int] | None = None
) -> nn.Module:
    """A freshly loaded model with the variant planted in `layers` (all of them unless given)."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(model_dir) if variant.damage is None else damaged(variant.damage, Path(model_dir), layers, folder)
        model = load(source, variant.engine_dtype or dtype)
    variant.apply(model, range(model.config.num_hidden_layers) if layers is None else layers)
    if variant.compile:
        compile_modules(model, variant.compile)
    return model


def damaged(damage: Damage, model_dir: Path, layers: Sequence[int] | None, folder: str) -> Path:
    """A copy of a checkpoint in `folder`, with some of its numbers changed."""
    config, tensors = Config.read(model_dir / "config.json"), read_weights(model_dir)
    damage(tensors, config, range(config.num_hidden_layers) if layers is None else layers)
    # Tied heads share memory, and views have strides; a file has neither.
    save_file(
        {name: w.clone(memory_format=torch.contiguous_format) for name, w in tensors.items()},
        f"{folder}/model.safetensors",
    )
    (Path(folder) / "config.json").write_text((model_dir / "config.json").read_text())
    return Path(folder)


def unchanged(_model: Qwen3, _layers: Sequence[int]) -> None:
    """Nothing: the variant lies in its checkpoint, or in how the model is run."""


def compile_modules(model: Qwen3, name: str) -> None:
    """Compile in place every module whose name ends in `name`, or the whole model for `.`."""
    if name == ".":
        model.compile()
        return
    for full, module in list(model.named_modules()):
        if full.endswith(name):
            module.compile()


@torch.no_grad()
def observe(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Outputs of all modules of one forward pass, by name; the logits are those of `lm_head`.

    They are copies: a model may write into what its modules have returned.
    """
    seen: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name] = output.clone()

        return hook

    handles = [m.register_forward_hook(hook_of(n)) for n, m in model.named_modules() if n]
    try:
        model(input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Another number of torch threads during the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- planting ----------------------------------------------------------------------------------------------


def rebind(module: nn.Module, forward: Callable[..., Tensor], method: str = "forward") -> None:
    """Replace a method of this one instance; weights, children and hooks stay."""
    setattr(module, method, types.MethodType(forward, module))


def set_weight(module: nn.Module, weight: Tensor, name: str = "weight") -> None:
    """Replace a parameter by numbers of its own memory, in the dtype it had."""
    old: Tensor = module.weight  # type: ignore[assignment]
    setattr(module, name, nn.Parameter(weight.to(old.dtype).clone(), requires_grad=False))


def get(model: Qwen3, layer: int, name: str) -> Any:
    """A module inside a layer by its name there."""
    return model.model.layers[layer].get_submodule(name)


def replaced(name: str, forward: Callable[..., Tensor], method: str = "forward") -> Change:
    """A change that replaces a method of one module in each layer."""

    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        for i in layers:
            rebind(get(model, i, name) if name else model.model.layers[i], forward, method)

    return apply


def both(*changes: Change) -> Change:
    """Several changes at once."""

    def apply(model: Qwen3, layers: Sequence[int]) -> None:
        for change in changes:
            change(model, layers)

    return apply


def norms(model: Qwen3, layers: Sequence[int]) -> Iterator[RMSNorm]:
    """All norms of the given layers, and the final one."""
    for i in layers:
        for name in LAYER_NORMS:
            yield get(model, i, name)
    yield model.model.norm


@dataclass(frozen=True)
class Place:
    """What RoPE needs beside the heads: the reference's tables (t, d) and the positions (t)."""

    cos: Tensor
    sin: Tensor
    positions: Tensor


Turn = Callable[[Attention, str, Tensor, Place], Tensor]


def plain_turn(_self: Attention, _which: str, x: Tensor, place: Place) -> Tensor:
    """RoPE as it should be, for heads x (b, h, t, d)."""
    return rotate(x, place.cos, place.sin)


def place_of(attention: Attention, cos: Tensor, sin: Tensor, cache: Cache | None) -> Place:
    """Tables and positions of the tokens at hand."""
    past = cache.layers[attention.layer][0].shape[2] if cache and attention.layer in cache.layers else 0
    return Place(cos, sin, torch.arange(past, past + cos.shape[0], device=cos.device))


def attention_with(turn: Turn) -> Callable[..., Tensor]:
    """An attention forward whose RoPE is `turn(module, "q" or "k", heads, place)`."""

    def forward(self: Attention, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        b, t, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, t, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, t, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        place = place_of(self, cos, sin, cache)
        q, k = self.q_rope(turn(self, "q", q, place)), self.k_rope(turn(self, "k", k, place))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        k, v = self.cache_k(k), self.cache_v(v)
        out: Tensor = self.o_proj(self.context(self.attend(q, k, v, mask)).reshape(b, t, -1))
        return out

    return forward


__all__ = [
    "BOTH",
    "LAYER_NORMS",
    "LINEARS",
    "ROPE",
    "Attention",
    "Cache",
    "Change",
    "Damage",
    "DecoderLayer",
    "Place",
    "Qwen3",
    "RMSNorm",
    "Turn",
    "Variant",
    "attention_with",
    "both",
    "build",
    "get",
    "is_end",
    "norms",
    "observe",
    "place_of",
    "plain_turn",
    "rebind",
    "replaced",
    "set_weight",
    "threads",
    "unchanged",
]
