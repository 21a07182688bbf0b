"""Bugs and legal variants for real models: live changes to transformers' modules, and faults of the catalogue.

The live ones (tests.bench.architecture_bugs) share no code with parity and are planted beside sdpa, so that the port
rounds otherwise than the reference. The injected ones are the catalogue's own patches in one layer of the reference:
that they are seen, and where, is evidence; that they get their own name is less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parity.faults import parse
from parity.faults.fault import ANY_NORM, Fault
from parity.reference.build import choose_experts
from parity.run_spec import RunSpec
from tests.bench.architecture_bugs import (
    ROTATED,
    Plant,
    activation,
    attention_scale,
    norm_eps,
    other_theta,
    residual_branch,
)
from tests.bench.examined import Planted

LIVE: dict[str, Plant] = {
    "attention scale x 1.1": attention_scale,
    "activation": activation,
    "norm eps 0.1": norm_eps,
    "residual branch x 1.2": residual_branch,
}
THETA = "RoPE theta x 3"
# In the layer that is put for {}; those that a model has nothing of are left out of its table.
INJECTED = (
    "rope-theta=10000@{}",
    "rope-interleaved@{}",
    "rope-sin-sign@{}",
    "rope-skipped-k@{}",
    "rope-phase-bf16@{}",
    "position-offset-k@{}",
    "norm-eps=1e-3@{}",
    "norm-layernorm@{}",
    "norm-one-plus-w@{}",
    "norm-one-forgotten@{}",
    "norm-unweighted@{}",
    "attention-scale-hidden@{}",
    "softmax-plus-one@{}",
    "mask-next-token@{}",
    "window-applied=64@{}",
    "gqa-tile@{}",
    "v-is-k@{}",
    "act-gelu@{}",
    "act-gelu-tanh@{}",
    "act-on-up@{}",
    "mlp-no-up@{}",
    "residual-dropped-mlp@{}",
    "weight-gain@{}",
    "weight-int8@{}",
    "weight-fp8@{}",
    "weight-previous-layer@{}",
)
FEW = ("rope-theta=10000@{}", "act-gelu-tanh@{}", "weight-int8@{}")
DECODED = 32


def load(run: RunSpec, **more: Any) -> nn.Module:
    """The model as `from_pretrained` gives it, in the run's dtype."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, run.dtype)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(run.checkpoint.path, dtype=dtype, **more).eval()
    choose_experts(model)
    return model


def live(run: RunSpec, name: str, attention: str = "sdpa") -> tuple[nn.Module, Planted] | None:
    """A model on sdpa or eager with a live bug in it; None if it has nothing that the bug could change."""
    if name == THETA:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(run.checkpoint.path)
        bug, model = other_theta(config), load(run, attn_implementation=attention, config=config)
    else:
        model = load(run, attn_implementation=attention)
        bug = LIVE[name](model)
    if bug is None:
        return None
    inside = f"{bug.place.rpartition('.')[0]}."

    def may(site: str, first: str) -> bool:
        if bug.spreads == "family":
            return _end(site) in (_end(first), *ROTATED)
        return bug.spreads == "inside" and site.startswith(inside) and _end(site) == _end(first)

    return model, Planted(name, frozenset(bug.names), may, base=attention)


def injected(text: str) -> Planted:
    """What is known of a fault of the catalogue in one layer."""
    inject = parse(text)
    fault = inject.fault

    def may(site: str, first: str) -> bool:
        # What lies outside of the layers is changed with every one of them.
        is_end = not any(part.isdigit() for part in site.split("."))
        is_kind = _end(site) in _ends(fault) or (ANY_NORM in fault.sites and "norm" in _end(site))
        return is_kind and (is_end or site.split(".")[:3] == first.split(".")[:3])

    return Planted(str(inject), frozenset({fault.id}), may)


def _ends(fault: Fault) -> set[str]:
    return {_end(site) for site in fault.sites}


def _end(site: str) -> str:
    return site.rpartition(".")[2].partition("#")[0]


def looped_norms(run: RunSpec) -> nn.Module:
    """A clean port whose RMSNorms add up their squares one after another, as a plain loop does; on eager attention."""
    model = load(run, attn_implementation="eager")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _loop(module)  # type: ignore[method-assign]
    return model


def _loop(norm: Any) -> Callable[[Tensor], Tensor]:
    adds_one = hasattr(norm, "eps")  # as Gemma's do, whose weight is what is added to one, before rounding
    eps = norm.eps if adds_one else norm.variance_epsilon

    def forward(x: Tensor) -> Tensor:
        wide = x.float()
        total = torch.zeros(x.shape[:-1])
        for channel in wide.unbind(-1):
            total = total + channel * channel
        scaled = wide * torch.rsqrt(total / x.shape[-1] + eps)[..., None]
        if adds_one:
            return (scaled * (1.0 + norm.weight.float())).to(x.dtype)
        return norm.weight * scaled.to(x.dtype)

    return forward


class AheadInDecoding(nn.Module):
    """A model of transformers whose decoded tokens are placed one too far, as when they are counted first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules = model._modules
        self.__dict__["own"] = model

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, position_ids: Tensor | None = None, use_cache: bool = True
    ) -> Any:
        """Logits and cache, for ids (b, t); every call but the first is a decoded token."""
        if position_ids is not None and past_key_values is not None:
            position_ids = position_ids + 1
        own = self.__dict__["own"]
        return own(input_ids, past_key_values=past_key_values, position_ids=position_ids, use_cache=use_cache)


AHEAD = Planted("decoded positions + 1", frozenset({"position-decode-ahead"}), lambda site, _: _end(site) in ROTATED)
