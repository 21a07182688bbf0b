"""A checkpoint as ONNX, as torch's exporter writes it, and the same with other numbers in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(input_ids=input_ids, use_cache=False).logits
        return logits


def export(model: Path, out: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Write `out`, whose weights lie in a file beside it, for any number of rows and tokens."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager").eval()
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("token")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Logits(loaded),
            (torch.zeros(2, 9, dtype=torch.long),),
            dynamo=True,
            verbose=False,
            dynamic_shapes=(axes,),
            input_names=["input_ids"],
            output_names=["logits"],
            **options,
        )
        assert program is not None
        program.save(out, external_data=True)
    return out


def changed(file: Path, out: Path, change: Callable[[Any], object]) -> Path:
    """The same graph, all in one file, after `change(model)`."""
    import onnx

    model = onnx.load(file)
    change(model)
    onnx.save(model, out)
    return out


def with_theta(model: Any, theta: float) -> None:
    """Put another base into the frequencies of RoPE."""
    from onnx import numpy_helper

    (tensor,) = (x for x in model.graph.initializer if x.name.endswith("inv_freq"))
    old = numpy_helper.to_array(tensor)
    half = old.size
    new = (1 / theta ** (np.arange(half) / half)).astype(old.dtype).reshape(old.shape)
    tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))


def with_eps(model: Any, eps: float) -> None:
    """Put another eps into all norms, which share the constant."""
    from onnx import numpy_helper

    means = {node.output[0] for node in model.graph.node if node.op_type == "ReduceMean"}
    added = {node.input[1] for node in model.graph.node if node.op_type == "Add" and node.input[0] in means}
    (tensor,) = (x for x in model.graph.initializer if x.name in added)
    tensor.CopyFrom(numpy_helper.from_array(np.array(eps, np.float32), tensor.name))


def without_metadata(model: Any) -> None:
    """Forget which module made what."""
    for node in model.graph.node:
        del node.metadata_props[:]


def with_sum_in_norm(model: Any) -> None:
    """Say that a norm made the sum behind attention: then two values leave the layer."""
    (norm,) = (n for n in model.graph.node if n.op_type == "Pow" and n.input[0] == "embedding")
    (branch,) = (n for n in model.graph.node if n.op_type == "Add" and n.input[0] == "embedding")
    del branch.metadata_props[:]
    branch.metadata_props.extend(norm.metadata_props)
