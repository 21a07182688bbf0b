"""Run a GGUF in llama.cpp and record its activations: a program of its own, which needs numpy and xllamacpp.

    python run_gguf.py < request.json

The request says `file`, `token_ids`, `options`, `out` for the activations (npz), `untapped` for the logits of a run
without taps (npy), `said` for words about it (JSON). Errors are the last line of stderr. `VERSION` has these layouts.
"""

from __future__ import annotations

import ctypes as c
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

VERSION = "2026.10.11549"
KV = {"f32": 0, "f16": 1, "q8_0": 8}  # numbers of ggml_type
FLASH, FLOAT32 = {"off": 0, "on": 1}, 0

# (name in llama.cpp, its operation) → site; a nameless node goes by its weight's name. One tensor must fit each site.
TAPS: dict[tuple[str, str], str] = {
    ("embd", "GET_ROWS"): "model.embed_tokens",
    ("attn_norm-N", "MUL"): "model.layers.N.input_layernorm",
    ("Qcur-N", "MUL_MAT"): "model.layers.N.self_attn.q_proj",
    ("Kcur-N", "MUL_MAT"): "model.layers.N.self_attn.k_proj",
    ("Vcur-N", "MUL_MAT"): "model.layers.N.self_attn.v_proj",
    ("Qcur_normed-N", "MUL"): "model.layers.N.self_attn.q_norm",
    ("Kcur_normed-N", "MUL"): "model.layers.N.self_attn.k_norm",
    ("Qcur-N", "ROPE"): "model.layers.N.self_attn.q_rope",
    ("Kcur-N", "ROPE"): "model.layers.N.self_attn.k_rope",
    ("kqv_out-N", "CONT"): "model.layers.N.self_attn.context",
    ("kqv_out-N", "RESHAPE"): "model.layers.N.self_attn.context",
    ("blk.N.attn_output.weight", "MUL_MAT"): "model.layers.N.self_attn.o_proj",
    ("ffn_inp-N", "ADD"): "model.layers.N.resid_mid",
    ("ffn_norm-N", "MUL"): "model.layers.N.post_attention_layernorm",
    ("ffn_gate-N", "MUL_MAT"): "model.layers.N.mlp.gate_proj",
    ("ffn_up-N", "MUL_MAT"): "model.layers.N.mlp.up_proj",
    ("ffn_swiglu-N", "SWIGLU"): "model.layers.N.mlp.product",
    ("ffn_out-N", "MUL_MAT"): "model.layers.N.mlp.down_proj",
    ("l_out-N", "ADD"): "model.layers.N",
    ("result_norm", "MUL"): "model.norm",
    ("result_output", "MUL_MAT"): "lm_head",
}
LAYER = re.compile(r"(.*[-.])(\d+)(.*)")
HEADS = ("q_norm", "k_norm", "q_rope", "k_rope")


class Tensor(c.Structure):
    """ggml_tensor up to its name."""

    _fields_ = (
        ("type", c.c_int),
        ("buffer", c.c_void_p),
        ("ne", c.c_int64 * 4),
        ("nb", c.c_size_t * 4),
        ("op", c.c_int),
        ("op_params", c.c_int32 * 16),
        ("flags", c.c_int32),
        ("src", c.c_void_p * 10),
        ("view_src", c.c_void_p),
        ("view_offs", c.c_size_t),
        ("data", c.c_void_p),
        ("name", c.c_char * 64),
    )


