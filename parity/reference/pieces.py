"""A transformers decoder in pieces: the ends (embedding, final norm, head) and each decoder layer.

The model is built on the meta device, where it weighs nothing. A piece gets its weights from the
checkpoint through transformers' own loading code, is run, and gives its memory back. Each layer is called with
the arguments that transformers itself prepares: the model's forward is run with its layers stubbed,
and what the stubs were handed (mask, position embeddings, …) is kept for the real call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parity.errors import ModelError
from parity.record.attention import register
from parity.record.discover import discover
from parity.record.tap import Tap, first_tensor, quiet_torch, tapping
from parity.reference.checkpoint import Checkpoint
from parity.sites import Site

EMBED, HEAD = "embed", "head"
Piece = str | int  # EMBED, HEAD, or the number of a layer


@dataclass(frozen=True)
class _Call:
    """What transformers passed to a layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _StopPassError(Exception):
    """Ends a forward pass that has shown all it was run for."""


class PiecewiseModel:
    """A causal LM of transformers whose weights are in memory one piece at a time.

    `sites` are the model's sites in order of execution, with the probe's sizes (`with_sizes` gives a run's).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: str = "cpu",
        attention: str = "eager",
        inner: bool = False,
        sites: tuple[Site, ...] | None = None,
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        self.attention = attention
        self.model = _build(checkpoint, dtype, attention)
        self.config = self.model.config.get_text_config()
        self.sites = sites or discover(self.model, inner=inner)
        self.layers = _find_layers(self.model)
        self._sites = self._sort_sites()
        self._calls: list[_Call] = []

    def twin(self, dtype: torch.dtype) -> PiecewiseModel:
        """The same model in another dtype; its pieces are loaded from this one's."""
        return PiecewiseModel(self.checkpoint, dtype, str(self.device), self.attention, sites=self.sites)

    # -- weights ---------------------------------------------------------------------------------------------

    @contextmanager
    def loaded(self, piece: Piece, source: PiecewiseModel | None = None) -> Iterator[None]:
        """Weights of a piece in memory during the block, from the checkpoint or cast from `source`.

        Raises ModelError when the checkpoint lacks a weight or holds one of another shape.
        """
        modules = self._modules(piece)
        if source is None:
            self._read(piece)
        else:
            for mine, theirs in zip(modules, source._modules(piece), strict=True):
                _copy_weights(mine, theirs)
        if not isinstance(piece, int):
            self.model.tie_weights()
        for module in modules:
            self._fill_buffers(module)
            module.to(self.device)
        try:
            yield
        finally:
            for module in modules:
                module.to("meta")

    def _modules(self, piece: Piece) -> list[nn.Module]:
        """The modules that hold the weights of a piece."""
        if isinstance(piece, int):
            return [self.layers[piece]]
        inside = {m for layer in self.layers for m in layer.modules()}
        return [m for m in self.model.modules() if m not in inside and _holds_tensors(m)]

    def _read(self, piece: Piece) -> None:
        from safetensors import safe_open
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        mapping = get_model_conversion_mapping(self.model)
        config = LoadStateDictConfig(dtype=self.dtype, weight_mapping=mapping)
        with ExitStack() as stack:
            tensors = {}
            for file in self.checkpoint.files:
                shard = stack.enter_context(safe_open(file, framework="pt"))
                for key in shard.keys():  # noqa: SIM118
                    if _layer_of_key(key) == (piece if isinstance(piece, int) else None):
                        tensors[key] = shard.get_slice(key)
            with _no_progress_bar():
                info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        self._check_complete(piece, info)

    def _check_complete(self, piece: Piece, info: Any) -> None:
        if info.mismatched_keys:
            key, found, expected = next(iter(info.mismatched_keys))
            raise ModelError(
                f"model {self.checkpoint.name!r}: {key} has shape {tuple(found)}, config.json asks for {tuple(expected)}."
            )
        tied = self.model.all_tied_weights_keys if self.config.tie_word_embeddings else {}
        for module in self._modules(piece):
            for name, parameter in module.named_parameters(recurse=isinstance(piece, int)):
                full = _full_name(self.model, module, name)
                if parameter.is_meta and full not in tied:
                    raise ModelError(
                        f"model {self.checkpoint.name!r}: the checkpoint has no {full}. "
                        "It does not belong to its config.json, or a shard is missing."
                    )

    def _fill_buffers(self, module: nn.Module) -> None:
        """Buffers that no checkpoint holds (RoPE frequencies) are computed by the model's own initializer."""
        for child in module.modules():
            names = [n for n, b in child.named_buffers(recurse=False) if b.is_meta]
            for name in names:
                empty = torch.empty_like(child._buffers[name], device="cpu")  # type: ignore[arg-type]
                child._buffers[name] = empty
            if names:
                self.model._init_weights(child)

    # -- running ---------------------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor, tap: Tap) -> Tensor:
        """Hidden states (b, t, hidden) before the first layer; also prepares the layers' arguments."""
        self._calls = [_Call((), {})] * len(self.layers)
        captured: list[Tensor] = []

        def capture(index: int, hidden: Tensor, call: _Call) -> Tensor:
            self._calls[index] = call
            captured.append(hidden)
            if index == len(self.layers) - 1:
                raise _StopPassError
            return hidden

        with quiet_torch(), self._stubbed(capture), tapping(self.model, self._sites[EMBED], tap):
            try:
                self.model(input_ids=input_ids.to(self.device), use_cache=False)
            except _StopPassError:
                return captured[0]
        raise AssertionError("unreachable because the last stub stops the pass")

    def layer(self, index: int, hidden: Tensor, tap: Tap) -> Tensor:
        """Output (b, t, hidden) of one loaded layer on hidden states (b, t, hidden)."""
        call = self._calls[index]
        with quiet_torch(), tapping(self.model, self._sites[index], tap):
            out = first_tensor(self.layers[index](hidden, *call.args, **call.kwargs))
        assert out is not None, "unreachable because discovery saw this layer return a tensor"
        return out

    def head(self, input_ids: Tensor, hidden: Tensor, tap: Tap) -> Tensor:
        """Logits (b, t, vocab) from the hidden states (b, t, hidden) after the last layer."""
        last = len(self.layers) - 1

        def resume(index: int, stubbed: Tensor, _call: _Call) -> Tensor:
            return hidden if index == last else stubbed

        with quiet_torch(), self._stubbed(resume), tapping(self.model, self._sites[HEAD], tap):
            logits: Tensor = self.model(input_ids=input_ids.to(self.device), use_cache=False).logits
        return logits

    def run(self, piece: Piece, input_ids: Tensor, hidden: Tensor | None, tap: Tap) -> Tensor:
        """Run any loaded piece: token ids (b, t) and the hidden states before it in, its output out."""
        if piece == EMBED:
            return self.embed(input_ids, tap)
        assert hidden is not None, "unreachable because the embedding is the first piece"
        return self.head(input_ids, hidden, tap) if isinstance(piece, str) else self.layer(piece, hidden, tap)

    @property
    def pieces(self) -> list[Piece]:
        """All pieces in order of execution."""
        return [EMBED, *range(len(self.layers)), HEAD]

    def sites_of(self, piece: Piece) -> list[Site]:
        """The sites that running a piece fires, in order."""
        return self._sites[piece]

    def _sort_sites(self) -> dict[Piece, list[Site]]:
        """Each site under the piece that computes it; what lies behind a layer belongs to the head."""
        numbers = {module: number for number, layer in enumerate(self.layers) for module in layer.modules()}
        owner = {name: numbers[module] for name, module in self.model.named_modules() if module in numbers}
        sorted_sites: dict[Piece, list[Site]] = {piece: [] for piece in self.pieces}
        end: Piece = EMBED
        for site in self.sites:
            piece = owner.get(site.module)
            end = end if piece is None else HEAD
            sorted_sites[end if piece is None else piece].append(site)
        return sorted_sites

    @contextmanager
    def _stubbed(self, stub: Callable[[int, Tensor, _Call], Tensor]) -> Iterator[None]:
        """Every layer answers with `stub(index, hidden, other arguments)` in place of its own forward."""

        def forward_of(index: int) -> Callable[..., Tensor]:
            return lambda hidden, *args, **kwargs: stub(index, hidden, _Call(args, kwargs))

        try:
            for index, layer in enumerate(self.layers):
                layer.forward = forward_of(index)
            yield
        finally:
            for layer in self.layers:
                del layer.forward


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """One bar of ours over all pieces instead of one of theirs for each."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _build(checkpoint: Checkpoint, dtype: torch.dtype, attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    name = register(attention)
    try:
        config = AutoConfig.from_pretrained(checkpoint.path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=name)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {checkpoint.name!r}: transformers cannot build it from {checkpoint.path / 'config.json'}: {reason[:200]}"
        ) from error
    return model.eval()


def _find_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the longest list of modules that the backbone holds."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of layers; parity cannot cut it into pieces.")
    return max(lists, key=len)


_LAYER_KEY = re.compile(r"(?:^|\.)(\d+)\.")


def _layer_of_key(key: str) -> int | None:
    """The layer that a checkpoint key belongs to: its first number."""
    found = _LAYER_KEY.search(key)
    return int(found.group(1)) if found else None


def _holds_tensors(module: nn.Module) -> bool:
    return bool(module._parameters or module._buffers)


def _full_name(model: nn.Module, module: nn.Module, name: str) -> str:
    owner = next(n for n, m in model.named_modules() if m is module)
    return f"{owner}.{name}"


def _copy_weights(mine: nn.Module, theirs: nn.Module) -> None:
    """Weights of `theirs` in the dtype of `mine`; exact when that dtype is the wider one."""
    for own, other in zip(mine.modules(), theirs.modules(), strict=True):
        for name, parameter in other._parameters.items():
            if parameter is not None:
                wide = parameter.detach().to(own._parameters[name].dtype)  # type: ignore[union-attr]
                own._parameters[name] = nn.Parameter(wide, requires_grad=False)
