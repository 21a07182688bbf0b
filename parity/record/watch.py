"""What a probe of a model has seen: which values are sites, which tensor is whose, how their axes are called."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity.record.experts import DIMS
from parity.record.router_probe import RouterProbe
from parity.sites import Dims, Site, without_call

# Sites whose last axis is heads and head_dim flattened into one, where they are three-dimensional.
_PER_HEAD = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")


class NoToQuestions(TorchFunctionMode):
    """A model that asks the values of the meta device (is the prompt longer than …?) is told no."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


@dataclass
class _Seen:
    """A value when it was last seen. It is kept so that no other gets its identity."""

    value: Tensor
    version: int
    name: str | None = None


@dataclass
class Watch:
    """What the probe has seen so far."""

    batch: int
    token: int
    sites: dict[str, Site] = field(default_factory=dict)
    storages: dict[int, _Seen] = field(default_factory=dict)
    noted: dict[str, _Seen] = field(default_factory=dict)  # the values of the sites, by name
    routers: RouterProbe = field(default_factory=RouterProbe)
    experts: dict[str, int] = field(default_factory=dict)  # how many a module holds, by its name

    def is_new(self, value: Tensor) -> bool:
        """Whether no module has returned this value (any shape), or a view of it, before; one written into is new."""
        key, seen = value.untyped_storage()._cdata, self._seen(value)
        if seen is None:
            self.storages[key] = _Seen(value, value._version)
        return seen is None

    def _seen(self, value: Tensor) -> _Seen | None:
        seen = self.storages.get(value.untyped_storage()._cdata)
        return seen if seen is not None and seen.version == value._version else None

    def name_of(self, value: Tensor) -> str | None:
        """The site that a value (any shape) is, if it is one."""
        seen = self._seen(value)
        return seen.name if seen else None

    def know(self, value: Tensor, name: str) -> None:
        """A value (any shape) is that of a site."""
        seen = _Seen(value, value._version, name)
        self.storages[value.untyped_storage()._cdata] = seen
        self.noted.setdefault(name, seen)

    def note(self, name: str, value: Tensor, module: str, where: str, dims: Dims | None = None) -> None:
        """Remember a site, unless its value (any shape) does not belong to the tokens of this run (RoPE tables)."""
        dims = dims or self.label(name, tuple(value.shape))
        if "expert" not in dims and any(name.startswith(f"{experts}.") for experts in self.experts):
            return  # of some tokens, as many as go to one expert
        if "batch" in dims or "batch*token" in dims:
            dtype = str(value.dtype).removeprefix("torch.")
            self.sites[name] = Site(name, dims, tuple(value.shape), dtype, module, where)
            self.know(value, name)

    def note_copy(self, name: str, value: Tensor, module: str, dims: Dims) -> None:
        """Remember a site inside attention that holds a copy of another's value (any shape)."""
        dtype = str(value.dtype).removeprefix("torch.")
        self._put(Site(name, dims, tuple(value.shape), dtype, module, "attention"), value)

    def give_way(self, name: str, module: str) -> None:
        """Of the inputs of a layer's parts the last is `resid_mid`; one before it is named after its part."""
        site = self.sites.get(name)
        if site is None or site.where != "input" or site.module == module:
            return
        other = f"{site.module}.input"
        renamed = {name: replace(site, name=other)}
        self.sites = {renamed.get(key, old).name: renamed.get(key, old) for key, old in self.sites.items()}
        self.noted[other] = self.noted.pop(name)
        self.noted[other].name = other

    def copy(self, first: str, other: str) -> None:
        """The layer named `other` has the sites of the layer `first`, which is of its kind."""
        for site in [s for s in self.sites.values() if s.module.startswith(f"{first}.")]:
            name = other + site.name[len(first) :]
            self.sites[name] = replace(site, name=name, module=other + site.module[len(first) :])
            self.noted[name] = self.noted[site.name]

    def mixture(self, model: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the router's logits, its choice of experts and their weights, if that is what a module is given."""
        found = self.routers.mixture(model, name, args, kwargs)
        if found is None:
            return
        router = found.pick.router
        own = self.sites.pop(router, None)
        logits = found.logits(model, None if own is None else self.noted[router].value)
        inside = {site: self.sites.pop(site) for site in list(self.sites) if site.startswith(f"{router}.")}
        if logits is not None and found.product is not None:
            self._put(logits, found.product)
        self.sites |= inside
        self._put(found.choice(), found.pick.scores)
        if own is not None and router not in self.sites:
            self.sites[router] = replace(own, dims=DIMS) if own.shape[-1] == found.count else own
        if (weights := found.weights()) is not None and found.routing is not None:
            self._put(weights, found.routing.weights)

    def _put(self, site: Site, value: Tensor) -> None:
        self.sites[site.name] = site
        self.noted[site.name] = _Seen(value, value._version, site.name)

    def label(self, name: str, shape: tuple[int, ...]) -> Dims:
        """Name the axes of a value by their sizes, which the probe has chosen to be unmistakable."""
        own = {self.batch: "batch", self.token: "token", self.batch * self.token: "batch*token"}
        owners = (size for module, size in self.experts.items() if name.startswith(f"{module}."))
        if (experts := next(owners, None)) in shape and len(shape) > 2:
            own.setdefault(experts, "expert")
        rest = [size for size in shape if size not in own]
        last = "head*head_dim" if len(rest) == 1 and without_call(name).rsplit(".", 1)[-1] in _PER_HEAD else "feature"
        names = iter(["head", "head_dim"] if len(rest) == 2 else [last] * len(rest))
        labels = [own[size] if size in own else next(names) for size in shape]
        # Of two axes that count tokens the second counts keys.
        again = {"token": "key"}
        return tuple(
            again.get(label, f"{label}_{i}") if label in labels[:i] else label for i, label in enumerate(labels)
        )

    def result(self) -> tuple[Site, ...]:
        """The sites; those whose value a later operation wrote into are marked."""
        written = {name for name, seen in self.noted.items() if seen.value._version != seen.version}
        return tuple(replace(site, overwritten=site.name in written) for site in self.sites.values())
