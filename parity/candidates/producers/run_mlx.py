"""Run a checkpoint in MLX and record its activations: a program of its own, which needs numpy, mlx and mlx-lm.

    python run_mlx.py < request.json

The request says `file`, the checkpoint's directory, `sites`, `token_ids`, `out` for the activations (safetensors),
`untapped` for the logits of a run without taps (npy) and `said` for words about the run (JSON). Without `out` it is
only asked what the checkpoint is. Errors are the last line of standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if missing := [name for name in ("mlx", "mlx_lm") if find_spec(name) is None]:
    raise SystemExit(f"{missing[0]} is not installed there: pip install 'parity[mlx]'")

import mlx.core as mx
import numpy as np

Site = Mapping[str, Any]
"""`name`, `module`, `where` and `dims` of one of the reference."""

# Whose modules mean the same as those of that name in transformers.
KNOWN = ("qwen3", "llama")
FUSED = "model.layers.*.mlp.act_fn"  # MLX computes it within the product
ATTENTION = "scaled_dot_product_attention"
IN_ATTENTION = ("q_rope", "k_rope", "context")


class Taps:
    """What a model computes at the sites, while it is watched."""

    def __init__(self, model: Any, sites: Sequence[Site]) -> None:
        self.found: dict[str, Any] = {}
        self.running: list[str] = []
        self.places: dict[tuple[str, str], str] = {}
        for site in sites:
            end = site["name"].rpartition(".")[2]
            where = end if site["where"] == "attention" and end in IN_ATTENTION else site["where"]
            self.places[site["module"], where] = site["name"]
        self.modules = dict(model.named_modules())
        self.classes = {name: type(module) for name, module in self.modules.items()}

    def see(self, module: str, where: str, value: Any) -> None:
        """Keep a value if it is one of the sites'. Stops where there are two for one."""
        site = self.places.get((module, where))
        if site is None:
            return
        if site in self.found:
            raise SystemExit(f"two values of MLX fit {site}, expected one")
        self.found[site] = value

    def watch(self) -> Callable[[], None]:
        """See every module and the attention function from now on; what is returned ends it.

        A module's class is changed, for it alone: Python looks for `__call__` in the class. A module is a dict that
        takes attributes as children, so it is done past its own `__setattr__`.
        """
        for name, cls in self.classes.items():
            object.__setattr__(self.modules[name], "__class__", self._watched(name, cls))
        homes = {sys.modules[cls.__module__] for cls in self.classes.values()}
        before = [(home, getattr(home, ATTENTION)) for home in homes if hasattr(home, ATTENTION)]
        for home, attend in before:
            setattr(home, ATTENTION, self._attending(attend))

        def end() -> None:
            for name, cls in self.classes.items():
                object.__setattr__(self.modules[name], "__class__", cls)
            for home, attend in before:
                setattr(home, ATTENTION, attend)

        return end

    def _watched(self, name: str, cls: Any) -> Any:
        def call(module: Any, *given: Any, **more: Any) -> Any:
            self.running.append(name)
            if given:
                self.see(name, "input", given[0])
            result = cls.__call__(module, *given, **more)
            self.running.pop()
            self.see(name, "output", result)
            return result

        return type(cls.__name__, (cls,), {"__call__": call})

    def _attending(self, attend: Any) -> Any:
        def call(queries: Any, keys: Any, *given: Any, **more: Any) -> Any:
            self.see(self.running[-1], "q_rope", queries)
            self.see(self.running[-1], "k_rope", keys)
            result = attend(queries, keys, *given, **more)
            self.see(self.running[-1], "context", result.transpose(0, 2, 1, 3))
            return result

        return call


def run(model: Any, ids: Any, sites: Sequence[Site]) -> tuple[Any, dict[str, Any]]:
    """Logits (b, t, vocab) of token ids (b, t), and the values at the sites. Stops if an expected one is not there."""
    taps = Taps(model, sites)
    end = taps.watch()
    try:
        logits = model(ids)
    finally:
        end()
    # A head that is tied to the embedding is no module of its own.
    found = taps.found | {sites[-1]["name"]: logits}
    for site in sites:
        if site["name"] not in found and (site["where"] != "output" or site["module"] in taps.modules):
            raise SystemExit(f"no value of MLX fits {site['name']}, expected one")
    mx.eval(found)
    return logits, found


def require_known(folder: Path) -> None:
    """Stop if the modules of config.json's model type are not known here."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    if model_type not in KNOWN:
        raise SystemExit(f"the modules of {model_type!r} are not known here, only those of {', '.join(KNOWN)}")


def stored_dtype(folder: Path) -> str:
    """The dtype of the norms, in which MLX computes: it keeps what a file has, and quantizes no norm."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors: Any = mx.load(str(file))
        for name, value in tensors.items():
            if name.endswith("norm.weight"):
                return str(value.dtype).rpartition(".")[2]
    raise SystemExit(f"no norm.weight in the *.safetensors of {folder}")


def main() -> None:
    """Run the rows of the request, with taps and without, and write what there was at the sites."""
    request = json.load(sys.stdin)
    folder = Path(request["file"])
    require_known(folder)
    dtype = stored_dtype(folder)
    if "out" in request:
        from mlx_lm.utils import load_model  # it takes seconds, as it imports transformers

        model, _ = load_model(folder)
        ids, sites = mx.array(request["token_ids"]), request["sites"]
        plain = model(ids)
        mx.eval(plain)
        np.save(request["untapped"], np.array(plain.astype(mx.float32)))
        _, found = run(model, ids, sites)
        dims = {site["name"]: " ".join(site["dims"]) for site in sites if site["name"] in found}
        mx.save_safetensors(request["out"], found, {"parity.dims": json.dumps(dims)})
    runtime = f"MLX {version('mlx')}, mlx-lm {version('mlx-lm')}, {mx.default_device()}, {dtype}"
    Path(request["said"]).write_text(json.dumps({"runtime": runtime, "dtype": dtype, "not_observable": [FUSED]}))


if __name__ == "__main__":
    main()
