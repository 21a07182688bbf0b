"""A transformers decoder in pieces: the ends (embedding, final norm, head) and each decoder layer.

The model is built on the meta device, where it weighs nothing. A piece gets its weights from the
checkpoint through transformers' own loading code, is run, and gives its memory back. Each layer is called with
the arguments that transformers itself prepares: the model's forward is run with its layers stubbed,
and what the stubs were handed (mask, position embeddings, …) is kept for the real call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from parity.errors import ModelError
from parity.record.chain import LayerCall, container_of, find_layers, stubbed
from parity.record.discover import Discovery, discover
from parity.record.experts import IN_ROUTER
from parity.record.tap import Tap, first_tensor, quiet_torch, tapping
from parity.reference.batch import Batch
from parity.reference.build import build
from parity.reference.checkpoint import Checkpoint
from parity.reference.precision import promoted
from parity.reference.weights import cast, check_complete, fill_buffers, layer_of_key, move, read, replace_numbers
from parity.sites import Site, is_cached, without_call

EMBED, HEAD = "embed", "head"
Piece = str | int  # EMBED, HEAD, or the number of a layer
# A checkpoint of at most so many bytes is read once and stays: loading its pieces again takes longer than running them.
SMALL = 32 << 20


class _StopPassError(Exception):
    """Ends a forward pass that has shown all it was run for."""


class PiecewiseModel:
    """A causal LM of transformers whose weights are in memory one piece at a time.

    `sites` are the model's sites in order of execution, with the probe's sizes (`with_sizes` gives a run's).
    A small one (SMALL) is read once and stays in memory. A model whose layers are not a plain chain cannot be cut:
    it has one piece, HEAD, that is all of it, and `is_cut` says so.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: str = "cpu",
        attention: str = "eager",
        inner: bool = False,
        original: PiecewiseModel | None = None,
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        self.attention, self.model = attention, build(checkpoint, dtype, attention)
        self.config = self.model.config.get_text_config()
        self.layers = find_layers(self.model)
        if original is None:
            # The meta kernel of the default grouped product takes bfloat16 alone.
            with self._experts("batched_mm"):
                self._found: Discovery = discover(self.model, self.layers, inner=inner, cached=not inner)
        else:
            self._found = original._found
        self.is_cut = bool(self.layers) and self._found.chain.is_whole(len(self.layers))
        self.layers = self.layers if self.is_cut else []
        self._container = container_of(self.model, self.layers)
        self._take_sites([site for site in self._found.sites if not is_cached(site.name)])
        self._calls: list[LayerCall] = []
        self._prepared: Batch | None = None  # what the calls were captured for
        self._held: set[Piece] = set()
        self._original = original
        self.is_small = checkpoint.size <= SMALL
        self._is_whole = False  # all weights of a small model are in memory

    def with_caches(self) -> Self:
        """This model with what attention reads of a cache among its sites, where it can be cut."""
        # What a call reads is known by the masks that layers are given.
        if self.is_cut:
            self._take_sites(self._found.sites)
        return self

    def _take_sites(self, sites: Iterable[Site]) -> None:
        self.sites = tuple(sites)
        self._sites = self._sort_sites()
        self._owner = {site.name: piece for piece, sites in self._sites.items() for site in sites}

    @property
    def head_dim(self) -> int | None:
        """Size of one attention head, read off the sites; None for a model without any."""
        return next((s.shape[-1] for s in self.sites if s.dims[-2:] == ("token", "head_dim")), None)

    def twin(self, dtype: torch.dtype) -> PiecewiseModel:
        """The same model in another dtype; its pieces are loaded from this one's."""
        other = PiecewiseModel(self.checkpoint, dtype, str(self.device), self.attention, original=self)
        # The grouped product of experts has no float64 kernel.
        other.config._experts_implementation = "eager"
        other._take_sites(self.sites)
        return other

    @contextmanager
    def _experts(self, implementation: str) -> Iterator[None]:
        """Another way of computing a mixture of experts during the block; nothing to other models."""
        before = getattr(self.config, "_experts_implementation", None)
        self.config._experts_implementation = implementation
        try:
            yield
        finally:
            self.config._experts_implementation = before

    def summands(self, site: Site, tokens: int) -> int:
        """How many products one number is the sum of, in a run of so many tokens; 1 outside matrix products."""
        if site.where == "attention":
            return {"scores": self.head_dim or 1, "context": tokens}.get(without_call(site.name).rsplit(".", 1)[-1], 1)
        weight = getattr(self.model.get_submodule(site.module), "weight", None)
        is_product = site.where in ("output", IN_ROUTER[0]) and isinstance(weight, Tensor) and weight.dim() == 2
        return int(weight.shape[-1]) if is_product and weight is not None else 1

    # -- weights ---------------------------------------------------------------------------------------------

    @contextmanager
    def loaded(self, piece: Piece) -> Iterator[None]:
        """Weights of a piece in memory during the block, from the checkpoint or, for a twin, cast from its original.

        Blocks may be nested: what is in memory is not loaded again.
        Raises ModelError when the checkpoint lacks a weight or holds one of another shape.
        """
        key = piece if isinstance(piece, int) else HEAD  # embedding and head are loaded together
        if self._is_whole or key in self._held:
            yield
            return
        pieces = self.pieces if self.is_small else [piece]
        try:
            with nullcontext() if self._original is None else self._original.loaded(piece):
                self._load(pieces)
                self._is_whole, self._held = self.is_small, self._held | {key}
                yield
        finally:
            self._held.discard(key)
            if not self._is_whole:
                move((module for one in pieces for module in self._modules(one)), "meta")

    def _load(self, pieces: list[Piece]) -> None:
        modules = [m for piece in pieces for m in self._modules(piece)]
        if self._original is None:
            numbers = {piece if isinstance(piece, int) else None for piece in pieces}
            read(
                self.model,
                self.checkpoint,
                self.dtype,
                lambda key: not self.is_cut or layer_of_key(key, self._container) in numbers,
            )
            check_complete(self.model, self.checkpoint, modules)
            fill_buffers(self.model, modules)
            replace_numbers(self.model, self.checkpoint, modules)  # what is filled is what was not read
        else:
            copies: dict[Tensor, Tensor] = {}
            theirs = [m for piece in pieces for m in self._original._modules(piece)]
            if len(theirs) != len(modules):
                raise ModelError(f"transformers' {type(self.model).__name__} changes its own modules while it runs.")
            for mine, other in zip(modules, theirs, strict=True):
                cast(mine, other, self.dtype, copies)
        if any(not isinstance(piece, int) for piece in pieces):
            self.model.tie_weights()
        move(modules, self.device)

    def _modules(self, piece: Piece) -> list[nn.Module]:
        """The modules that hold the weights of a piece."""
        if isinstance(piece, int):
            return [*self.layers[piece].modules()]
        inside = {m for layer in self.layers for m in layer.modules()}
        return [m for m in self.model.modules() if m not in inside]

    # -- running ---------------------------------------------------------------------------------------------

    @contextmanager
    def _running(self, piece: Piece, tap: Tap) -> Iterator[None]:
        with quiet_torch(), promoted(self.dtype), tapping(self.model, self._sites[piece], tap, calls=self.calls):
            yield

    def prepare(self, input_ids: Tensor | Batch) -> None:
        """Capture what transformers hands to each layer beside hidden states, for token ids (b, t); once for each."""
        batch = Batch.of(input_ids)
        ready = self._prepared
        if not self.is_cut or (ready is not None and ready.calls == batch.calls and ready.same_as(batch)):
            return
        calls: list[LayerCall] = []
        with self.loaded(EMBED):
            self._embed(batch, lambda _site, value: value, calls)
        self._calls, self._prepared = calls, replace(batch, ids=batch.ids.clone())

    def embed(self, input_ids: Tensor | Batch, tap: Tap) -> Tensor:
        """Hidden states (b, t, hidden) that the first layer takes, from token ids (b, t)."""
        return self._embed(Batch.of(input_ids), tap, [])

    def _embed(self, batch: Batch, tap: Tap, calls: list[LayerCall]) -> Tensor:
        captured: list[Tensor] = []

        def capture(index: int, hidden: Tensor, call: LayerCall) -> Tensor:
            calls.append(call)
            captured.append(hidden)
            if index == len(self.layers) - 1:
                raise _StopPassError
            return hidden

        with stubbed(self.layers, self._found.chain, capture), self._running(EMBED, tap):
            try:
                self.model(**batch.arguments(self.model, self.device), use_cache=False)
            except _StopPassError:
                return captured[0]
        raise AssertionError("unreachable because the last stub stops the pass")

    def layer(self, index: int, hidden: Tensor, tap: Tap) -> Tensor:
        """Output (b, t, hidden) of one loaded layer on hidden states (b, t, hidden), for the prepared token ids."""
        call = self._calls[index]
        with self._running(index, tap):
            # A layer may write into what it takes.
            out = first_tensor(self.layers[index](hidden.clone(), *call.args, **call.kwargs))
        assert out is not None, "unreachable because discovery saw this layer return a tensor"
        return out

    def head(self, input_ids: Tensor | Batch, hidden: Tensor | None, tap: Tap) -> Tensor:
        """Logits (b, t, vocab) from the hidden states (b, t, hidden) after the last layer.

        Where the model is not cut, `hidden` is None and the head is all of it.
        """
        last = len(self.layers) - 1

        def resume(index: int, stubbed: Tensor, _call: LayerCall) -> Tensor:
            return hidden if index == last and hidden is not None else stubbed

        with stubbed(self.layers, self._found.chain, resume), self._running(HEAD, tap):
            logits: Tensor = self.model(
                **Batch.of(input_ids).arguments(self.model, self.device), use_cache=False
            ).logits
        return logits

    def run(self, piece: Piece, input_ids: Tensor | Batch, hidden: Tensor | None, tap: Tap) -> Tensor:
        """Run any loaded piece: token ids (b, t) and the hidden states (b, t, hidden) before it in, its output out."""
        if isinstance(piece, int):
            assert hidden is not None, "unreachable because the embedding comes before the layers"
            self.prepare(input_ids)
            return self.layer(piece, hidden, tap)
        if piece == EMBED:
            return self.embed(input_ids, tap)
        return self.head(input_ids, hidden, tap)

    @property
    def pieces(self) -> list[Piece]:
        """All pieces in order of execution."""
        return [EMBED, *range(len(self.layers)), HEAD] if self.is_cut else [HEAD]

    def piece_of(self, site: str) -> Piece:
        """The piece that computes a site."""
        return self._owner[site]

    def source_of(self, piece: Piece) -> str | None:
        """The site of the hidden states that go into a piece; None where it is not a site, or nothing goes in."""
        if piece == EMBED or not self.is_cut:
            return None
        return self._found.chain.sources[piece if isinstance(piece, int) else -1]

    @property
    def calls(self) -> tuple[int, ...]:
        """How many tokens each call takes that the prepared token ids are run in."""
        ready = self._prepared
        return () if ready is None else ready.calls or tuple(ready.shape[1:])

    def arguments(self, layer: int) -> dict[str, Any]:
        """What a layer gets beside hidden states, for the prepared token ids; changing it changes that call."""
        return self._calls[layer].kwargs

    def sites_of(self, piece: Piece) -> list[Site]:
        """The sites that running a piece fires, in order."""
        return self._sites[piece]

    def _sort_sites(self) -> dict[Piece, list[Site]]:
        """Each site under the piece that computes it; what lies behind a layer belongs to the head."""
        numbers = {module: number for number, layer in enumerate(self.layers) for module in layer.modules()}
        owner = {name: numbers[module] for name, module in self.model.named_modules() if module in numbers}
        sorted_sites: dict[Piece, list[Site]] = {piece: [] for piece in self.pieces}
        end = self.pieces[0]
        for site in self.sites:
            end = HEAD if site.module in owner else end
            sorted_sites[owner.get(site.module, end)].append(site)
        return sorted_sites
