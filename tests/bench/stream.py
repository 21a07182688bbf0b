"""Massive activations: where the residual stream of a model is largest, and by how much."""

from __future__ import annotations

from typing import Any

import torch

from parity.record.arrays import to_torch
from tests.bench.examined import Bench

FLOAT16_MAX = 65504.0


def peak_of(bench: Bench) -> dict[str, Any]:
    """The largest |x| of the residual stream behind a layer in the reference's own run.

    Its site, token, channel and value, the median of |x| at that site, and the first site of the model with a number
    that float16 does not have (empty for none).
    """
    peak: dict[str, Any] = {"largest": 0.0, "beyond": ""}
    for site in bench.reference.working.sites:
        values = to_torch(bench.dump.read(site.name)).float().abs()
        largest = float(values.max())
        if largest > FLOAT16_MAX and not peak["beyond"]:
            peak["beyond"] = site.name
        if site.name.rpartition(".")[2].isdigit() and largest > peak["largest"]:
            _, token, channel = (int(i) for i in torch.unravel_index(values.argmax(), values.shape))
            peak |= {"site": site.name, "token": token, "channel": channel, "largest": largest}
            peak["median"] = float(values.median())
    return peak
