"""Which sites a transformers model has, found by watching one forward pass on the meta device.

Nothing is computed and no weight exists: only names, shapes and which tensor is whose. A module's output
is a site when it is a new value; one that merely hands on its child's output is not. An input is a site
when no module returned it: that is how `resid_mid` and `mlp.product` are found in any decoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from parity.errors import ModelError
from parity.record.attention import INSIDE, attention_taps
from parity.record.cache import CACHE
from parity.record.chain import Chain, kind_of, taken, watch_chain
from parity.record.experts import experts_in
from parity.record.scans import SCAN, scan_taps, scanning_modules
from parity.record.tap import first_tensor, quiet_torch
from parity.record.watch import NoToQuestions, Watch
from parity.record.weightless import as_it_was, weightless
from parity.sites import CALL, Site, numbered, without_call

COSTLY = (".scores", ".probs")
_COUNTED = ("batch", "token", "key", "batch*token", CALL)  # the axes whose sizes are those of a run
# What a forward pass raises where a value is asked for that the meta device does not have, or a mask does not fit.
_REFUSALS = (RuntimeError, ValueError, IndexError, TypeError)


@dataclass(frozen=True)
class Discovery:
    """The sites of a model in order of execution, and how its layers were called."""

    sites: tuple[Site, ...]
    chain: Chain

    @property
    def loops(self) -> bool:
        """Whether a layer was run more than once."""
        return len({link.number for link in self.chain.links}) < len(self.chain.links)


def discover(
    model: nn.Module, layers: Sequence[nn.Module] = (), *, inner: bool = False, cached: bool = False
) -> Discovery:
    """The sites of a transformers causal LM on the meta device, in order of execution; the model stays as it was.

    Of its decoder `layers` only the first of each kind is run: the others have sites like it. One that asks for values
    which the meta device does not have is run on the CPU, with weights that take no memory.
    Raises ModelError for a model that can be run in neither way, or whose logits are not those of the prompt's tokens.
    `inner` adds scores and probs, which need memory that grows with the square of the tokens, `cached` what attention
    reads in each of several calls.
    Shapes hold the probe's batch and token counts; `with_sizes` puts a run's own in their place.
    """
    wanted = (*(value for value in INSIDE if inner or f".{value}" not in COSTLY), *(CACHE if cached else ()))
    probe, known = partial(_probed_at, model, layers, wanted), _sizes(model)
    rows, tokens = _unmistakable_sizes(known)
    found = probe(rows, tokens)
    # Layers that hand state on may count what they made of the tokens: blocks of them, chosen ones.
    if not found.chain.shares_state and all(size in known for site in found.sites for size in _fixed(site)):
        return found
    return _without_odd_axes(model, found, probe(rows, 2 * tokens + 1), (rows, 2 * tokens + 1))


def _probed_at(
    model: nn.Module, layers: Sequence[nn.Module], wanted: Sequence[str], batch: int, token: int
) -> Discovery:
    ids = torch.zeros(batch, token, dtype=torch.long, device="meta")
    # A ready mask spares most models from looking at values that the meta device does not have; some want none.
    ready = torch.zeros(batch, 1, token, token, dtype=next(model.parameters()).dtype, device="meta")
    masks: tuple[dict[str, Tensor], ...] = ({"attention_mask": ready}, {})

    def probed(**inputs: Tensor) -> Discovery:
        found = _probed(model, layers, Watch(batch, token), wanted, inputs)
        # Layers that run more than once have sites of their own each time.
        return _probed(model, layers, Watch(batch, token), wanted, inputs, each=True) if found.loops else found

    for mask in masks:
        with suppress(*_REFUSALS):
            return probed(input_ids=ids, **mask)
    with suppress(*_REFUSALS), NoToQuestions():
        return probed(input_ids=ids)
    words = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 1)
    try:
        with weightless(model):
            return probed(input_ids=torch.arange(batch * token).reshape(batch, token) % words)
    except _REFUSALS as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelError(f"transformers' {type(model).__name__} fails in its forward pass with {reason}") from error


def _without_odd_axes(model: nn.Module, found: Discovery, longer: Discovery, sizes: tuple[int, int]) -> Discovery:
    """The sites but for those with an axis that grows with the tokens without counting them (a padded convolution).

    `longer` is what a probe of other `sizes`, rows and tokens, has found.
    Raises ModelError where the logits have one: the model adds tokens of its own to the prompt.
    """
    shapes = {site.name: site.shape for site in longer.sites}
    expected = with_sizes(found.sites, *sizes)
    odd = {without_call(s.name) for s in expected if shapes.get(s.name, s.shape) != s.shape}
    if odd & {found.sites[-1].name, *found.chain.sources}:
        raise ModelError(f"transformers' {type(model).__name__} adds tokens of its own to the prompt, parity cannot.")
    return replace(found, sites=tuple(site for site in found.sites if without_call(site.name) not in odd))


def _fixed(site: Site) -> tuple[int, ...]:
    return tuple(size for dim, size in zip(site.dims, site.shape, strict=True) if dim not in _COUNTED)


def _probed(
    model: nn.Module,
    layers: Sequence[nn.Module],
    watch: Watch,
    inside: Sequence[str],
    inputs: dict[str, Tensor],
    *,
    each: bool = False,
) -> Discovery:
    """Which sites one forward pass fires; of layers of one kind the first alone is run, unless `each` is to be."""
    for value in inputs.values():
        watch.is_new(value)  # and no longer where a module takes it
    with (
        quiet_torch(),
        as_it_was(model),
        _watching(model, watch, inside),
        watch_chain(list(layers), watch.name_of) as chain,
        nullcontext() if each else _one_of_each_kind(model, layers, watch),
    ):
        logits = model(**inputs, use_cache=False).logits
        if watch.is_new(logits):
            # What the model does to the head's output, a softcap for one, is an operation too.
            watch.note("logits", logits, "", "output")
    return Discovery(watch.result(), chain)


def with_sizes(sites: Iterable[Site], batch: int, token: int, calls: int = 1) -> tuple[Site, ...]:
    """The same sites with the shapes that a run of `batch` rows of `token` tokens, in so many calls, gives them."""
    sizes = {"batch": batch, "token": token, "key": token, "batch*token": batch * token, CALL: calls}
    return tuple(
        replace(site, shape=tuple(sizes.get(dim, size) for dim, size in zip(site.dims, site.shape, strict=True)))
        for site in sites
    )


def _sizes(model: nn.Module) -> set[int]:
    """All sizes of parameters, and numbers of the config."""
    config = getattr(model, "config", None)
    numbers = {v for v in vars(config).values() if isinstance(v, int)} if config is not None else set()
    return numbers | {size for parameter in model.parameters() for size in parameter.shape}


def _unmistakable_sizes(taken: set[int]) -> tuple[int, int]:
    """A batch and a token count that equal no other size in the model, all of which are `taken`."""
    for batch in (3, 5, 7, 11, 13):
        for token in (17, 19, 23, 29, 31, 37, 41, 43):
            if not taken & {batch, token, batch * token}:
                return batch, token
    raise AssertionError("unreachable because no model has all of 40 pairs of primes among its sizes")


@contextmanager
def _watching(model: nn.Module, watch: Watch, wanted: Sequence[str]) -> Iterator[None]:
    attention: dict[nn.Module, dict[str, str]] = {}
    shared = _shared(model)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if not name or module in shared:
                continue
            before, after = _hooks(model, name, watch)
            if count := experts_in(module):
                watch.experts[name] = count
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
            attention[module] = {value: f"{name}.{value}" for value in wanted}

        calls = Counter[str]()

        def tap(site: str, value: Tensor) -> Tensor:
            module, inside = site.rsplit(".", 1)
            name, calls[site] = numbered(site, calls[site]), calls[site] + 1
            if inside in CACHE:
                watch.note_copy(name, value, module, CACHE[inside])
            elif watch.is_new(value):
                watch.note(name, value, module, "attention" if inside in INSIDE else SCAN, INSIDE.get(inside))
            return value

        stack.enter_context(attention_taps(attention, tap, (watch.token,)))
        stack.enter_context(scan_taps(model, scanning_modules(model), tap))
        stack.enter_context(watch.routers)
        yield


def _shared(model: nn.Module) -> set[nn.Module]:
    """Modules without weights that stand in several places: whose call it is, their hooks cannot tell."""
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    return {module for module, count in places.items() if count > 1 and not any(True for _ in module.parameters())}


@dataclass(frozen=True)
class _Ran:
    """A layer that was run: `source` is the site of its output if not its own; does it write into what it takes?"""

    name: str
    output: Any
    source: str | None
    writes: bool


@contextmanager
def _one_of_each_kind(model: nn.Module, layers: Sequence[nn.Module], watch: Watch) -> Iterator[None]:
    """Let a layer that is like one already run answer with its sites, under the layer's own name."""
    names = {module: name for name, module in model.named_modules()}
    run: dict[Any, _Ran] = {}

    def forward_of(layer: nn.Module) -> Callable[..., Any]:
        original, kind, name = layer.forward, kind_of(layer), names[layer]

        def forward(*args: Any, **kwargs: Any) -> Any:
            took = taken(args, kwargs)
            if kind not in run:
                version = took._version if took is not None else 0
                output = original(*args, **kwargs)
                gave = first_tensor(output)
                source = watch.name_of(gave) if gave is not None else None
                run[kind] = _Ran(name, output, source, took is not None and took._version != version)
                return output
            first = run[kind]
            watch.copy(first.name, name)
            if took is not None and first.writes:
                took.add_(0)  # as the layer itself would have done
            output = tree_map(
                lambda value: torch.empty_like(value) if isinstance(value, Tensor) else value, first.output
            )
            gave = first_tensor(output)
            if gave is not None and first.source is not None and first.source.startswith(f"{first.name}."):
                watch.know(gave, name + first.source[len(first.name) :])
            return output

        return forward

    try:
        for layer in layers:
            layer.forward = forward_of(layer)
        yield
    finally:
        for layer in layers:
            del layer.forward


def _hooks(model: nn.Module, name: str, watch: Watch) -> tuple[Any, Any]:
    calls = {"input": count(), "output": count()}

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.routers.running.append(name)
        value = taken(args, kwargs)
        call = next(calls["input"]) if value is not None else 0
        if value is not None and value.is_floating_point() and watch.is_new(value):
            site = numbered(_name_of_input(name), call)
            watch.give_way(site, name)
            watch.note(site, value, name, "input")
        watch.mixture(model, name, args, kwargs)

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        watch.routers.running.pop()
        value = first_tensor(output)
        call = next(calls["output"]) if value is not None else 0
        if value is not None and value.is_floating_point() and watch.is_new(value):
            watch.note(numbered(name, call), value, name, "output")

    return before, after


def _name_of_input(module: str) -> str:
    """The name of a value that only arithmetic between modules made, from the module that takes it in."""
    parent, _, child = module.rpartition(".")
    in_layer = parent.rpartition(".")[2].isdigit()
    if in_layer:
        return f"{parent}.resid_mid"
    return f"{parent}.product" if child == "down_proj" else f"{module}.input"
