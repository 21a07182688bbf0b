"""Run a graph in ONNX Runtime and record its activations: a program of its own, which needs numpy, onnx, onnxruntime.

    python run_onnx.py < request.json

The request says `file`, `sites`, `token_ids`, `options`, `out` for the activations (npz), `untapped` for the logits of
a run without taps (npy) and `said` for what there is to say of the run (JSON). Without `out` it is only asked what the
file is. Errors are the last line of standard error.

Two exporters are known. torch's leaves the path of modules that made a node in its metadata; the builder of
onnxruntime-genai names its nodes after them.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if missing := [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]:
    raise SystemExit(f"{missing[0]} is not installed there: pip install 'parity[onnx]'")

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

Array = np.ndarray[Any, Any]
Site = Mapping[str, Any]
"""`name`, `module`, `where` and `dims` of one of the reference, and its `sizes`, None for those that a run decides."""

SCOPES, TRACE = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace"
FLOATS = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
ADVICE = "Export with torch.onnx.export(dynamo=True); of a file made from such a one, give that too: ?names_from=FILE"
PROVIDER = "CPUExecutionProvider"
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}

# Site → the value of onnxruntime-genai's builder and its axes, {N} for the layer and {M} for the next one. The first
# that is there counts; with none the graph does not compute it by itself.
FEATURE, HEADS, CACHE = "batch token feature", "batch token head*head_dim", "batch head token head_dim"
GQA = "model.layers.*.self_attn.q_rope"  # computed within its GroupQueryAttention
GENAI: dict[str, tuple[str, tuple[str, ...]]] = {
    "model.embed_tokens": (FEATURE, ("/model/embed_tokens/Gather/output_0",)),
    "input_layernorm": (FEATURE, ("/model/layers.{N}/input_layernorm/output_0",)),
    "self_attn.q_norm": (HEADS, ("/model/layers.{N}/attn/q_norm/Reshape_2/output_0",)),
    "self_attn.k_norm": (HEADS, ("/model/layers.{N}/attn/k_norm/Reshape_2/output_0",)),
    "self_attn.k_rope": (CACHE, ("present.{N}.key",)),
    "self_attn.context": (HEADS, ("/model/layers.{N}/attn/GroupQueryAttention/output_0",)),
    "resid_mid": (FEATURE, ("/model/layers.{N}/post_attention_layernorm/output_3",)),
    "post_attention_layernorm": (FEATURE, ("/model/layers.{N}/post_attention_layernorm/output_0",)),
    "mlp.act_fn": (FEATURE, ("/model/layers.{N}/mlp/act_fn/Mul/output_0",)),
    "mlp.product": (FEATURE, ("/model/layers.{N}/mlp/Mul/output_0",)),
    "": (FEATURE, ("/model/layers.{M}/input_layernorm/output_3", "/model/layers.{M}/final_norm_layernorm/output_3")),
    "model.norm": (FEATURE, ("/model/layers.{N}/final_norm_layernorm/output_0",)),
    "lm_head": (FEATURE, ("logits",)),
} | {
    site: (axes, (f"/model/layers.{{N}}/{name}/Add/output_0", *split, f"/model/layers.{{N}}/{name}/MatMul/output_0"))
    for site, axes, name, split in (
        *(
            (f"self_attn.{x}_proj", HEADS, f"attn/{x}_proj", (f"/model/layers.{{N}}/attn/qkv_proj/Split/output_{i}",))
            for i, x in enumerate("qkv")
        ),
        ("self_attn.o_proj", FEATURE, "attn/o_proj", ()),
        *((f"mlp.{x}_proj", FEATURE, f"mlp/{x}_proj", ()) for x in ("gate", "up", "down")),
    )
}


class Graph:
    """The nodes of a graph, in the order in which they are computed, and which of its values are what."""

    def __init__(self, file: str) -> None:
        self.model = onnx.load(file, load_external_data=False)
        self.nodes = list(self.model.graph.node)
        self.maker = {value: node for node in self.nodes for value in node.output if value}
        self.users: dict[str, list[Any]] = {}
        for node in self.nodes:
            for value in node.input:
                self.users.setdefault(value, []).append(node)
        graph = self.model.graph
        self.known = {info.name: info.type.tensor_type for info in (*graph.value_info, *graph.output)}
        self.is_of_genai = self.model.producer_name.startswith("onnxruntime-genai")
        self.outputs = {info.name for info in graph.output}
        notes = [{note.key: note.value for note in node.metadata_props} for node in self.nodes]
        self.scopes = {
            id(node): tuple(ast.literal_eval(said.get(SCOPES, "()")))[:-1]
            for node, said in zip(self.nodes, notes, strict=True)
        }
        traces = (said.get(TRACE, "").rstrip().splitlines() or [""] for said in notes)
        self.lines = {id(node): trace[-1] for node, trace in zip(self.nodes, traces, strict=True)}

    def dtype(self) -> str:
        """The floating-point type of most of its weights."""
        counts: Counter[int] = Counter()
        for tensor in self.model.graph.initializer:
            counts[tensor.data_type] += int(np.prod(tensor.dims))
        for node in self.nodes:
            for constant in (a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"):
                counts[constant.data_type] += int(np.prod(constant.dims))
        return FLOATS[max(FLOATS, key=lambda kind: counts[kind])]

    def fits(self, value: str, sizes: Sequence[int | None]) -> bool:
        """Whether a value is of floats and, as far as the graph says, of such a shape."""
        info = self.known.get(value)
        if info is None or value not in self.maker:
            return value in self.maker
        if info.elem_type not in FLOATS:
            return bool(info.elem_type == TensorProto.UNDEFINED)
        shape = [axis.dim_value or None for axis in info.shape.dim]
        if len(shape) != len(sizes):
            return False
        return all(a is None or b is None or a == b for a, b in zip(shape, sizes, strict=True))

    def leaving(self, inside: set[int]) -> list[str]:
        """The values that are made in a set of nodes and used outside of it, in order."""
        return [
            value
            for node in self.nodes
            if id(node) in inside
            for value in node.output
            if value in self.outputs or any(id(user) not in inside for user in self.users.get(value, []))
        ]

    def entering(self, inside: set[int]) -> list[str]:
        """The values that are made outside of a set of nodes and used in it, in order."""
        used = {value: None for node in self.nodes if id(node) in inside for value in node.input}
        return [value for value in used if value in self.maker and id(self.maker[value]) not in inside]


def by_scopes(graph: Graph, sites: Sequence[Site]) -> dict[str, str]:
    """Site → value, by the modules in torch's metadata. Stops where two values fit a site."""
    prefix = prefix_of(graph, [site["module"] for site in sites])
    found: dict[str, str] = {}
    for site in sites:
        module = prefix + site["module"]
        inside = {id(node) for node in graph.nodes if module in graph.scopes[id(node)]}
        if site["where"] == "attention":
            values = in_attention(graph, module, site["name"].rpartition(".")[2])
        elif site["where"] in ("output", "input"):
            values = graph.leaving(inside) if site["where"] == "output" else graph.entering(inside)
        else:
            continue
        fitting = [value for value in values if graph.fits(value, site["sizes"])]
        if len(fitting) > 1:
            raise SystemExit(f"values {', '.join(fitting[:4])} of the graph all fit {site['name']}. {ADVICE}")
        if fitting:
            found[site["name"]] = fitting[0]
    return found


