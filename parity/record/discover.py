"""Which sites a transformers model has, found by watching one forward pass on the meta device.

Nothing is computed and no weight exists: only names, shapes and which tensor is whose. A module's output
is a site when it is a new value; one that merely hands on its child's output is not. An input is a site
when no module returned it: that is how `resid_mid` and `mlp.product` are found in any decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from parity.record.attention import INSIDE, attention_taps
from parity.record.tap import first_tensor, quiet_torch
from parity.sites import Dims, Site, numbered, without_call

# Sites whose last axis is heads and head_dim flattened into one, where they are three-dimensional.
_PER_HEAD = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
_COSTLY = ("scores", "probs")
_SWITCH = (bool, int, float, str)


@dataclass
class _Watch:
    """What the probe has seen so far."""

    batch: int
    token: int
    sites: dict[str, Site] = field(default_factory=dict)
    # Storages by identity; the tensors are kept so that no identity is reused.
    known: dict[int, Tensor] = field(default_factory=dict)

    def is_new(self, value: Tensor) -> bool:
        """Whether no module has returned this value, or a view of it, before."""
        key = value.untyped_storage()._cdata
        fresh = key not in self.known
        self.known[key] = value
        return fresh

    def note(self, name: str, value: Tensor, module: str, where: str, dims: Dims | None = None) -> None:
        """Remember a site, unless its value does not belong to the tokens of this run (RoPE tables)."""
        dims = dims or self.label(name, tuple(value.shape))
        if "batch" in dims or "batch*token" in dims:
            dtype = str(value.dtype).removeprefix("torch.")
            self.sites[name] = Site(name, dims, tuple(value.shape), dtype, module, where)

    def label(self, name: str, shape: tuple[int, ...]) -> Dims:
        """Name the axes of a value by their sizes, which the probe has chosen to be unmistakable."""
        own = {self.batch: "batch", self.token: "token", self.batch * self.token: "batch*token"}
        rest = [size for size in shape if size not in own]
        last = "head*head_dim" if len(rest) == 1 and without_call(name).rsplit(".", 1)[-1] in _PER_HEAD else "feature"
        names = iter(["head", "head_dim"] if len(rest) == 2 else [last] * len(rest))
        return tuple(own[size] if size in own else next(names) for size in shape)


def discover(model: nn.Module, layers: Sequence[nn.Module] = (), *, inner: bool = False) -> tuple[Site, ...]:
    """The sites of a transformers causal LM on the meta device, in order of execution.

    The model must have been built with an attention implementation of `parity.record.attention`.
    Of its decoder `layers` only the first of each kind is run: the others have sites like it.
    `inner` adds scores and probs, which need memory that grows with the square of the tokens.
    Shapes hold the probe's batch and token counts; `with_sizes` puts a run's own in their place.
    """
    batch, token = _unmistakable_sizes(model)
    watch = _Watch(batch, token)
    with quiet_torch(), _watching(model, watch, inner=inner), _one_of_each_kind(model, layers, watch):
        ids = torch.zeros(batch, token, dtype=torch.long, device="meta")
        dtype = next(model.parameters()).dtype
        # A ready mask spares the model from looking at values that the meta device does not have.
        mask = torch.zeros(batch, 1, token, token, dtype=dtype, device="meta")
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if watch.is_new(logits):
            # What the model does to the head's output, a softcap for one, is an operation too.
            watch.note("logits", logits, "", "output")
    return tuple(watch.sites.values())


def with_sizes(sites: Iterable[Site], batch: int, token: int) -> tuple[Site, ...]:
    """The same sites with the shapes that a run of `batch` rows of `token` tokens gives them."""
    sizes = {"batch": batch, "token": token, "key": token, "batch*token": batch * token}
    return tuple(
        replace(site, shape=tuple(sizes.get(dim, size) for dim, size in zip(site.dims, site.shape, strict=True)))
        for site in sites
    )


def _unmistakable_sizes(model: nn.Module) -> tuple[int, int]:
    """A batch and a token count that equal no other size in the model."""
    taken = {size for parameter in model.parameters() for size in parameter.shape}
    config = getattr(model, "config", None)
    taken |= {v for v in vars(config).values() if isinstance(v, int)} if config is not None else set()
    for batch in (3, 5, 7, 11, 13):
        for token in (17, 19, 23, 29, 31, 37, 41, 43):
            if not taken & {batch, token, batch * token}:
                return batch, token
    raise AssertionError("unreachable because no model has all of 40 pairs of primes among its sizes")


@contextmanager
def _watching(model: nn.Module, watch: _Watch, *, inner: bool) -> Iterator[None]:
    attention: dict[nn.Module, dict[str, str]] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if not name:
                continue
            before, after = _hooks(name, watch)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
            wanted = [value for value in INSIDE if inner or value not in _COSTLY]
            attention[module] = {value: f"{name}.{value}" for value in wanted}

        def tap(site: str, value: Tensor) -> Tensor:
            module, inside = site.rsplit(".", 1)
            if watch.is_new(value):
                watch.note(site, value, module, "attention", INSIDE[inside])
            return value

        stack.enter_context(attention_taps(attention, tap))
        yield


@contextmanager
def _one_of_each_kind(model: nn.Module, layers: Sequence[nn.Module], watch: _Watch) -> Iterator[None]:
    """Let a layer that is like one already run answer with its sites, under the layer's own name."""
    names = {module: name for name, module in model.named_modules()}
    run: dict[Any, tuple[str, Any]] = {}

    def forward_of(layer: nn.Module) -> Callable[..., Any]:
        original, kind, name = layer.forward, _kind(layer), names[layer]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if kind not in run:
                run[kind] = name, original(*args, **kwargs)
                return run[kind][1]
            first, output = run[kind]
            for site in [s for s in watch.sites.values() if s.module.startswith(f"{first}.")]:
                own = replace(site, name=name + site.name[len(first) :], module=name + site.module[len(first) :])
                watch.sites[own.name] = own
            return tree_map(lambda value: torch.empty_like(value) if isinstance(value, Tensor) else value, output)

        return forward

    try:
        for layer in layers:
            layer.forward = forward_of(layer)
        yield
    finally:
        for layer in layers:
            del layer.forward


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """All that tells one layer from another but its number: classes, sizes and switches of its modules."""
    return tuple(
        (
            name,
            type(module),
            tuple(p.shape for p in module._parameters.values() if p is not None),
            tuple((k, v) for k, v in vars(module).items() if k != "layer_idx" and isinstance(v, _SWITCH)),
        )
        for name, module in layer.named_modules()
    )


def _hooks(name: str, watch: _Watch) -> tuple[Any, Any]:
    calls = {"input": count(), "output": count()}

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        call = next(calls["input"]) if value is not None else 0
        if value is not None and value.is_floating_point() and watch.is_new(value):
            watch.note(numbered(_name_of_input(name), call), value, name, "input")

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        value = first_tensor(output)
        call = next(calls["output"]) if value is not None else 0
        if value is not None and watch.is_new(value):
            watch.note(numbered(name, call), value, name, "output")

    return before, after


def _name_of_input(module: str) -> str:
    """The name of a value that only arithmetic between modules made, from the module that takes it in."""
    parent, _, child = module.rpartition(".")
    in_layer = parent.rpartition(".")[2].isdigit()
    if in_layer:
        return f"{parent}.resid_mid"
    return f"{parent}.product" if child == "down_proj" else f"{module}.input"
