"""A checkpoint of Qwen3 as GGUF, as llama.cpp's converter would write it, but for the tokenizer."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

_ALIGNMENT = 32
_TYPES = {"F32": (0, np.float32), "F16": (1, np.float16)}
# Number in ggml, bytes of a block, numbers in it.
_BLOCKS = {"Q4_0": (2, 18, 32), "Q8_0": (8, 34, 32), "Q4_K": (12, 144, 256)}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


# Bytes of a quantized matrix, (row, block, byte), to be changed in place.
Damage = Callable[[np.ndarray[Any, Any]], None]


def write_gguf(
    model: Path, out: Path, matrices: str = "F32", damage: Mapping[str, Damage] | None = None, **changed: Any
) -> Path:
    """Write `out`: matrices as F32, F16 or in blocks, vectors as F32; `changed` keys of the metadata, `__` for a dot.

    `damage` by the names of the file's tensors.
    """
    tensors = {_name(key): value.float().numpy() for key, value in load_file(model / "model.safetensors").items()}
    keys = _metadata(json.loads((model / "config.json").read_text()))
    keys |= {key.replace("__", "."): value for key, value in changed.items()}
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    head += b"".join(_text(key) + _value(value) for key, value in keys.items())
    data = b""
    for name, array in tensors.items():
        if array.ndim == 2 and matrices in _BLOCKS:
            kind, stored = _BLOCKS[matrices][0], quantized(array, matrices)
            (damage or {}).get(name, lambda _blocks: None)(stored)
        else:
            kind, dtype = _TYPES[matrices if array.ndim == 2 else "F32"]
            stored = array.astype(dtype)
        sizes = array.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, len(data))
        data += stored.tobytes() + bytes(-stored.nbytes % _ALIGNMENT)
    out.write_bytes(head + bytes(-len(head) % _ALIGNMENT) + data)
    return out


def quantized(array: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """A matrix (row, column) in blocks of a format, as bytes (row, block, byte); K-quants are made by llama.cpp."""
    number, size, count = _BLOCKS[kind]
    rows, columns = array.shape
    if kind.endswith("_K"):
        import ctypes
        from importlib.util import find_spec

        spec = find_spec("xllamacpp")
        assert spec is not None
        assert spec.origin is not None
        quantize = ctypes.CDLL(str(Path(spec.origin).parent / "xllamacpp.abi3.so")).ggml_quantize_chunk
        floats, room = np.ascontiguousarray(array, np.float32), np.empty((rows, columns // count, size), np.uint8)
        quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        quantize(number, floats.ctypes.data, room.ctypes.data, 0, rows, columns, None)
        return room
    import gguf
    from gguf.quants import quantize as pack

    packed = pack(array.astype(np.float32), gguf.GGMLQuantizationType[kind])
    return np.array(packed).reshape(rows, columns // count, size)


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    own = {
        "block_count": config["num_hidden_layers"],
        "context_length": 2048,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    general = {"general.architecture": "qwen3", "general.name": "test", "tokenizer.ggml.model": "none"}
    return general | {f"qwen3.{key}": value for key, value in own.items()}


def _name(key: str) -> str:
    module, kind = key.rsplit(".", 1)
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{kind}"
    _, _, layer, inside = module.split(".", 3)
    return f"blk.{layer}.{_INSIDE[inside]}.{kind}"


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    """A string (8), a float32 (6) or a uint32 (4)."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)
