"""Bugs that fit any decoder: each changes a live model of transformers in one place, by what its modules are.

None shares code with parity. A bug tells by which names of the catalogue it may go, and which sites may be wrong
with it beside the first that changes.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor, nn

SCALES = ("scaling", "scale", "softmax_scale", "inv_norm_factor", "scale_attn")
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation_func", "gelu_impl", "activation")
ROTATED = ("q_rope", "k_rope", "q_rotated", "k_rotated")
_BRANCH = ("residual-multiplier", "parallel-attention-multiplier", "branch-multiplier-before-norm", "mlp-multiplier")


@dataclass(frozen=True)
class Bug:
    """One bug. `names` are right ids of the catalogue; `place` is the module that was changed.

    spreads  how far the wrong operation reaches: to the first changed site alone, to its `family` in every layer, or
             to all sites `inside` of the changed module's parent
    """

    id: str
    names: tuple[str, ...]
    place: str = ""
    spreads: str = "site"


Plant = Callable[[nn.Module], Bug | None]


def layers_of(model: nn.Module) -> str:
    """The name of the list of decoder layers: of all lists the one with most parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return max(lists, key=lambda name: (sum(p.numel() for p in lists[name].parameters()), -len(name)))


def _in_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the layers, those of the last layer first; within a layer in their order."""
    start = layers_of(model)
    for number in reversed(range(len(model.get_submodule(start)))):  # type: ignore[arg-type]
        prefix = f"{start}.{number}"
        for name, module in model.get_submodule(prefix).named_modules():
            yield f"{prefix}.{name}" if name else prefix, module


def attention_scale(model: nn.Module) -> Bug | None:
    """Scores of the last attention are multiplied by 1.1 times the right factor."""
    for name, module in _in_layers(model):
        if "attention" not in type(module).__name__.lower():
            continue
        for attribute in SCALES:
            value = getattr(module, attribute, None)
            if isinstance(value, (float, Tensor)) and not isinstance(value, nn.Parameter):
                setattr(module, attribute, value * 1.1)
                return Bug("attention scale", ("attention-scale",), name)
    return None


def other_theta(config: Any) -> Bug | None:
    """RoPE uses three times the theta; set in the config before the model is made from it, so scaling is as it was."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    tables = [table for table in (rope, *rope.values()) if isinstance(table, dict) and "rope_theta" in table]
    for table in tables:
        table["rope_theta"] *= 3
    return Bug("RoPE theta", ("rope-theta",), spreads="family") if tables else None


def activation(model: nn.Module) -> Bug | None:
    """The last MLP or experts have GELU where SiLU was, and SiLU elsewhere."""
    for name, module in _in_layers(model):
        if any(word in type(module).__name__.lower() for word in ("mamba", "mixer", "deltanet", "conv", "attention")):
            continue
        for attribute in ACTIVATIONS:
            value = getattr(module, attribute, None)
            if isinstance(value, nn.Module):
                is_silu = "silu" in type(value).__name__.lower()
                setattr(module, attribute, nn.GELU() if is_silu else nn.SiLU())
                return Bug("activation", ("act-gelu",) if is_silu else ("act-silu",), name, "inside")
    return None


def router_choice(model: nn.Module) -> Bug | None:
    """The last router chooses one expert fewer, or two where it chose one."""
    for name, module in _in_layers(model):
        value = next((v for key in ("top_k", "num_experts_per_tok") if (v := getattr(module, key, None))), None)
        if not isinstance(value, int) or not isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        if "Phimoe" in type(module).__name__:  # whose router does not ask how many

            def best_alone(x: Tensor, own: Callable[..., Any] = module.forward) -> Any:
                logits, weights, index = own(x)
                return logits, weights[:, :1], index[:, :1]

            module.forward = best_alone  # type: ignore[method-assign]
        else:
            module.top_k = value - 1 if value > 1 else 2  # type: ignore[assignment]
        return Bug("router's choice", ("moe-top-k",), name, "inside")
    return None


def router_weights(model: nn.Module) -> Bug | None:
    """The last router makes the weights add up to one, or no longer does; or its factor is one."""
    for name, module in _in_layers(model):
        value = getattr(module, "norm_topk_prob", None)
        if isinstance(value, bool):
            module.norm_topk_prob = not value  # type: ignore[assignment]
            return Bug("router's weights", ("moe-not-renormalized" if value else "moe-renormalized",), name, "inside")
        factor = getattr(module, "routed_scaling_factor", None)
        if isinstance(factor, float) and not math.isclose(factor, 1.0):
            module.routed_scaling_factor = 1.0  # type: ignore[assignment]
            return Bug("router's weights", ("moe-scaling-factor",), name, "inside")
    return None


def norm_eps(model: nn.Module) -> Bug | None:
    """The first norm of the last layer that has one adds 0.1."""
    for name, module in _in_layers(model):
        if not type(module).__name__.endswith("Norm"):
            continue
        for attribute in ("variance_epsilon", "eps"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.1)
                return Bug("norm eps", ("norm-eps",), name)
    return None


def _scale_branch(module: nn.Module) -> None:
    """What a branch gives is multiplied by 1.2; where it adds to the residual itself, before that."""
    if hasattr(module, "output") and hasattr(module.output, "LayerNorm"):
        block = module.output

        def added(hidden: Tensor, residual: Tensor) -> Any:
            return block.LayerNorm(block.dense(hidden) * 1.2 + residual)  # type: ignore[operator]

        block.forward = added  # type: ignore[method-assign]
        return
    own, source = module.forward, sys.modules[type(module).__module__]
    adds = "residual" in inspect.signature(own).parameters

    def scaled(*args: Any, **kwargs: Any) -> Any:
        if adds:
            with mock.patch.object(source, "dropout_add", lambda x, residual, *_: residual + x * 1.2):
                return own(*args, **kwargs)
        output = own(*args, **kwargs)
        return (output[0] * 1.2, *output[1:]) if isinstance(output, tuple) else output * 1.2

    module.forward = scaled  # type: ignore[method-assign]


def residual_branch(model: nn.Module) -> Bug | None:
    """What the last layer's attention, mixer or MLP gives is multiplied by 1.2 before it is added."""
    start = layers_of(model)
    number = len(model.get_submodule(start)) - 1  # type: ignore[arg-type]
    for name, module in model.get_submodule(f"{start}.{number}").named_children():
        kind = type(module).__name__.lower()
        if not any(word in kind for word in ("attention", "attn", "mixer", "mlp", "deltanet", "conv", "mamba")):
            continue
        if kind.endswith("norm"):
            continue
        _scale_branch(module)
        return Bug("residual branch", _BRANCH, f"{start}.{number}.{name}")
    return None


PLANTS: tuple[Plant, ...] = (
    attention_scale,
    activation,
    router_choice,
    router_weights,
    norm_eps,
    residual_branch,
)
