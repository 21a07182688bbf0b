"""The modules of a decoder that faults change, found in any architecture, and the ways of changing them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from parity.faults.fault import Change, Scope, attribute
from parity.record.chain import find_layers

ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")
# Where classes of activations come from; a modeling file that has one of its own calls it by its formula.
_ACTIVATION_SOURCES = ("transformers.activations", "torch.nn.modules.activation")
_FORMULAS = ("gelu", "silu", "relu")
HEAD_SITES = ("lm_head", "embed_out")
EMBEDDING_SITES = ("embed_tokens", "embed_in", "wte")


# -- finding -------------------------------------------------------------------------------------------------


def attention_of(scope: Scope) -> Any:
    """The attention module of the layer; None at the ends or if it has none."""
    return _child(scope.layer, ATTENTION_NAMES)


def mlp_of(scope: Scope) -> Any:
    """The MLP of the layer, a mixture of experts included; None if there is none."""
    return _child(scope.layer, ("mlp", "feed_forward", "block_sparse_moe", "ffn"))


def activation_of(scope: Scope) -> Any:
    """The activation function in the MLP; None if it is not a module."""
    mlp = mlp_of(scope)
    return next((found for m in mlp.modules() if (found := _child(m, ACTIVATION_NAMES))), None) if mlp else None


def activations_of(scope: Scope) -> list[nn.Module]:
    """All activation functions of the layer that are modules, those of experts and mixers included."""
    return [] if scope.layer is None else [m for m in scope.layer.modules() if is_activation(m)]


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function, to judge by its class."""
    kind = type(module)
    is_one = kind.__module__ in _ACTIVATION_SOURCES or any(word in kind.__name__.lower() for word in _FORMULAS)
    return is_one and not any(True for _ in module.children()) and "Softmax" not in kind.__name__


def _child(module: Any, names: tuple[str, ...]) -> Any:
    return next((found for name in names if isinstance(found := getattr(module, name, None), nn.Module)), None)


def norms_of(scope: Scope) -> dict[str, Any]:
    """The norms of the layer by name, or those of the decoder that are in no layer: the final one is the last."""
    if scope.layer is not None:
        return {name: m for name, m in scope.layer.named_modules() if is_norm(m)}
    decoder = scope.model.get_decoder() or scope.model.base_model
    inside = {m for layer in find_layers(scope.model) for m in layer.modules()}
    return {name: m for name, m in decoder.named_modules() if is_norm(m) and m not in inside}


def is_norm(module: Any) -> bool:
    """Whether a module normalizes: it says so, and it has an eps."""
    return isinstance(module, nn.Module) and says_norm(module) and eps_name(module) is not None


def says_norm(module: nn.Module) -> bool:
    """Whether the class of a module calls itself a norm."""
    return "Norm" in type(module).__name__


def eps_name(norm: nn.Module) -> str | None:
    """What a norm calls its eps; None if it has none."""
    names = ("variance_epsilon", "eps", "epsilon", "layer_norm_epsilon")
    return next((name for name in names if isinstance(getattr(norm, name, None), float)), None)


def adds_to_residual(module: nn.Module) -> bool:
    """Whether a module is handed a residual, to which it adds what it computes."""
    return "residual" in inspect.signature(type(module).forward).parameters


def makes_tables(module: nn.Module) -> bool:
    """Whether a module makes RoPE's tables."""
    return hasattr(type(module), "compute_default_rope_parameters")  # a module itself is slow to ask


def linears_of(scope: Scope) -> dict[str, nn.Linear]:
    """The linear projections of the layer by name, or the head at the ends; of those that the scope lets change."""
    if scope.layer is None:
        head = scope.model.get_output_embeddings()
        return {"head": head} if isinstance(head, nn.Linear) and _may_change(scope, head) else {}
    return {n: m for n, m in scope.layer.named_modules() if isinstance(m, nn.Linear) and _may_change(scope, m)}


def _may_change(scope: Scope, module: nn.Module) -> bool:
    sites = scope.sites
    return sites is None or any(m is module and name in sites for name, m in scope.model.named_modules())


def linear(scope: Scope, end: str) -> nn.Linear | None:
    """The linear projection of the layer whose name ends so."""
    return next((m for name, m in linears_of(scope).items() if name.split(".")[-1] == end), None)


def head_dim_of(scope: Scope) -> int:
    """Numbers in one head."""
    attention = attention_of(scope)
    own = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    return int(own or getattr(scope.config, "head_dim", None) or hidden_per_head(scope))


def hidden_per_head(scope: Scope) -> int:
    """Hidden size over heads: what head_dim would be if the config did not say otherwise."""
    return int(scope.config.hidden_size // scope.config.num_attention_heads)


def kv_heads_of(scope: Scope) -> int:
    """Number of key/value heads."""
    heads = scope.config.num_attention_heads
    return int(getattr(scope.config, "num_key_value_heads", None) or heads)


def at_ends(scope: Scope) -> bool:
    """Whether the scope is the ends: embedding, final norm, head."""
    return scope.layer is None


# -- changing ------------------------------------------------------------------------------------------------


def forward(module: nn.Module, new: Callable[..., Any]) -> Change:
    """The module computes `new` during the block, from and to the shapes it had; its hooks stay."""
    return attribute(module, "forward", new)


@contextmanager
def together(*changes: AbstractContextManager[Any]) -> Iterator[None]:
    """Several changes during one block."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


@contextmanager
def entry(kwargs: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """`kwargs[name]` is `value` during the block."""
    before = kwargs[name]
    kwargs[name] = value
    try:
        yield
    finally:
        kwargs[name] = before


@contextmanager
def buffer(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """The buffer `name` of a module holds `value`, of any shape, during the block."""
    before = module._buffers[name]
    module._buffers[name] = value
    try:
        yield
    finally:
        module._buffers[name] = before


# -- weights of other layers -----------------------------------------------------------------------------------


def elsewhere(scope: Scope, parameter: str, step: int) -> Tensor | None:
    """A parameter of the layer as another layer has it, `step` layers on; None if there is none of this name.

    It has the parameter's shape, (out, in) for a linear layer.
    """
    if scope.index is None or not 0 <= scope.index + step < int(scope.config.num_hidden_layers):
        return None
    own = next(name for name, module in scope.model.named_modules() if module is scope.layer)
    try:
        return scope.weight(f"{own.rpartition('.')[0]}.{scope.index + step}.{parameter}")
    except KeyError:
        return None
