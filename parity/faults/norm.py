"""Norms: what is left out, eps, weights, and where rounding happens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parity.faults.fault import Fault, Number, Scope, attribute, weight
from parity.faults.parts import elsewhere, eps_name, forward, norms_of, plain, stored_as, together, wide

QK = ("q_norm", "k_norm")
IN_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
FINAL = ("norm", "final_layernorm", "final_layer_norm")
STREAM = (*IN_LAYER, *FINAL)
ALL = (*IN_LAYER, *QK, *FINAL)
LOW = "bfloat16 or float16"
Change = AbstractContextManager[None]


# -- which norms ---------------------------------------------------------------------------------------------


def eps_of(norm: nn.Module) -> float:
    """The eps of a norm."""
    return float(getattr(norm, eps_name(norm) or "eps"))


def is_centred(norm: Any) -> bool:
    """Whether a norm subtracts the mean (LayerNorm): tried on a vector that has nothing but a mean."""
    if isinstance(norm, nn.LayerNorm) or getattr(norm, "bias", None) is not None:
        return True
    return "LayerNorm" in type(norm).__name__ and "RMS" not in type(norm).__name__


def adds_one(norm: Any) -> bool:
    """Whether a norm multiplies by 1 + weight: tried with a weight of zero."""
    own = getattr(norm, "weight", None)
    if own is None or own.is_meta or is_centred(norm):
        return False
    with weight(norm, "weight", torch.zeros_like(own)), torch.no_grad():
        return bool(type(norm).forward(norm, torch.ones_like(own)[None]).any())


def rms_norms(scope: Scope, names: tuple[str, ...] = ALL) -> dict[str, Any]:
    """The RMS norms of the scope whose names end so."""
    return {
        name: norm
        for name, norm in norms_of(scope).items()
        if name.split(".")[-1] in names and not is_centred(norm) and getattr(norm, "weight", None) is not None
    }


def _any(names: tuple[str, ...] = ALL, test: Callable[[Any], bool] = lambda _norm: True) -> Callable[[Scope], bool]:
    return lambda scope: any(test(norm) for norm in rms_norms(scope, names).values())


def _each(names: tuple[str, ...], compute: Callable[[Any, Tensor], Tensor]) -> Callable[[Scope], Change]:
    """All RMS norms of these names compute `compute(norm, x)`."""
    return lambda scope: together(*(forward(n, partial(compute, n)) for n in rms_norms(scope, names).values()))


# -- the norm, step by step ----------------------------------------------------------------------------------


def _up(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))


def _mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def _unit(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(_mean_square(x) + eps)


def _weigh(norm: Any, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """The last step, in the order in which the reference rounds."""
    own: Tensor = norm.weight
    return (unit * (1.0 + own.to(unit.dtype))).to(dtype) if adds_one(norm) else own * unit.to(dtype)


# -- the bugs ------------------------------------------------------------------------------------------------


def _left_out(_norm: Any, x: Tensor) -> Tensor:
    return x.clone()


def _centred(norm: Any, x: Tensor) -> Tensor:
    up = _up(x)
    return _weigh(norm, _unit(up - up.mean(-1, keepdim=True), eps_of(norm)), x.dtype)


def _one_plus(norm: Any, x: Tensor) -> Tensor:
    unit = _unit(_up(x), eps_of(norm))
    own: Tensor = norm.weight
    return (unit * (1.0 + own.to(unit.dtype))).to(x.dtype)


def _one_forgotten(norm: Any, x: Tensor) -> Tensor:
    unit = _unit(_up(x), eps_of(norm))
    own: Tensor = norm.weight
    return (unit * own.to(unit.dtype)).to(x.dtype)


def _unweighted(norm: Any, x: Tensor) -> Tensor:
    return _unit(_up(x), eps_of(norm)).to(x.dtype)


def _eps_outside(norm: Any, x: Tensor) -> Tensor:
    up = _up(x)
    return _weigh(norm, up / (_mean_square(up).sqrt() + eps_of(norm)), x.dtype)


def _without_eps(norm: Any, x: Tensor) -> Tensor:
    return _weigh(norm, _unit(_up(x), 0.0), x.dtype)


def _by_length(norm: Any, x: Tensor) -> Tensor:
    up = _up(x)
    return _weigh(norm, up * torch.rsqrt(up.pow(2).sum(-1, keepdim=True) + eps_of(norm)), x.dtype)


def _low_throughout(norm: Any, x: Tensor) -> Tensor:
    unit = x * torch.rsqrt(_mean_square(x) + eps_of(norm))
    product: Tensor = unit * (1.0 + norm.weight) if adds_one(norm) else unit * norm.weight
    return product


def _inverse_rounded(norm: Any, x: Tensor) -> Tensor:
    up = _up(x)
    inverse = stored_as(torch.rsqrt(_mean_square(up) + eps_of(norm)), torch.bfloat16)
    return _weigh(norm, up * inverse, x.dtype)


def _other_order(norm: Any, x: Tensor) -> Tensor:
    unit = _unit(_up(x), eps_of(norm))
    own: Tensor = norm.weight
    return unit.to(x.dtype) * (1.0 + own) if adds_one(norm) else (unit * own.to(unit.dtype)).to(x.dtype)


def _mean_kept(norm: Any, x: Tensor) -> Tensor:
    unit = _unit(_up(x), eps_of(norm)).to(x.dtype)
    scaled: Tensor = unit * norm.weight if norm.weight is not None else unit
    return scaled + norm.bias if norm.bias is not None else scaled


def _eps(scope: Scope, eps: float) -> Change:
    return together(*(attribute(n, eps_name(n) or "eps", eps) for n in norms_of(scope).values()))


def _from_layer(step: int) -> Callable[[Scope], Change]:
    def change(scope: Scope) -> Change:
        found = {n: (norm, elsewhere(scope, f"{n}.weight", step)) for n, norm in norms_of(scope).items()}
        pairs = [(norm, w) for norm, w in found.values() if w is not None and w.shape == norm.weight.shape]
        return together(*(weight(norm, "weight", w.to(norm.weight)) for norm, w in pairs))

    return change


def _has_layer(step: int) -> Callable[[Scope], bool]:
    return lambda scope: any(elsewhere(scope, f"{n}.weight", step) is not None for n in norms_of(scope))


def _exchanged(one: str, other: str) -> Callable[[Scope], Change]:
    def change(scope: Scope) -> Change:
        a, b = _pair(scope, one, other)
        return together(weight(a, "weight", b.weight.data), weight(b, "weight", a.weight.data))

    return change


def _pair(scope: Scope, one: str, other: str) -> list[Any]:
    last = {name.split(".")[-1]: norm for name, norm in norms_of(scope).items()}
    return [last[name] for name in (one, other) if name in last]


def _exchangeable(one: str, other: str) -> Callable[[Scope], bool]:
    def test(scope: Scope) -> bool:
        pair = _pair(scope, one, other)
        return len(pair) == 2 and pair[0].weight.shape == pair[1].weight.shape

    return test


_SMALL = "hidden states whose mean square is not far above eps (early layers), or float32"

FAULTS: tuple[Fault, ...] = (
    Fault(
        "norm-skipped",
        "the norm is left out",
        STREAM,
        "apply the norm before what follows it",
        "candle#2021",
        "",
        plain(_each(STREAM, _left_out)),
        _any(STREAM),
    ),
    Fault(
        "norm-eps",
        "the norm uses another eps than config.json",
        ALL,
        "read rms_norm_eps from config.json instead of a default",
        "aprender#1606",
        _SMALL,
        _eps,
        lambda s: bool(norms_of(s)),
        Number("eps", lambda s: eps_of(next(iter(norms_of(s).values()))), (1e-5, 1e-6, 1e-8, 1e-12, 1e-3)),
    ),
    Fault(
        "norm-eps-missing",
        "the norm has no eps",
        ALL,
        "add rms_norm_eps to the mean square",
        "",
        _SMALL,
        plain(_each(ALL, _without_eps)),
        _any(),
    ),
    Fault(
        "norm-eps-outside",
        "the norm adds eps to the root; the reference adds it to the mean square",
        ALL,
        "compute x * rsqrt(mean(x²) + eps)",
        "coremltools#2821",
        _SMALL,
        plain(_each(ALL, _eps_outside)),
        _any(),
    ),
    Fault(
        "norm-layernorm",
        "the norm subtracts the mean first (LayerNorm); the reference is an RMSNorm",
        ALL,
        "divide by the root mean square and subtract nothing",
        "mlx-examples#1308",
        "",
        plain(_each(ALL, _centred)),
        _any(),
    ),
    Fault(
        "norm-rms-for-layernorm",
        "the norm keeps the mean (RMSNorm); the reference is a LayerNorm",
        ALL,
        "subtract the mean and divide by the standard deviation",
        "",
        "",
        plain(lambda s: together(*(forward(n, partial(_mean_kept, n)) for n in norms_of(s).values() if is_centred(n)))),
        lambda s: any(is_centred(n) for n in norms_of(s).values()),
    ),
    Fault(
        "norm-length",
        "the norm divides by the length of the vector; the reference by its root mean square",
        ALL,
        "take the mean of the squares, not their sum",
        "",
        "",
        plain(_each(ALL, _by_length)),
        _any(),
    ),
    Fault(
        "norm-one-plus-w",
        "the norm multiplies by 1 + w; the reference by w",
        ALL,
        "multiply by the weight as it is (1 + w is Gemma's)",
        "mlx-lm#1623",
        "",
        plain(_each(ALL, _one_plus)),
        _any(test=lambda n: not adds_one(n)),
    ),
    Fault(
        "norm-one-forgotten",
        "the norm multiplies by w; the reference by 1 + w",
        ALL,
        "multiply by 1 + weight, or add the one when converting the checkpoint",
        "llama.cpp#5810",
        "",
        plain(_each(ALL, _one_forgotten)),
        _any(test=adds_one),
    ),
    Fault(
        "norm-unweighted",
        "the norm's weights are never applied",
        ALL,
        "load the norm's weights and multiply by them",
        "",
        "",
        plain(_each(ALL, _unweighted)),
        _any(),
    ),
    Fault(
        "norm-next-layer",
        "the norm has the weights of the next layer",
        (*IN_LAYER, *QK),
        "check how the checkpoint's layers are numbered",
        "TorchSpec#89",
        "",
        plain(_from_layer(1)),
        _has_layer(1),
    ),
    Fault(
        "norm-previous-layer",
        "the norm has the weights of the layer before",
        (*IN_LAYER, *QK),
        "check how the checkpoint's layers are numbered",
        "TorchSpec#89",
        "",
        plain(_from_layer(-1)),
        _has_layer(-1),
    ),
    Fault(
        "norm-exchanged",
        "the weights of the two norms of a layer change places",
        ("input_layernorm", "post_attention_layernorm"),
        "input_layernorm belongs before attention, post_attention_layernorm after it",
        "",
        "",
        plain(_exchanged("input_layernorm", "post_attention_layernorm")),
        _exchangeable("input_layernorm", "post_attention_layernorm"),
    ),
    Fault(
        "norm-not-upcast",
        "the norm is computed in the dtype of the model; the reference computes it in float32",
        ALL,
        "cast to float32 before squaring",
        "",
        LOW,
        plain(_each(ALL, _low_throughout)),
        _any(),
    ),
    Fault(
        "norm-inverse-bf16",
        "the norm rounds the inverse root mean square to bfloat16, one error for a whole row",
        ALL,
        "keep rsqrt(mean(x²) + eps) in float32 until it has been multiplied",
        "AMD/IRON#139",
        "",
        plain(_each(ALL, _inverse_rounded)),
        _any(),
    ),
    Fault(
        "norm-rounding-order",
        "the norm rounds before or after its weight where the reference does the other",
        ALL,
        "legal unless bit-equality is wanted: round to the model's dtype where the reference does",
        "vllm#42379",
        LOW,
        plain(_each(ALL, _other_order)),
        _any(),
    ),
)
