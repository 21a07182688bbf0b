"""What bugs of ports do to the transformers model, for the cases: each changes a model in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

SLIDING, FULL = "sliding_attention", "full_attention"
LONG_FACTORS = [2.0 + 0.7 * i for i in range(8)]


def attentions(model: nn.Module) -> Iterator[Any]:
    """Every attention of the model."""
    return (m for m in model.modules() if type(m).__name__.endswith("Attention"))


def long(model: Any) -> None:
    """Longrope's long factors on a short prompt."""
    rotary = model.get_decoder().rotary_emb
    factors = torch.tensor(LONG_FACTORS)
    rotary.inv_freq = 1.0 / (factors * 1e4 ** (torch.arange(8.0) / 8))
    rotary.original_inv_freq = rotary.inv_freq


def inverted(model: Any) -> None:
    """RoPE where there should be none, and none where it should be."""
    for attention in attentions(model):
        attention.use_rope = not attention.use_rope


def blocks(model: Any) -> None:
    """Cut q, k and v as three blocks, after the fused projection has shown what it returns."""
    for attention in attentions(model):
        own, fused = attention.forward, attention.query_key_value

        class Reordered(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.inner(x)
                return torch.stack(y.reshape(*y.shape[:-1], 3, 5, -1).unbind(-3), -2).flatten(-3)

        def forward(*args: Any, own: Any = own, attention: Any = attention, fused: Any = fused, **kwargs: Any) -> Any:
            attention._modules["query_key_value"] = Reordered(fused)
            try:
                return own(*args, **kwargs)
            finally:
                attention._modules["query_key_value"] = fused

        attention.forward = forward


def one_more(model: nn.Module) -> None:
    """One is added to weights that the norm adds one to."""
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.weight.data += 1  # type: ignore[operator]


def kinds_exchanged(model: Any) -> None:
    """Sliding and full layers change places."""
    for attention in attentions(model):
        attention.sliding_window = None if attention.sliding_window else 20
    layers = model.get_decoder().layers
    kinds = model.config.layer_types
    model.config.layer_types = [FULL if kind == SLIDING else SLIDING for kind in kinds]
    for layer in layers:
        for module in (layer, layer.self_attn):
            for name in ("attention_type", "layer_type"):
                if hasattr(module, name):
                    setattr(module, name, FULL if getattr(module, name) == SLIDING else SLIDING)


def residual(model: Any) -> None:
    """residual_multiplier is not read."""
    for layer in model.get_decoder().layers:
        layer.residual_multiplier = 1.0


def scale(model: Any) -> None:
    """The scale is that of head_dim."""
    for attention in attentions(model):
        attention.scaling = attention.head_dim**-0.5


def layers(model: Any) -> Any:
    """The decoder layers."""
    return model.get_decoder().layers


def positions(make: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """RoPE's tables are made for other positions: `make` gets and gives them, (b, t)."""

    def change(model: Any) -> None:
        rotary = model.get_decoder().rotary_emb
        own = type(rotary).forward
        rotary.forward = lambda x, position_ids, *args, **kwargs: own(rotary, x, make(position_ids), *args, **kwargs)

    return change


def frequencies(make: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """Pairs turn by other angles for each position: `make` gets and gives them, (p)."""

    def change(model: Any) -> None:
        rotary = model.get_decoder().rotary_emb
        rotary.inv_freq = make(rotary.inv_freq.float().clone())
        rotary.original_inv_freq = rotary.inv_freq

    return change


def norm_of_first(model: Any) -> None:
    """One norm of the last layer has the weights of the first."""
    layers(model)[2].input_layernorm.weight.data.copy_(layers(model)[0].input_layernorm.weight.data)


def norm_channel(model: Any) -> None:
    """One channel of one norm has another weight."""
    layers(model)[1].post_attention_layernorm.weight.data[7] *= 1.5


def bias_of_first(model: Any) -> None:
    """Every layer has the bias of the first."""
    first = layers(model)[0].self_attn.q_proj.bias.data.clone()
    for attention in attentions(model):
        attention.q_proj.bias.data.copy_(first)


def bias_added(model: Any) -> None:
    """A bias that the checkpoint does not have."""
    for attention in attentions(model):
        weight = attention.o_proj.weight
        attention.o_proj.bias = nn.Parameter(torch.linspace(-1, 1, len(weight)).to(weight))


def rows(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """The rows of a projection in another order: `make` gets 0, 1, 2, … and gives it."""

    def change(model: Any) -> None:
        for layer in layers(model):
            module = layer.get_submodule(name)
            module.weight.data = module.weight.data[make(torch.arange(len(module.weight)))]

    return change


def columns(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """The columns of a projection in another order."""

    def change(model: Any) -> None:
        for layer in layers(model):
            module = layer.get_submodule(name)
            module.weight.data = module.weight.data[:, make(torch.arange(module.weight.shape[1]))]

    return change


def cut_late(model: Any) -> None:
    """Queries, keys and values are cut out of one fused output a head too late; the last head goes to the queries."""
    for attention in attentions(model):
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        fused = torch.cat([part.weight.data for part in parts]).roll(-attention.head_dim, 0)
        for part, weight in zip(parts, fused.split([len(part.weight) for part in parts]), strict=True):
            part.weight.data = weight.clone()


def ids(make: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """The embedding is given other ids: `make` gets and gives them, (b, t)."""

    def change(model: Any) -> None:
        embedding = model.get_input_embeddings()
        own = type(embedding).forward
        embedding.forward = lambda given: own(embedding, make(given))

    return change


def scale_of_one(model: Any) -> None:
    """The scores of one layer are 1 % too large."""
    layers(model)[1].self_attn.scaling *= 1.01


def capped(cap: float | None) -> Callable[[Any], None]:
    """Scores are capped by another number, or not at all."""

    def change(model: Any) -> None:
        for attention in attentions(model):
            attention.attn_logit_softcapping = cap

    return change


def without_sinks(model: Any) -> None:
    """The sinks were never loaded."""
    for attention in attentions(model):
        attention.sinks.data.zero_()


def experts(**numbers: float) -> Callable[[Any], None]:
    """The experts have other numbers than the config says."""

    def change(model: Any) -> None:
        for layer in layers(model):
            for name, value in numbers.items():
                setattr(layer.mlp.experts, name, value)

    return change
