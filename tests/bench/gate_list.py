"""The gates that ports are usually held to, each with the place where it is used, and the figures they rest on.

A gate says pass or fail of the logits of a run, or names the first tensor that differs. None of them is parity's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Figures:
    """What the gates look at: the candidate's logits c against the reference's r, all positions together.

    cosine, pcc  of the flattened logits; pcc is the cosine of both less their means
    mse, nmse    mean of (c − r)², and that over the variance of r
    max_kl       the largest over positions of KL(r ‖ c), in nats
    token_ratio  mean of exp|Δ log p| over the tokens that follow in the prompt; 1 where there is none
    close        whether all are within torch's own tolerance for the dtype
    close_share  the share within rtol = atol = 0.01
    same_token   whether the last position has the same largest logit
    error_ratio  distance of c from the exact run over that of r, as parity measures it
    first        for gates of tensors: the first tensor that fails, in order of execution; empty where all pass
    """

    cosine: float
    pcc: float
    mse: float
    nmse: float
    max_kl: float
    token_ratio: float
    close: bool
    close_share: float
    same_token: bool
    error_ratio: float
    first: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate:
    """`passes` says of the figures of a run whether it is right; NaN passes nowhere. `names` gates name a tensor."""

    id: str
    passes: Callable[[Figures], bool]
    used_by: str
    source: str
    names: bool = False


def _tensors(kind: str) -> Callable[[Figures], bool]:
    return lambda f: not f.first[kind]


# Kinds of `first`, and what is asked of a tensor there.
BITS, DIFF, CLOSE = "bits", "rel_diff", "close"
_GITHUB = "https://github.com/"
GATES = (
    Gate(
        "cosine 0.99",
        lambda f: f.cosine >= 0.99,
        "Ascend's comparison of PyTorch dumps",
        "https://www.hiascend.com/doc_center/source/zh/canncommercial/700/modeldevpt/ptmigr/AImpug_000197.html",
    ),
    Gate("cosine 0.999", lambda f: f.cosine >= 0.999, "ports by hand", ""),
    Gate(
        "PCC 0.99",
        lambda f: f.pcc >= 0.99,
        "Tenstorrent",
        _GITHUB + "tenstorrent/tt-metal/pull/13990",
    ),
    Gate(
        "assert_close",
        lambda f: f.close,
        "torch.testing, its defaults for the dtype",
        "https://docs.pytorch.org/docs/stable/testing.html",
    ),
    Gate(
        "allclose 0.01",
        lambda f: f.close_share >= 1.0,
        "transformers, eager against sdpa in bfloat16",
        _GITHUB + "huggingface/transformers/blob/main/tests/test_modeling_common.py",
    ),
    Gate(
        "NMSE 1e-2",
        lambda f: f.nmse < 1e-2,
        "llama.cpp, model conversion",
        _GITHUB + "ggml-org/llama.cpp/blob/master/examples/model-conversion/scripts/utils/check-nmse.py",
    ),
    Gate("MSE 1e-3", lambda f: f.mse < 1e-3, "a Rust port of Qwen3-0.6B, with next token and cosine", ""),
    Gate(
        "max KL 0.015",
        lambda f: f.max_kl <= 0.015,
        "MaxText",
        _GITHUB + "AI-Hypercomputer/maxtext/pull/1695",
    ),
    Gate(
        "exp Δlogp 1.05",
        lambda f: f.token_ratio <= 1.05,
        "NeMo RL",
        "https://docs.nvidia.com/nemo/rl/0.6.0/adding-new-models.html",
    ),
    Gate(
        "2x error",
        lambda f: f.error_ratio <= 2.0,
        "FlashAttention's tests, there of one kernel and the largest error",
        _GITHUB + "Dao-AILab/flash-attention/blob/main/hopper/test_flash_attn.py",
    ),
    Gate("next token", lambda f: f.same_token, "ports by hand", ""),
    Gate("first tensor, bits", _tensors(BITS), "bisection by hand", "", names=True),
    Gate(
        "first tensor, 1e-3",
        _tensors(DIFF),
        "SGLang's comparator (rel_diff)",
        _GITHUB + "sgl-project/sglang/blob/main/python/sglang/srt/debug_utils/dump_comparator.py",
        names=True,
    ),
    Gate(
        "first tensor, close",
        _tensors(CLOSE),
        "comparison layer by layer as Polygraphy does it, here at torch's tolerance",
        _GITHUB + "NVIDIA/TensorRT/tree/main/tools/Polygraphy",
        names=True,
    ),
)
BY_ID = {gate.id: gate for gate in GATES}


def passed(gate: Gate, figures: Figures) -> bool:
    """Whether a gate passes a run; comparisons with NaN are false, so that a run of NaN passes nothing."""
    return bool(gate.passes(figures))


def relative_difference(cc: float, rr: float, cr: float) -> float:
    """1 − 2⟨c, r⟩ / (⟨c, c⟩ + ⟨r, r⟩), as DeepGEMM and SGLang compute it; 0 for two tensors of zeros, inf for NaN."""
    if not math.isfinite(cc + rr + cr):
        return math.inf
    return 1.0 - 2.0 * cr / (cc + rr) if cc + rr else 0.0
