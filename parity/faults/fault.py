"""What a fault is: a known porting bug, as a change to the reference.

The change is made inside a context manager on the stock transformers modules of one piece, and is gone
afterwards. Diagnosis replays the guilty operation with each fault on the candidate's own inputs: the fault
that reproduces the candidate is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict, Unpack

from torch import Tensor, nn

from parity.sites import ends_of

TWO_TOKENS = "two tokens or more"
# What a site may be in any decoder, whatever it is called there; parity.faults.roles tells which is which.
ANY_NORM = "any norm"
ANY_ACTIVATION = "any activation"
STREAM_SUM = "any sum with a residual"
IN_ATTENTION = "any other value inside attention"
ROPE_TABLES = "any tables of RoPE"
ROLES = (ANY_NORM, ANY_ACTIVATION, STREAM_SUM, IN_ATTENTION, ROPE_TABLES)
LAST = -1.0  # as the number of a first token: the last, whatever its number

# How to find a wrong number that is not among the typical ones:
#   slope         by the response to a step of 1 %, or of 0.01 where the right number is 0
#   typical-step  by the response to a step to the next larger typical number: 1 % of an eps would drown
#   first-token   from the first token that is clearly wrong: a window ends shortly before it
#   first-right   from the first token that is right again: what is kept begins there
Method = Literal["slope", "typical-step", "first-token", "first-right"]


@dataclass(frozen=True)
class Scope:
    """Where a fault is applied: one piece of a loaded model.

    model     the transformers model; only this piece has weights
    config    its text config
    layer     the decoder layer, or None for the ends (embedding, final norm, head)
    index     the layer's number, or None
    kwargs    what transformers passes to the layer beside hidden states; a patch may replace entries
    weight    reads any tensor of the checkpoint by name, in the dtype of the model (KeyError if there is none)
    module    the module whose site is in question; None where all of the piece is
    sites     the only sites that a patch may change; None where it may change any
    text      (b, t) true where a token of the batch is text, false where it is padding; None without padding
    calls     how many tokens each call takes
    """

    model: Any
    config: Any
    layer: nn.Module | None
    index: int | None
    kwargs: dict[str, Any]
    weight: Callable[[str], Tensor]
    module: nn.Module | None = None
    sites: frozenset[str] | None = None
    text: Tensor | None = None
    calls: tuple[int, ...] = ()


@dataclass(frozen=True)
class Number:
    """The number in a fault, where it has one: eps, theta, scale, offset.

    name      what it is called in a report
    expected  reads the right value off the scope
    typical   wrong values seen in the wild, the commonest first
    log       whether errors are ratios rather than differences
    discrete  whether there may be no value between two others, so that only the typical ones can be tried
    method    how other values than the typical ones are found
    in_dtype  whether ports may keep it in the working dtype, as a factor of activations: its rounding is then legal
    """

    name: str
    expected: Callable[[Scope], float]
    typical: tuple[float, ...]
    log: bool = True
    discrete: bool = False
    method: Method = "slope"
    in_dtype: bool = False


# The first token that a fault of decoding makes wrong: usually the first that was decoded.
START = Number(name="start", expected=lambda _s: float("inf"), typical=(LAST,), discrete=True, method="first-token")


def first_token(start: float, tokens: int) -> float:
    """The number of a fault's first token among so many; a start below 0 counts from the end, as LAST does."""
    return tokens + start if start < 0 else start


# A patch changes the scope's modules for the duration of a `with` block.
Change = AbstractContextManager[None]
# The second argument is the wrong number for faults that have one, and is ignored by the others.
Patch = Callable[[Scope, float], Change]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A known porting bug.

    id           short and stable, for example `rope-interleaved`
    title        what the candidate does and what the reference does, in one sentence
    sites        where it first shows, as ends of site names (`self_attn.q_rope`, `lm_head`) or as roles (ANY_NORM, …)
    fix          what to change in a port
    patch        makes the reference compute as the bug does
    source       a public thread where it really happened
    needs        what a run must have for the fault to show
    applies      whether the model has what the fault gets wrong (QK-norm, biases, a window, …)
    number       the number that is wrong, if the fault is one of a number
    only_rounds  whether the formula is the reference's own, so that in higher precision nothing is left of the fault
    regime       whether it is a way to round more that engines choose on purpose, and a user may accept by its id
    """

    id: str
    title: str
    sites: tuple[str, ...]
    fix: str
    patch: Patch
    source: str = ""
    needs: str = ""
    applies: Callable[[Scope], bool] = lambda _scope: True
    number: Number | None = None
    only_rounds: bool = False
    regime: bool = False


class _Row(TypedDict):
    """The fields of a Fault, without its patch."""

    id: str
    title: str
    sites: tuple[str, ...]
    fix: str
    source: NotRequired[str]
    needs: NotRequired[str]
    applies: NotRequired[Callable[[Scope], bool]]
    number: NotRequired[Number]
    only_rounds: NotRequired[bool]
    regime: NotRequired[bool]


def fault(**row: Unpack[_Row]) -> Callable[[Callable[..., Change]], Fault]:
    """Make a Fault of the patch below: `patch(scope, number)` if the row has a number, else `patch(scope)`."""

    def made(patch: Callable[..., Change]) -> Fault:
        return Fault(**row, patch=patch if "number" in row else plain(patch))

    return made


def plain(change: Callable[[Scope], Change]) -> Patch:
    """The patch of a fault that has no number."""
    return lambda scope, _number: change(scope)


def shows_at(fault: Fault, site: str, roles: Collection[str] = ()) -> bool:
    """Whether a fault shows first at a site: one of its `sites` is the end of the name, at a dot, or among its roles.

    The empty end stands for the output of a layer.
    """
    return not (ends_of(site).isdisjoint(fault.sites) and frozenset(roles).isdisjoint(fault.sites))


# -- changing a model for the length of a block --------------------------------------------------------------


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
    """The parameter `name` of a module holds `value` during the block.

    It has the parameter's shape, (out, in) for a linear layer.
    """
    before = module._parameters[name]
    module._parameters[name] = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        module._parameters[name] = before
