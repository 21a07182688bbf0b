"""How routers and experts are known in a model that is probed: by what chooses, and by who is given the choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity.record.experts import (
    CHOICES,
    DIMS,
    GIVEN,
    IN_ROUTER,
    ROUTED,
    Routing,
    experts_in,
    is_maximum,
    makes_logits,
    routing_of,
)
from parity.sites import Site


@dataclass(frozen=True)
class Pick:
    """A choice of experts: the module that made it, the scores (token, expert) it was made by, and in which way.

    `kept` is what the choice was made into; it is held so that no other tensor gets its identity.
    """

    router: str
    scores: Tensor
    where: str
    kept: Any


class RouterProbe(TorchFunctionMode):
    """While it is entered, remembers which module made which choice: that is how a router is known.

    `running` are the names of the modules whose forward runs, the innermost last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self._picks: dict[int, Pick] = {}  # by the storage of the indices
        self._products: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.running:
            return result
        router, what = self.running[-1], getattr(func, "__name__", "")
        if what == "topk":
            self._picks[_identity(result[1])] = Pick(router, args[0], CHOICES[0], result)
        elif what == "max" and is_maximum(result):
            self._picks[_identity(result[1])] = Pick(router, args[0], CHOICES[1], result)
        elif what in ("cat", "concat", "concatenate"):
            self._joined(args[0], result)
        elif what == "linear":
            self._products[router] = result
        return result

    def _joined(self, parts: Any, result: Tensor) -> None:
        picks = [self._picks.get(_identity(part)) for part in parts if isinstance(part, Tensor)]
        if len(picks) == 2 and all(pick is not None and pick.where == CHOICES[1] for pick in picks):
            assert picks[0] is not None, "unreachable because all are"
            self._picks[_identity(result)] = Pick(picks[0].router, picks[0].scores, CHOICES[1], result)

    def mixture(self, model: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mixture | None:
        """The mixture whose experts the module of this name is, from what it is given; None if it is none."""
        count = experts_in(model.get_submodule(name))
        if count is None:
            return None
        routing = routing_of(args, kwargs)
        pick = self._picks.get(_identity(routing.index)) if routing else self._beside(name, count, args)
        return Mixture(name, count, pick, self._products.get(pick.router), routing) if pick else None

    def _beside(self, name: str, count: int, args: tuple[Any, ...]) -> Pick | None:
        """The choice of a module beside one whose experts are each given all tokens, weighed before: (rows, hidden)."""
        given = [value for value in args if isinstance(value, Tensor)]
        if len(given) != 1 or given[0].dim() != 2:
            return None
        parent = name.rpartition(".")[0]
        fits = (
            pick
            for pick in reversed(self._picks.values())
            if pick.router.rpartition(".")[0] == parent
            and pick.scores.dim() == 2
            and pick.scores.shape[-1] == count
            and pick.scores.numel() == len(given[0])
        )
        return next(fits, None)


@dataclass(frozen=True)
class Mixture:
    """A module of `count` experts, the choice it follows, what the router's weight made last, and what it is given.

    `routing` is None where experts are given what was weighed before.
    """

    experts: str
    count: int
    pick: Pick
    product: Tensor | None
    routing: Routing | None

    def logits(self, model: nn.Module, returned: Tensor | None) -> Site | None:
        """The site of the router's logits (token, expert), unless a module inside it returns them.

        It has the router's own name where they are what it `returned` (any shape).
        """
        router, logits = self.pick.router, self.product
        if logits is None or logits.dim() != 2 or not makes_logits(model.get_submodule(router), self.count):
            return None
        is_its_own = returned is not None and returned.shape == logits.shape and self.routing is not None
        name = router if is_its_own else f"{router}.logits"
        return Site(name, DIMS, tuple(logits.shape), _dtype(logits), router, IN_ROUTER[0])

    def choice(self) -> Site:
        """The site of the choice, in the dtype of the scores."""
        tokens = self.pick.scores.shape[0]
        dtype = _dtype(self.pick.scores)
        return Site(f"{self.experts}.{ROUTED[0]}", DIMS, (tokens, self.count), dtype, self.pick.router, self.pick.where)

    def weights(self) -> Site | None:
        """The site of the weights that the experts are given; None where they are not."""
        if self.routing is None:
            return None
        shape = (self.routing.index.shape[0], self.count)
        name = f"{self.experts}.{ROUTED[1]}"
        return Site(name, DIMS, shape, _dtype(self.routing.weights), self.experts, GIVEN[1])


def _identity(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
