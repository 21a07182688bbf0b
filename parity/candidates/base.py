"""What is compared with the reference, whatever runtime it lives in, and what a SPEC means.

A new kind of candidate is one file with a subclass of `Candidate`, and a row in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from urllib.parse import parse_qsl

from parity.errors import CandidateError, UsageError
from parity.load_object import Kind, load
from parity.results import Check
from parity.sites import Dims, Site

if TYPE_CHECKING:
    from parity.dump import Dump, NameMap, RunInfo
    from parity.reference.checkpoint import Checkpoint, Weights
    from parity.run_spec import RunSpec

DUMPS = (".h5", ".hdf5", ".safetensors", ".npz")
_FACTORY = Kind("candidate", "function", "impl.qwen3:load or my_port.py:load", CandidateError)
# PREFIX:REST in a SPEC → where `open(rest, options, names) -> Candidate` is; options are what follows a "?".
KINDS: dict[str, str] = {
    "hf": "parity.candidates.transformers_model:TransformersModel",
    "gguf": "parity.candidates.foreign:Gguf",
    "onnx": "parity.candidates.foreign:Onnx",
    "mlx": "parity.candidates.foreign:Mlx",
}


@runtime_checkable
class Candidate(Protocol):
    """An implementation under test. A subclass has a name and records; the rest may stay as it is here."""

    name: str
    in_calls: bool = False
    """Whether it can be run in several calls, as `RunSpec.calls` says."""
    weights: str | None = None
    """A SPEC of `--weights` for the candidate's own, where these are quantized."""
    pads: bool = False
    """Whether it can be run on a batch with padding, with a mask and positions."""
    # Families that the candidate's runtime never has as a value of its own.
    not_observable: frozenset[str] = frozenset()

    def said(self) -> RunInfo:
        """What the candidate itself says of the run: token ids, model, dtype. Empty for one that is told."""
        from parity.dump import RunInfo

        return RunInfo()

    def record(self, run: RunSpec, sites: Sequence[Site], path: Path) -> Dump:
        """One run on `run.ids` (b, t), as an open dump with what there is of `sites`.

        `path` is where an HDF5 archive may be written. Raises CandidateError when the candidate fails.
        """
        ...

    def own_weights(self) -> Weights | None:
        """After `record`: the weights that it ran with, where it has quantized them itself."""
        return None

    def checks(self, checkpoint: Checkpoint) -> list[Check]:
        """What can be checked before anything is measured: that the weights are the checkpoint's, for one."""
        return []

    def axes(self, run: RunSpec, sites: Sequence[Site]) -> dict[str, Dims]:
        """Which axis of a recorded site counts what ("_" where it is not known), where shapes leave it open."""
        return {}

    def close(self) -> None:
        """Give back what the candidate holds: after this it only has its name."""
        return


def require_calls(candidate: Candidate, run: RunSpec) -> None:
    """Raise UsageError if a run has several calls, or padding, and the candidate cannot be run so."""
    if run.batch.text is not None and not candidate.pads:
        raise UsageError(f"{candidate.name} takes no mask. Run its prompts one by one, or prompts of one length.")
    if len(run.calls) > 1 and not candidate.in_calls:
        raise UsageError(f"--decode and --chunks: {candidate.name} runs all tokens at once. Leave them out.")


def open_candidate(spec: Any, names: NameMap | Path | str | None = None) -> Candidate:
    """The candidate that a SPEC means; nothing of it is loaded yet.

    spec   a candidate; a torch module; module:factory or file.py:factory; a dump; or `kind:rest?option=value` (KINDS)
    names  a name map, or its file (JSON): the candidate's names to the reference's

    Raises CandidateError, DumpError and UsageError.
    """
    table = _name_map(names)
    if isinstance(spec, Candidate):
        return spec
    if not isinstance(spec, (str, Path)):
        from parity.candidates.torch_module import TorchModule

        return TorchModule.of(spec, table)
    if is_dump(spec):
        return dump_file(Path(spec), table)
    kind, _, rest = str(spec).partition(":")
    if kind in KINDS:
        module, _, name = KINDS[kind].partition(":")
        rest, _, query = rest.partition("?")
        opened: Candidate = getattr(import_module(module), name)(rest, dict(parse_qsl(query)), table)
        return opened
    factory = load_factory(str(spec))  # what is wrong with it is said before torch is imported
    from parity.candidates.torch_module import TorchModule

    return TorchModule.from_factory(str(spec), factory, table)


def load_factory(spec: str) -> Callable[..., Any]:
    """The function that module:factory or file.py:factory names. Raises CandidateError."""
    factory: Callable[..., Any] = load(spec, _FACTORY)
    if not callable(factory):
        raise CandidateError(f"candidate {spec!r}: found {type(factory).__name__}, expected a function.")
    return factory


def dump_file(path: Path, names: NameMap | Path | str | None = None) -> Candidate:
    """A recorded run, whatever its file is called."""
    from parity.candidates.dump_file import DumpFile

    return DumpFile(path, _name_map(names))


def _name_map(names: NameMap | Path | str | None) -> NameMap:
    from parity.dump import load_names

    return load_names(names) if isinstance(names, (str, Path)) else names or {}


def is_dump(spec: str | Path) -> bool:
    """Whether a SPEC names a file or folder of recorded activations."""
    path = Path(spec)
    return path.is_dir() or path.suffix in DUMPS


def beside(folder: Path, spec: str) -> str:
    """The SPEC with its relative path taken from `folder`. Raises CandidateError where a file.py is missing."""
    if is_dump(folder / spec):
        return str(folder / spec)
    kind, _, rest = spec.partition(":")
    if kind in KINDS:
        file = rest.partition("?")[0]
        return f"{kind}:{folder / rest}" if file and (folder / file).exists() else spec  # it may be a hub id
    file = spec.rpartition(":")[0]
    if not file.endswith(".py"):
        return spec
    if not (folder / file).is_file():
        raise CandidateError(
            f"candidate {spec!r}: no file {folder / file}. Give its path from the folder of the test file."
        )
    return str(folder / spec)
