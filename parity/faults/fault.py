"""What a fault is: a known porting bug, as a change to the reference.

The change is made inside a context manager on the stock transformers modules of one piece, and is gone
afterwards. Diagnosis replays the guilty operation with each fault on the candidate's own inputs: the fault
that reproduces the candidate is the answer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Scope:
    """Where a fault is applied: one piece of a loaded model.

    model     the transformers model; only this piece has weights
    config    its text config
    layer     the decoder layer, or None for the ends (embedding, final norm, head)
    index     the layer's number, or None
    kwargs    what transformers passes to the layer beside hidden states; a patch may replace entries
    weight    reads any tensor of the checkpoint by name, in the dtype of the model (KeyError if there is none)
    """

    model: Any
    config: Any
    layer: nn.Module | None
    index: int | None
    kwargs: dict[str, Any]
    weight: Callable[[str], Tensor]


@dataclass(frozen=True)
class Number:
    """The number in a fault, where it has one: eps, theta, scale, offset.

    `expected` reads the right value off the scope; `typical` are wrong values seen in the wild, the first being
    the commonest; `log` says that errors are ratios rather than differences; `discrete` that between two values
    there may be none, so that only the typical ones can be tried.
    """

    name: str
    expected: Callable[[Scope], float]
    typical: tuple[float, ...]
    log: bool = True
    discrete: bool = False


# A patch changes the scope's modules for the duration of a `with` block. The second argument is the wrong
# number for faults that have one, and is ignored by the others.
Patch = Callable[[Scope, float], AbstractContextManager[None]]


@dataclass(frozen=True)
class Fault:
    """A known porting bug.

    id      short and stable, for example `rope-interleaved`
    title   what the candidate does and what the reference does, in one sentence
    sites   where it first shows, as ends of site names: `self_attn.q_rope`, `input_layernorm`, `lm_head`
    fix     what to change in a port
    source  a public thread where it really happened
    needs   what a run must have for the fault to show
    applies whether the model has what the fault gets wrong (QK-norm, biases, a window, …)
    """

    id: str
    title: str
    sites: tuple[str, ...]
    fix: str
    source: str
    needs: str
    patch: Patch
    applies: Callable[[Scope], bool] = lambda _scope: True
    number: Number | None = None

    @property
    def only_rounds(self) -> bool:
        """Whether the formula is the reference's own, so that in higher precision nothing is left of the fault."""
        return self.needs.startswith("bfloat16")


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` during the block; afterwards it is what it was, or gone if it was not there."""
    own = vars(owner)
    missing = object()
    before = own.get(name, missing)
    modules = owner._modules if isinstance(owner, nn.Module) and name in owner._modules else None
    if modules is not None:
        before = modules[name]
        modules[name] = value
    else:
        setattr(owner, name, value)
    try:
        yield
    finally:
        if modules is not None:
            modules[name] = before
        elif before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def weight(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """The parameter `name` of a module holds `value` during the block."""
    before = module._parameters[name]
    module._parameters[name] = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        module._parameters[name] = before


def source_of(module: nn.Module) -> Any:
    """The transformers file that a module's class comes from: home of `apply_rotary_pos_emb` and its like."""
    return sys.modules[type(module).__module__]
