"""What several test modules build: whole models, and single operations as a replay sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.record.tap import quiet_torch, tapping
from parity.reference.checkpoint import find
from parity.reference.floor import Local, local_error
from parity.reference.pieces import PiecewiseModel
from parity.reference.precision import jittered, truth_dtype
from parity.reference.replay import Replayed
from parity.sites import Dims, Site

# -- whole models --------------------------------------------------------------------------------------------

BATCH, TOKEN = 2, 11  # more tokens than a sliding window of 7
IDS = (torch.arange(BATCH * TOKEN).reshape(BATCH, TOKEN) * 37 + 11) % 200
# More tokens than any window, the pad token not among them.
LONG_IDS = (torch.arange(2 * 40).reshape(2, 40) * 37 + 11) % 200 + 3


def on_meta(path: Path, implementation: str, dtype: torch.dtype) -> Any:
    return PiecewiseModel(find(str(path)), dtype, attention=implementation).model


def whole(path: Path, implementation: str, dtype: torch.dtype) -> Any:
    """The stock model in memory; experts computed as the pieces do, for there are several ways to round them."""
    from transformers import AutoModelForCausalLM

    experts = getattr(on_meta(path, "eager", dtype).config, "_experts_implementation", None)
    more = {"experts_implementation": experts} if "moe" in path.name else {}
    with quiet_torch():
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=implementation, **more
        ).eval()


def fired(path: Path, implementation: str, dtype: torch.dtype, sites: tuple[Site, ...]) -> dict[str, list[Tensor]]:
    """Every value that a real run of the whole model hands to a tap, in order."""
    seen: dict[str, list[Tensor]] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        seen.setdefault(site, []).append(value.clone())
        return value

    model = whole(path, implementation, dtype)
    with quiet_torch(), tapping(model, sites, tap):
        model(input_ids=IDS, use_cache=False)
    return seen


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- single operations ---------------------------------------------------------------------------------------

B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROWS: Dims = ("batch", "token", "feature")
Op = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """One operation of the reference on inputs that a candidate recorded."""

    op: Op
    inputs: tuple[Tensor, ...]
    dims: Dims = ROWS
    working: torch.dtype = B16
    summands: int = 1
    head_dim: int | None = None

    @property
    def recorded(self) -> tuple[Tensor, ...]:
        return tuple(x.to(self.working) for x in self.inputs)

    def at(self, dtype: torch.dtype) -> Tensor:
        """The operation in a precision, on the inputs as they were recorded."""
        return self.op(*(x.to(dtype) for x in self.recorded))

    def site(self, candidate: Tensor) -> Replayed:
        wide = truth_dtype(self.working)
        moved = (jittered(x.to(wide), self.working, torch.Generator().manual_seed(1)) for x in self.recorded)
        truth, own = self.at(wide), self.at(self.working)
        name = Site("model.layers.0.x", self.dims, tuple(truth.shape), "bfloat16", "x")
        return Replayed(name, own, truth, candidate, truth, own, self.op(*moved), self.summands)

    def measure(self, candidate: Tensor, storage: torch.dtype | None = None) -> Local:
        return local_error(self.site(candidate), self.working, storage or self.working, self.head_dim)

    def judged(self, candidate: Callable[[Tensor], Tensor]) -> Local:
        """A candidate that is a change to the reference's own result."""
        return self.measure(candidate(self.at(self.working)))


def linear(tokens: int = 24, inputs: int = 48, outputs: int = 40, **more: object) -> Case:
    weight = draw(outputs, inputs, seed=9).to(B16)
    return Case(
        lambda x: F.linear(x, weight.to(x.dtype)),
        (draw(1, tokens, inputs),),
        summands=inputs,
        **more,  # type: ignore[arg-type]
    )


def silu(*shape: int, **more: object) -> Case:
    return Case(F.silu, (draw(*(shape or (1, 24, 40))),), **more)  # type: ignore[arg-type]


class IdsAlone(nn.Module):
    """A port whose forward takes token ids and nothing else: no mask, no cache."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.model, self.lm_head, self._inner = inner.model, inner.lm_head, [inner]

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self._inner[0](input_ids)
        return logits