class ContextParams(c.Structure):
    """llama_context_params up to what is set here; it is returned and passed by value, so the rest must be room."""

    _fields_ = (
        *((name, c.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        ("unknown", c.c_uint32 * 3),
        *((name, c.c_int32) for name in ("n_threads", "n_threads_batch", "context_type")),
        *((name, c.c_int32) for name in ("rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type")),
        ("rope_and_yarn", c.c_float * 6),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        ("rest", c.c_ubyte * 904),
    )


# What the library gives, where its structure has it.
DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "rope_scaling_type": -1,
    "flash_attn_type": -1,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "type_k": KV["f16"],
    "type_v": KV["f16"],
}


class ModelParams(c.Structure):
    """llama_model_params, all of which stays as it is."""

    _fields_ = (("all", c.c_ubyte * 1024),)


class Batch(c.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


Array = np.ndarray[Any, Any]
See = Callable[[Any, bool, Any], bool]
Callback = c.CFUNCTYPE(c.c_bool, c.POINTER(Tensor), c.c_bool, c.c_void_p)
Log = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
P, S = c.c_void_p, c.c_char_p
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (Log, P)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (P, (S, ModelParams)),
    "llama_init_from_model": (P, (P, ContextParams)),
    "llama_free": (None, (P,)),
    "llama_model_meta_val_str": (c.c_int32, (P, S, S, c.c_size_t)),
    "llama_model_get_vocab": (P, (P,)),
    "llama_vocab_n_tokens": (c.c_int32, (P,)),
    "llama_batch_init": (Batch, (c.c_int32, c.c_int32, c.c_int32)),
    "llama_decode": (c.c_int32, (P, Batch)),
    "llama_get_logits_ith": (c.POINTER(c.c_float), (P, c.c_int32)),
    "ggml_nbytes": (c.c_size_t, (P,)),
    "ggml_get_name": (c.c_void_p, (P,)),
    "ggml_op_desc": (S, (P,)),
    "ggml_backend_tensor_get": (None, (P, P, c.c_size_t, c.c_size_t)),
}


class Engine:
    """llama.cpp with one model."""

    def __init__(self, file: str) -> None:
        found = find_spec("xllamacpp")
        if found is None or found.origin is None:
            raise SystemExit("xllamacpp is not installed there: pip install 'parity[gguf]'")
        if version("xllamacpp") != VERSION:
            raise SystemExit(f"xllamacpp {version('xllamacpp')} is not {VERSION}, whose structures are known")
        self.lib = c.CDLL(str(Path(found.origin).parent / "xllamacpp.abi3.so"))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        self.said: list[str] = []
        self._log = Log(lambda _level, text, _data: self.said.append(text.decode(errors="replace")))
        self.lib.llama_log_set(self._log, None)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(file.encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {file}: {self.last_words()}")
        self.vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def last_words(self) -> str:
        """The end of what llama.cpp has logged."""
        return " ".join(" ".join(self.said).split())[-300:]

    def value(self, key: str) -> str:
        """A value of the GGUF's metadata, as text; empty if it is not there."""
        text = c.create_string_buffer(256)
        return (
            text.value.decode() if self.lib.llama_model_meta_val_str(self.model, key.encode(), text, 256) >= 0 else ""
        )

    def run(self, ids: Sequence[int], kv: str, flash: str, see: See | None = None) -> Array:
        """One pass over token ids: logits (t, vocab). `see` is called for every node of the graph as it is computed."""
        params = self.lib.llama_context_default_params()
        check_layout(params)
        params.n_ctx = params.n_batch = params.n_ubatch = max(len(ids), 32)
        params.type_k = params.type_v = KV[kv]
        params.flash_attn_type = FLASH[flash]
        callback = Callback(see) if see else None  # kept alive by this name
        params.cb_eval = c.cast(callback, c.c_void_p) if callback else None
        context = self.lib.llama_init_from_model(self.model, params)
        if not context:
            raise SystemExit(f"llama.cpp does not run with kv={kv}, fa={flash}: {self.last_words()}")
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if code := self.lib.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp fails with code {code}: {self.last_words()}")
        logits = [self.lib.llama_get_logits_ith(context, i) for i in range(len(ids))]
        rows = np.stack([np.ctypeslib.as_array(row, (self.vocab,)) for row in logits])
        self.lib.llama_free(context)
        return rows


def check_layout(params: ContextParams) -> None:
    """Refuse a library whose defaults are not found where its version keeps them: its structures are other ones."""
    for name, value in DEFAULTS.items():
        if (found := getattr(params, name)) != value:
            raise SystemExit(f"the structures of this llama.cpp are not those of {VERSION}: {name} is {found}")


class Recording:
    """What the graph computes at the sites, (t, feature) or (t, head, head_dim)."""

    def __init__(self, lib: c.CDLL) -> None:
        self.lib = lib
        self.sites: dict[str, list[Array]] = defaultdict(list)
        self.errors: list[str] = []

    def see(self, node: Any, ask: bool, _data: Any) -> bool:
        """Asked whether a node is wanted, then shown it with its values. Nothing may be raised into C."""
        try:
            site = self.site_of(node)
            if not ask and site:
                self.sites[site].append(self.values_of(node, 3 if site.endswith(HEADS) else 2))
            return bool(site) or not ask
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")
            return False

    def site_of(self, node: Any) -> str:
        """The site that a node's name and operation stand for; empty for none."""
        if self.lib.ggml_get_name(node) != c.addressof(node.contents) + Tensor.name.offset:
            raise ValueError(f"the tensors of this llama.cpp are not laid out as those of {VERSION}")
        name, weight = node.contents.name.decode(), node.contents.src[0]
        if name.startswith("node_") and weight:
            name = c.cast(weight, c.POINTER(Tensor)).contents.name.decode()
        found = LAYER.fullmatch(name)
        plain = f"{found[1]}N{found[3]}" if found else name
        site = TAPS.get((plain, self.lib.ggml_op_desc(node).decode()), "")
        return site.replace("N", found[2]) if found else site

    def values_of(self, node: Any, axes: int) -> Array:
        """The numbers of a node, copied, for its memory is used again; its last `axes` axes.

        ggml names the fastest axis first: (d, t) there is (t, d) here.
        """
        tensor = node.contents
        if tensor.type != FLOAT32:
            raise ValueError(f"{tensor.name.decode()} is of type {tensor.type}, not float32")
        buffer = (c.c_char * self.lib.ggml_nbytes(node))()
        self.lib.ggml_backend_tensor_get(node, buffer, 0, len(buffer))
        values = np.ndarray(tuple(tensor.ne)[::-1], np.float32, buffer, strides=tuple(tensor.nb)[::-1])
        return np.array(values.reshape(values.shape[-axes:]))

    def one_each(self, layers: int) -> dict[str, Array]:
        """The one array of every site, (t, d) for most. Stops if a site has none or several."""
        if self.errors:
            raise SystemExit(self.errors[0])
        wanted = {site.replace("N", str(n)) for site in TAPS.values() for n in range(layers)}
        for site in sorted(wanted):
            if (count := len(self.sites.get(site, []))) != 1:
                raise SystemExit(f"{count} tensors of llama.cpp's graph fit {site}, expected one")
        return {site: arrays[0] for site, arrays in self.sites.items()}


def main() -> None:
    """Run the rows of the request, each with taps and without, and write what there was at the sites."""
    request = json.load(sys.stdin)
    engine = Engine(request["file"])
    if (architecture := engine.value("general.architecture")) != "qwen3":
        raise SystemExit(f"the graph of {architecture!r} is not known here, only that of qwen3")
    options = request["options"]
    rows: list[dict[str, Array]] = []
    untapped: list[Array] = []
    for ids in request["token_ids"]:
        untapped.append(engine.run(ids, options["kv"], options["fa"]))
        recording = Recording(engine.lib)
        engine.run(ids, options["kv"], options["fa"], recording.see)
        rows.append(recording.one_each(int(engine.value("qwen3.block_count"))))
    arrays: dict[str, Any] = {site: np.stack([row[site] for row in rows]) for site in rows[0]}
    dims = {site: "batch token head head_dim" if x.ndim == 4 else "batch token feature" for site, x in arrays.items()}
    dims |= {site: "batch token head*head_dim" for site in arrays if site.endswith("context")}
    arrays["parity.dims"] = np.array(json.dumps(dims))
    np.savez(request["out"], **arrays)
    np.save(request["untapped"], np.stack(untapped))
    said = {"runtime": f"llama.cpp of xllamacpp {VERSION}, kv {options['kv']}, flash attention {options['fa']}"}
    Path(request["said"]).write_text(json.dumps(said | {"dtype": "float32"}))


if __name__ == "__main__":
    main()