def prefix_of(graph: Graph, modules: Sequence[str]) -> str:
    """What the exported program puts before the model's names, such as "m." of a wrapper's attribute."""
    paths: set[str] = {path for scopes in graph.scopes.values() for path in scopes}
    prefixes: set[str] = {path.removesuffix(modules[0]) for path in paths if f".{path}".endswith(f".{modules[0]}")}
    if not paths or not prefixes:
        raise SystemExit(f"no node of the graph says that module {modules[0]!r} made it. {ADVICE}")
    return max(prefixes, key=lambda prefix: len(paths & {prefix + module for module in modules}))


def in_attention(graph: Graph, module: str, what: str) -> list[str]:
    """The queries or keys that a module gives to its attention function, or what that returns."""
    own = [
        node
        for node in graph.nodes
        if graph.scopes[id(node)][-1:] == (module,) and "attention_interface(" in graph.lines[id(node)]
    ]
    inside = {id(node) for node in own}
    if what == "context":
        return graph.leaving(inside)
    if what not in ("q_rope", "k_rope"):
        return []
    taken = []
    for node in own:
        if node.op_type in ("Softmax", "Attention"):
            product = node if node.op_type == "Attention" else back_to(graph, node.input[0], inside, "MatMul")
            value = product.input["qk".index(what[0])] if product is not None else ""
            while value in graph.maker and id(graph.maker[value]) in inside:
                value = graph.maker[value].input[0]
            taken.append(value)
    return taken


def back_to(graph: Graph, value: str, inside: set[int], op_type: str) -> Any:
    """The node of a kind from which a value comes by first inputs within a set of nodes; None if there is none."""
    node = graph.maker.get(value)
    while node is not None and id(node) in inside and node.op_type != op_type:
        node = graph.maker.get(node.input[0])
    return node if node is not None and node.op_type == op_type else None


