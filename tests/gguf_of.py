"""A checkpoint of any of several architectures as GGUF, with what llama.cpp's converter changes in its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

# Model type → architecture of the file.
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
_RAISED = ("gemma", "gemma2", "gemma3", "nemotron")


def write(model: Path, out: Path, kind: str = "F32") -> Path:
    """Write `out`, matrices in a format of the package gguf, such as Q8_0."""
    import gguf
    from gguf.quants import quantize

    config = json.loads((model / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names: Any = gguf.get_tensor_name_map(kinds[architecture], config["num_hidden_layers"])
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_embedding_length(config["hidden_size"])
    for name, tensor in load_file(model / "model.safetensors").items():
        array = tensor.float().numpy()
        if architecture in _RAISED and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = paired(array, heads if "q_proj" in name else key_heads)
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if array.ndim == 2 and kind != "F32" and not array.shape[1] % 32:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(own, quantize(np.ascontiguousarray(array), number), raw_dtype=number)
        else:
            writer.add_tensor(own, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def paired(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a projection, of which the two halves of each head become pairs."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
