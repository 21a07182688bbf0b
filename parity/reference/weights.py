"""Weights of a model that stands on the meta device: read by transformers' own loading code, or cast from another's.

All functions here take lists of single modules and touch what these hold themselves, never their children's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parity.errors import ModelError
from parity.reference.checkpoint import Checkpoint

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def layer_of_key(key: str, container: str) -> int | None:
    """The layer that a checkpoint key belongs to, None for none; `container` is what holds the layers (`layers`, `h`).

    A checkpoint may call the container otherwise than the model does; its first number is then the layer's.
    """
    named = re.search(rf"(?:^|\.){container}\.(\d+)\.", key)
    found = named or (None if container in _ORDINARY else _NUMBER.search(key))
    return int(found.group(1)) if found else None


# Checkpoints of models that call their layers so do too; other numbers in them count other things.
_ORDINARY = ("layers", "h")


def read(model: Any, checkpoint: Checkpoint, dtype: torch.dtype, wanted: Callable[[str], bool]) -> None:
    """Read the wanted keys of a checkpoint into the model, exactly as `from_pretrained` does in this dtype.

    Raises ModelError where a tensor has another shape than the configuration asks for.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    config = LoadStateDictConfig(
        dtype=dtype,
        # What transformers keeps in float32 in half precision stays so.
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for shard in checkpoint.open(stack, wanted):
            tensors |= {key: shard.get_slice(key) for key in shard.keys() if wanted(key)}  # noqa: SIM118
        with no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(model, tensors, config)
    if info.mismatched_keys:
        key, found, expected = next(iter(info.mismatched_keys))
        raise ModelError(
            f"model {checkpoint.name!r}: {key} has shape {tuple(found)}, config.json asks for {tuple(expected)}."
        )


@torch.no_grad()
def replace_numbers(model: nn.Module, checkpoint: Checkpoint, modules: Iterable[nn.Module]) -> None:
    """Give the modules of a model the numbers of `checkpoint.weights` in the dtype that they have.

    Raises ModelError for a tensor of another shape, and for a parameter that is in neither of two tied places.
    """
    weights = checkpoint.weights
    if weights is None:
        return
    wanted, tied = set(modules), getattr(model, "all_tied_weights_keys", {})
    for owner, module in model.named_modules():
        for own, parameter in module._parameters.items() if module in wanted else ():
            name = f"{owner}.{own}"
            other = weights.tensor(name)
            if parameter is None or (other is None and (name in tied or not weights.are_all)):
                continue
            if other is None or other.shape != parameter.shape:
                found = "has no" if other is None else f"has another shape, {tuple(other.shape)}, of"
                raise ModelError(f"weights {weights.name}: {found} {name}. Give the file that was made of the model.")
            numbers = other.to(parameter.device if not parameter.is_meta else "cpu", parameter.dtype)
            module._parameters[own] = nn.Parameter(numbers, requires_grad=False)


def check_complete(model: Any, checkpoint: Checkpoint, modules: Iterable[nn.Module]) -> None:
    """Raise ModelError if the checkpoint left a parameter of the modules without numbers; tied ones may wait."""
    configs = (model.config, model.config.get_text_config())
    waiting = model.all_tied_weights_keys if any(getattr(c, "tie_word_embeddings", False) for c in configs) else {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and (full := _full_name(model, module, name)) not in waiting:
                raise ModelError(
                    f"model {checkpoint.name!r}: the checkpoint has no {full}. "
                    "It does not belong to its config.json, or a shard is missing."
                )


@torch.no_grad()
def fill_buffers(model: Any, modules: Sequence[nn.Module]) -> None:
    """What the checkpoint does not hold (RoPE frequencies) is computed by the model's own initializer.

    It is called for every module and then for those around them, which may fill the buffers of a layer, as
    `from_pretrained` does; it passes over what was read. A buffer that it forgets is not finite, so it shows.
    """
    from transformers.initialization import guard_torch_init_functions

    owners, inside = dict(_owners(model, model)), set(modules)
    around = [m for m in owners if m not in inside and not inside.isdisjoint(m.modules())]
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                unset = float("nan") if buffer.is_floating_point() else 0
                module._buffers[name] = torch.full_like(buffer, unset, device="cpu")
    with guard_torch_init_functions():
        for module in (*modules, *reversed(around)):
            owners[module]._init_weights(module)


def _owners(module: nn.Module, owner: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Each module with the transformers model, of those nested in one another, whose initializer knows it."""
    owner = module if hasattr(module, "_init_weights") else owner
    yield module, owner
    for child in module.children():
        yield from _owners(child, owner)


def cast(mine: nn.Module, theirs: nn.Module, dtype: torch.dtype, copies: dict[Tensor, Tensor]) -> None:
    """Parameters and buffers of `theirs` into `mine`, numbers in `dtype`; exact when that is the wider one.

    Buffers too: some hold learned numbers, and none may be drawn or computed again. Tied weights are copied once.
    Tensors may have any shape.
    """
    for own, other in ((mine._parameters, theirs._parameters), (mine._buffers, theirs._buffers)):
        for name, value in other.items():
            if value is None or name not in own:
                continue
            if value not in copies:
                wide = value.detach().to(dtype if value.is_floating_point() else value.dtype)
                copies[value] = nn.Parameter(wide, False) if isinstance(value, nn.Parameter) else wide.clone()
            own[name] = copies[value]  # type: ignore[assignment]


def move(modules: Iterable[nn.Module], device: torch.device | str) -> None:
    """What the modules hold themselves goes to a device; to `meta`, its memory is given back."""
    for module in modules:
        module._apply(lambda value: value.to(device), recurse=False)  # type: ignore[no-untyped-call]


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """One bar of ours over all pieces instead of one of theirs for each."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _full_name(model: nn.Module, module: nn.Module, name: str) -> str:
    owner = next(n for n, m in model.named_modules() if m is module)
    return f"{owner}.{name}"
