"""Candidates that run in a runtime of their own: a program in another process records them and answers with a dump.

So an engine that crashes is one line of text, and one whose versions clash with ours may live in another environment:
`?python=PATH` names its interpreter. The program needs numpy and the engine, not parity.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity.candidates.base import Candidate
from parity.candidates.tapping import tapping_check
from parity.dump import Dump, NameMap, RunInfo, open_dump, rename
from parity.errors import CandidateError
from parity.reference.checkpoint import Checkpoint, Weights
from parity.reference.own_weights import open_weights
from parity.results import Check
from parity.run_spec import RunSpec
from parity.sites import Site
from parity.untrusted import parse_json

_PRODUCERS = Path(__file__).parent / "producers"
_UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # unit roundoffs
_OF_A_RUN = ("batch", "token", "key", "batch*token")  # axes whose size no model decides


class Foreign(Candidate):
    """A file that a producer can run. A subclass names the program and the options with their values, default first.

    An option without values takes any, and is not set unless given.
    """

    kind: str
    program: str
    dump = ".npz"
    options: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, rest: str, options: Mapping[str, str], names: NameMap) -> None:
        defaults = {key: values[0] for key, values in self.options.items() if values}
        chosen = defaults | {key: value for key, value in options.items() if key != "python"}
        query = "&".join(f"{key}={value}" for key, value in chosen.items())
        self.name = f"{self.kind}:{rest}{'?' if query else ''}{query}"
        self._file, self._options, self._names = Path(rest), chosen, names
        self._python = options.get("python", sys.executable)
        self._checks: list[Check] = []
        self._check_options()
        if not self._file.exists():
            raise CandidateError(f"candidate {self.kind}:{rest}: no such file. Give its path from {Path.cwd()}.")

    def _check_options(self) -> None:
        for key, value in self._options.items():
            if key not in self.options:
                known = ", ".join([*self.options, "python"])
                raise CandidateError(f"candidate {self.name!r}: no option {key!r}. It has {known}.")
            if self.options[key] and value not in self.options[key]:
                known = ", ".join(self.options[key])
                raise CandidateError(f"candidate {self.name!r}: {key}={value!r} is not one of {known}.")

    def said(self) -> RunInfo:
        """The dtype in which the engine computes, as the file says. Raises CandidateError."""
        with tempfile.TemporaryDirectory(prefix="parity-") as folder:
            return RunInfo(dtype=self._produce(Path(folder) / "said.json", {})["dtype"])

    def record(self, run: RunSpec, sites: Sequence[Site], path: Path) -> Dump:
        """Let the producer run the file twice, with taps and without. Raises CandidateError if it fails."""
        out, untapped = path.with_suffix(self.dump), path.with_suffix(".untapped.npy")
        asked = {"token_ids": run.token_ids, "sites": [_described(site) for site in sites]}
        said = self._produce(path.with_suffix(".said.json"), asked | {"out": str(out), "untapped": str(untapped)})
        dump = rename(open_dump(out), self._names)
        tapped, plain = dump.read(sites[-1].name).astype(np.float64), np.load(untapped).astype(np.float64)
        moved = float(np.linalg.norm(tapped - plain) / np.linalg.norm(plain))
        unit = _UNITS[said["dtype"]]
        self._checks = [Check("runtime", True, said["runtime"]), tapping_check(moved, unit, len(dump.entries))]
        self.not_observable = self.not_observable | frozenset(said.get("not_observable", ()))
        return dump

    def checks(self, checkpoint: Checkpoint) -> list[Check]:
        """Which runtime it was, and whether taps have changed the run."""
        return self._checks

    def _produce(self, answer: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What the producer says of the run that it is asked for; of the file alone if there is none."""
        request = {"file": str(self._file.resolve()), "options": self._options, "said": str(answer), **asked}
        command = [self._python, str(_PRODUCERS / self.program)]
        try:
            done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise CandidateError(f"candidate {self.name!r}: python={self._python}: {error.strerror}.") from error
        if done.returncode or not answer.exists():
            words = done.stderr.strip().splitlines() or ["it said nothing"]
            code = done.returncode
            how = f"crashed with {signal.Signals(-code).name}" if code < 0 else "failed"
            raise CandidateError(f"candidate {self.name!r}: its runtime {how}: {words[-1][:400]}")
        said: dict[str, Any] = json.loads(answer.read_text())
        return said


def _described(site: Site) -> dict[str, Any]:
    """A site for a producer: its name, where its value is, and its axes with the sizes that the model decides."""
    sizes = [None if dim in _OF_A_RUN else size for dim, size in zip(site.dims, site.shape, strict=True)]
    return {"name": site.name, "module": site.module, "where": site.where, "dims": site.dims, "sizes": sizes}


class Gguf(Foreign):
    """`gguf:FILE?kv=f32&fa=off`: a Qwen3 in llama.cpp, on the CPU.

    `kv` is the type of the cache, `fa` flash attention. llama.cpp's own defaults, kv=f16 and fa=on, round keys, values
    and products of attention to float16; those here are the ones that compute in float32.
    """

    kind = "gguf"
    program = "run_gguf.py"
    options = {"kv": ("f32", "f16", "q8_0"), "fa": ("off", "on")}  # noqa: RUF012 - nobody writes to it
    not_observable = frozenset({"model.layers.*.mlp.act_fn"})

    def __init__(self, rest: str, options: Mapping[str, str], names: NameMap) -> None:
        super().__init__(rest, options, names)
        self.weights = f"gguf:{self._file}" if _is_quantized(self._file) else None

    def said(self) -> RunInfo:
        """float32, in which llama.cpp keeps activations whatever its weights are."""
        return RunInfo(dtype="float32")


def _is_quantized(file: Path) -> bool:
    """Whether a GGUF keeps a tensor in blocks, as far as can be told: what llama.cpp refuses is said by it."""
    try:
        from gguf import GGUFReader

        kinds = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    except Exception:  # without the package, or of any kind, for the file may hold anything
        return False
    return bool(kinds - {"F32", "F16", "BF16"})


class Onnx(Foreign):
    """`onnx:FILE`: an ONNX graph in ONNX Runtime, on the CPU.

    `names_from` is the export that the file was made from, where a quantizer or optimizer took its names away.
    """

    kind = "onnx"
    program = "run_onnx.py"
    options = {"names_from": ()}  # noqa: RUF012 - nobody writes to it

    def own_weights(self) -> Weights | None:
        """Those of the file, if it multiplies with quantized ones and is of torch's exporter."""
        return open_weights(self.name) if _holds_integers(self._file) else None


def _holds_integers(file: Path) -> bool:
    """Whether a graph of torch's exporter multiplies with quantized weights, as far as can be told."""
    try:
        import onnx

        model = onnx.load(file, load_external_data=False)
        kinds = {node.op_type for node in model.graph.node}
    except Exception:  # without the package, or of any kind, for the file may hold anything
        return False
    is_known = not model.producer_name.startswith("onnxruntime-genai")
    return is_known and bool(kinds & {"MatMulInteger", "MatMulNBits", "DequantizeLinear"})


class Mlx(Foreign):
    """`mlx:DIR`: a checkpoint in MLX, as mlx-lm runs it."""

    kind = "mlx"
    program = "run_mlx.py"
    dump = ".safetensors"  # which has bfloat16

    def own_weights(self) -> Weights | None:
        """Those of the folder, if its config.json says that they are quantized."""
        config = parse_json((self._file / "config.json").read_bytes(), unique=False)
        return open_weights(f"mlx:{self._file}") if config.get("quantization") else None