def by_names(graph: Graph, sites: Sequence[Site]) -> dict[str, tuple[str, str]]:
    """Site → (value, axes), by the names that onnxruntime-genai's builder gives."""
    norm = next(node for node in graph.nodes if node.name.endswith("final_norm_layernorm/SkipLayerNorm"))
    if len(norm.output) == 1:  # of four; the last is the sum that it norms
        norm.output.extend(["", "", norm.output[0].replace("output_0", "output_3")])
    there = {value for node in graph.nodes for value in node.output}
    found: dict[str, tuple[str, str]] = {}
    last = re.search(r"layers\.(\d+)/", norm.name)
    for site in (site["name"] for site in sites):
        layer = re.fullmatch(r"model\.layers\.(\d+)\.?(.*)", site)
        axes, values = GENAI.get(layer[2] if layer else site, ("", ()))
        n = int(layer[1] if layer else last[1] if last else 0)
        value = next((v for v in (v.format(N=n, M=n + 1) for v in values) if v in there), None)
        if value:
            found[site] = value, axes
    return found


def session(graph: Graph, folder: Path) -> Any:
    """The graph, ready to run; `folder` is where the data outside of its file lie."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(graph.model.SerializeToString(), options, providers=[PROVIDER])


def feeds(running: Any, ids: Sequence[int], head_dim: int) -> dict[str, Array]:
    """The inputs of a run on token ids (t): one row, nothing cached."""
    count = len(ids)
    given = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, count)),
        "position_ids": np.arange(count)[None],
    }
    result = {}
    for wanted in running.get_inputs():
        value = given.get(wanted.name)
        if value is None and wanted.name.startswith("past_key_values"):
            heads = wanted.shape[1] if isinstance(wanted.shape[1], int) else 1
            value = np.zeros((1, heads, 0, head_dim))
        if value is None or wanted.type not in DTYPES:
            raise SystemExit(f"the graph wants an input {wanted.name!r} of {wanted.type}, which is not known here")
        result[wanted.name] = value.astype(DTYPES[wanted.type])
    return result


def taps_of(graph: Graph, names: Graph, sites: Sequence[Site]) -> dict[str, tuple[str, str]]:
    """Site → (value, axes) of what is in the graph, by the names of `names`. Stops if there is nothing."""
    if graph.is_of_genai:
        taps = by_names(graph, sites)
    else:
        axes = {site["name"]: " ".join(site["dims"]) for site in sites}
        taps = {site: (value, axes[site]) for site, value in by_scopes(names, sites).items()}
    there = {value for node in graph.nodes for value in node.output}
    taps = {site: tap for site, tap in taps.items() if tap[0] in there}
    if not taps:
        raise SystemExit("no value of the graph is a site of the reference: is this another model?")
    return taps


def show(graph: Graph, values: Sequence[str]) -> None:
    """Make values of a graph its outputs, beside those that it has."""
    for value in dict.fromkeys(values):
        if value not in graph.outputs:
            graph.model.graph.output.append(helper.make_empty_tensor_value_info(value))


def main() -> None:
    """Run the rows of the request, each with taps and without, and write what there was at the sites."""
    request = json.load(sys.stdin)
    graph, folder = Graph(request["file"]), Path(request["file"]).parent
    said: dict[str, Any] = {"runtime": f"onnxruntime {onnxruntime.__version__}, {PROVIDER}", "dtype": graph.dtype()}
    if "out" in request:
        other = request["options"].get("names_from")
        taps = taps_of(graph, Graph(other) if other else graph, request["sites"])
        plain = session(graph, folder)
        show(graph, [value for value, _ in taps.values()])
        tapped = session(graph, folder)
        head_dim = next((site["sizes"][-1] for site in request["sites"] if site["name"].endswith("k_rope")), 0)
        rows, untapped = [], []
        for ids in request["token_ids"]:
            given = feeds(plain, ids, head_dim)
            untapped.append(plain.run(["logits"], given)[0])
            rows.append(tapped.run([value for value, _ in taps.values()], given))
        joined = (np.concatenate(arrays) for arrays in zip(*rows, strict=True))
        arrays: dict[str, Any] = dict(zip(taps, joined, strict=True))
        arrays["parity.dims"] = np.array(json.dumps({site: axes for site, (_, axes) in taps.items()}))
        np.savez(request["out"], **arrays)
        np.save(request["untapped"], np.concatenate(untapped))
        said["not_observable"] = [GQA] if graph.is_of_genai else []
    Path(request["said"]).write_text(json.dumps(said))


if __name__ == "__main__":
    main()
