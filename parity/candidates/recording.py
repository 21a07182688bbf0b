"""What hooks see of a module's run becomes a dump."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from parity.dump import ArchiveWriter, NameMap, sites_of
from parity.dump.calls import call_name
from parity.errors import CandidateError
from parity.record.outbox import Outbox
from parity.reference.batch import Batch
from parity.sites import Dims, Site, numbered, without_call


class Names:
    """The names of a module's sites: its own, those of the reference, and all places of a shared submodule."""

    def __init__(
        self, names: NameMap, sites: Sequence[Site], own: Sequence[Site], places: Mapping[str, list[str]]
    ) -> None:
        self.names, self._places = names, places
        self._known, self.logits = {site.name for site in sites}, sites[-1].name
        self.attention = {site.name for site in own if site.where == "attention"}
        self.inputs = {without_call(site.name) for site in own if site.where == "input"}

    def is_logits(self, name: str) -> bool:
        """Whether the module's own name is that of the reference's logits."""
        return self.logits in sites_of(self.names, name)

    def is_an_output(self, site: str) -> bool:
        """Whether in this call a module takes what another has returned, which is that one's site."""
        return without_call(site) in self.inputs and site not in self._known

    def place(self, site: str) -> str:
        """The name of the n-th call of a submodule. Raises CandidateError if the reference has no such call."""
        first = without_call(site)
        call = int(site[len(first) + 1 :] or 0)
        places = self._places.get(first, [first])
        if call < len(places):
            return places[call]
        if len(places) == 1 and any(numbered(name, call) in self._known for name in sites_of(self.names, first)):
            return site
        raise CandidateError(
            f"the candidate calls {first} again in one forward pass, the reference does not (call {call + 1}). "
            "Run all tokens in one call of the model, and give each call a module of its own."
        )


@dataclass(frozen=True)
class Call:
    """One of several calls: its number from 0, its tokens, and how many the module has been given by then."""

    number: int
    tokens: int
    seen: int

    def inside_attention(self, name: str, value: Tensor) -> Tensor:
        """What the call adds to a value (b, h, …) of transformers' attention, to which the cache has been joined.

        Keys (…, s, d) of earlier calls go; scores and probs (…, t, s) of a window, which keeps the last keys, get
        room for all that were seen.
        """
        end = without_call(name).rsplit(".", 1)[-1]
        if end == "k_rope":
            return value[..., -self.tokens :, :]
        if end in _OF_KEYS and value.shape[-1] < self.seen:
            hidden = 0.0 if end == "probs" else torch.finfo(value.dtype).min
            return pad(value, (self.seen - value.shape[-1], 0), value=hidden)
        return value


_OF_KEYS = ("scores", "probs")


class Recording:
    """Writes what the hooks see; the logits come last, because what the module returns is its answer."""

    def __init__(self, writer: ArchiveWriter, names: Names, dims: Mapping[str, Dims], call: Call | None = None) -> None:
        self._names, self._dims, self._call = names, dims, call
        self._outbox = Outbox(lambda array, name, dims: writer.add(name, array, dims))
        self._calls = 0
        self._taken: dict[str, weakref.ref[Tensor]] = {}
        self._head: tuple[str, Tensor] | None = None

    def tap(self, site: str, value: Tensor) -> Tensor:
        """Record one call (any shape); the n-th call of a shared submodule is that of the n-th place it stands in."""
        self._calls += 1
        if self._is_taken_again(site, value) or self._names.is_an_output(site):
            return value
        name = self._names.place(site)
        if self._names.is_logits(name):
            self._head = name, value
        elif self._call is not None and name in self._names.attention:
            self._add(name, self._call.inside_attention(name, value))
        else:
            self._add(name, value)
        return value

    def _is_taken_again(self, site: str, value: Tensor) -> bool:
        """Whether a module takes the very tensor that it took before, which the reference has as one site."""
        first = without_call(site)
        if first not in self._names.inputs:
            return False
        last, self._taken[first] = self._taken.get(first), weakref.ref(value)
        return last is not None and last() is value

    def _add(self, name: str, value: Tensor) -> None:
        stored = name if self._call is None else call_name(name, self._call.number)
        self._outbox.add(value, stored, self._dims.get(name))

    def finish(self, logits: Tensor, batch: Batch) -> None:
        """Record what the module returned (b, t, vocab) for a batch. Raises CandidateError if its head gave another.

        What it returned for one token of each row is its answer for the last token of text.
        """
        if not self._calls:
            raise CandidateError(
                "the candidate has no submodule with a name that the reference has, so nothing could be recorded. "
                "Name its modules as the checkpoint does (`parity sites` lists the names); nn.Identity will do."
            )
        name, head = self._head or (self._names.logits, logits)
        if batch.text is not None and logits.dim() == 3 == head.dim() and logits.shape[1] == 1 < head.shape[1]:
            answered, logits = logits[:, 0], head.clone()
            logits[torch.arange(len(logits)), batch.last().to(logits.device)] = answered.to(logits.dtype)
        elif head.numel() != logits.numel():
            # A port may answer for the last tokens alone; then its head has more to say.
            self._require_end_of(name, head, logits)
            logits = head
        self._add(name, logits)
        self._outbox.flush()

    def _require_end_of(self, name: str, head: Tensor, logits: Tensor) -> None:
        fits = head.dim() == logits.dim() and logits.shape[-1] == head.shape[-1] and logits.shape[-2] <= head.shape[-2]
        end = head[..., -logits.shape[-2] :, :] if fits else head
        if end.shape != logits.shape or not bool((end.to(logits.dtype) == logits).all()):
            raise CandidateError(
                f"the candidate returns logits of shape {tuple(logits.shape)} that are not the last ones of {name}, "
                f"of shape {tuple(head.shape)}. Return the logits of every token."
            )
