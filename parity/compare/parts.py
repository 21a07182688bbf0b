"""A part of a comparison on disk: what one process measured of the sites, in plain numbers.

A part is a safetensors file: its metadata hold the numbers as JSON, its tensors the choices of experts. All parts of
one comparison have the same key, and any process that has the dump can make of them what a single one would have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from parity.compare.align import Pair
from parity.compare.measure import Measured, MeasuredSite
from parity.compare.metrics import Metrics
from parity.compare.next_token import Ending
from parity.compare.sides import Sides
from parity.dump import Dump
from parity.dump.files import whole_or_nothing
from parity.errors import UsageError
from parity.json_values import MalformedError, from_json, to_json
from parity.options import RunOptions
from parity.reasons import Trouble
from parity.reference.floor import Local
from parity.reference.routing import Route
from parity.run_spec import RunSpec, versions
from parity.shards import Shard
from parity.untrusted import parse_json

_KEY = "parity.part"
_TENSORS = ("choice", "differs", "margin", "coarse", "experts")


@dataclass(frozen=True)
class Asked:
    """The comparison that a part is of: a dump, its name map, the options of the run and its command line."""

    dump: str
    names: str | None
    options: RunOptions
    command: str = ""


@dataclass(frozen=True)
class PartSite:
    """What was measured of a site (see MeasuredSite)."""

    metrics: Metrics
    local: Local
    ulps: tuple[int, ...] | None
    dtype: str


@dataclass(frozen=True)
class Part:
    """What one shard, `number` of `count`, measured; `key` tells parts of one comparison from others.

    `routes` are the choices of experts at its sites, which are no JSON.
    """

    number: int
    count: int
    key: str
    asked: Asked
    sites: dict[str, PartSite]
    ending: Ending
    troubles: tuple[Trouble, ...]
    seconds: dict[str, float]
    routes: dict[str, Route] = field(default_factory=dict, compare=False)

    @property
    def shard(self) -> Shard:
        """Which part it is."""
        return Shard(self.number, self.count)


def key_of(run: RunSpec, dump: Dump) -> str:
    """A hash of all that the numbers of a comparison depend on: the run, the dump, and what computes."""
    entries = [(entry.site, entry.dims, entry.shape, entry.dtype) for entry in dump.entries.values()]
    size = dump.path.stat().st_size
    made = [asdict(dump.info), entries, size, run.checkpoint.fingerprint(), run.token_ids, run.dtype]
    whole = json.dumps([*made, run.options.given(), run.prompt, versions()], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def parted(measured: Measured) -> dict[str, PartSite]:
    """The numbers of measured sites, without the sites themselves."""
    return {name: PartSite(m.metrics, m.local, m.ulps, m.dtype) for name, m in measured.sites.items()}


def joined(parts: Sequence[Part], sides: Sides) -> Measured:
    """What all parts measured together, as one process would have.

    The choices of experts go to the reference.
    """
    sites: dict[str, MeasuredSite] = {}
    ending = Ending()
    for part in sorted(parts, key=lambda part: part.number):
        for name, one in part.sites.items():
            pair = sides.pairs[name]
            assert isinstance(pair, Pair), "unreachable because parts of one key are of one dump"
            sites[name] = MeasuredSite(pair, one.metrics, one.local, one.ulps, one.dtype)
        sides.reference.routes.update(part.routes)
        ending = part.ending if part.ending != Ending() else ending
    return Measured(sites, ending)


def write_part(path: Path, part: Part) -> None:
    """Write a part; the file is whole or absent."""
    numbers = json.dumps(to_json(replace(part, routes={})), allow_nan=False)
    tensors: dict[str, Tensor] = {}
    for site, route in part.routes.items():
        tensors |= {f"{site}/{name}": getattr(route, name).contiguous().cpu() for name in _TENSORS}
    told = sorted(site for site, route in part.routes.items() if route.is_told)
    data = save(tensors, {_KEY: numbers, "told": json.dumps(told)})
    with whole_or_nothing(path) as temporary:
        temporary.write_bytes(data)


def read_part(path: Path) -> Part:
    """Read a part. Raises UsageError if the file is missing, damaged or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        part: Part = from_json(Part, parse_json(metadata[_KEY]) | {"routes": {}})
        told = parse_json(metadata["told"])
        sites = {name.rpartition("/")[0] for name in tensors}
        routes = {s: Route(**{name: tensors[f"{s}/{name}"] for name in _TENSORS}, is_told=s in told) for s in sites}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, MalformedError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UsageError(
            f"{path}: no part of a report ({reason}). Give files that `parity diff DUMP --shard I/N -o PART` wrote."
        ) from error
    return replace(part, routes=routes)
