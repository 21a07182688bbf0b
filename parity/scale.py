"""One comparison by many processes: shards of a recorded candidate, their parts put together, and Ray that runs them.

A shard walks through the pieces before its own only as far as their results flow on, and writes what it measured as a
part. Whoever has all parts judges as a single process would; what a missing part had is said to be left out.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.candidates.base import dump_file
from parity.errors import ParityError, UsageError
from parity.observer import Observer
from parity.shards import Shard

if TYPE_CHECKING:
    from parity.candidates.base import Candidate
    from parity.compare.parts import Asked, Part
    from parity.reference.pieces import Piece
    from parity.results import Comparison
    from parity.run_spec import RunSpec

# So often Ray starts a shard anew whose worker died.
_RESTARTS = 3


def compute_part(asked: Asked, shard: Shard, path: Path, observer: Observer | None = None) -> int:
    """Measure a shard's sites and write them to `path`; how many there are.

    What is there already is not computed again. Raises ParityError.
    """
    from parity.compare.measure import measure
    from parity.compare.parts import Part, key_of, parted, read_part, write_part
    from parity.compare.pipeline import opened

    observer = replace(observer or Observer(), troubles=[])
    run, candidate = _sides(asked)
    if path.exists():
        done = read_part(path)
        if (done.key, done.shard) == (_key(run, candidate), shard):
            return len(done.sites)
        raise UsageError(f"{path}: holds another part. Choose another place with --out.")
    with opened(run, candidate, observer, checked=False) as sides:
        ours = shard.share(sides.pieces)
        others = {piece: "" for piece in sides.pieces if piece not in ours}
        measured = measure(replace(sides, left_out={**sides.left_out, **others}), observer)
        routes = {name: route for name, route in sides.reference.routes.items() if name in measured.sites}
        key = key_of(run, sides.dump)
    sites, troubles = parted(measured), tuple(observer.troubles)
    numbers = (shard.number, shard.count, key, asked, sites, measured.ending, troubles, dict(observer.seconds))
    write_part(path, Part(*numbers, routes=routes))
    return len(sites)


def merge(paths: Sequence[Path], observer: Observer | None = None) -> Comparison:
    """The Comparison of which some parts are there; what others would have had is left out. Raises ParityError."""
    from parity.compare.parts import joined, key_of, read_part
    from parity.compare.pipeline import finished, opened

    observer = replace(observer or Observer(), troubles=[])
    parts = _of_one([read_part(path) for path in paths])
    run, candidate = _sides(parts[0].asked)
    with opened(run, candidate, observer) as sides:
        if key_of(run, sides.dump) != parts[0].key:
            raise UsageError(
                f"{paths[0]}: its part was computed from another dump, model or version of what computes. "
                "Merge where these are the same, or compute the parts again."
            )
        for part in parts:
            observer.troubles.extend(part.troubles)
            for stage, seconds in part.seconds.items():
                observer.seconds[stage] = observer.seconds.get(stage, 0.0) + seconds
        measured = joined(parts, sides)
        left_out = {**sides.left_out, **_lacking(parts, sides.pieces)}
        return finished(replace(sides, left_out=left_out), measured, observer)


def _lacking(parts: Sequence[Part], pieces: Sequence[Piece]) -> dict[Piece, str]:
    """The pieces that no part has measured, and why."""
    count = parts[0].count
    missing = [Shard(number, count) for number in {*range(1, count + 1)} - {part.number for part in parts}]
    return {piece: f"part {shard} is missing" for shard in missing for piece in shard.share(pieces)}


def _of_one(parts: Sequence[Part]) -> list[Part]:
    """The parts, each once. Raises UsageError if they are of several comparisons."""
    first = parts[0]
    for part in parts:
        if (part.key, part.count) != (first.key, first.count):
            raise UsageError(
                f"parts {first.shard} and {part.shard} are of different comparisons. Give those of one run alone."
            )
    return list({part.number: part for part in parts}.values())


def _sides(asked: Asked) -> tuple[RunSpec, Candidate]:
    from parity.run_spec import run_spec

    candidate = dump_file(Path(asked.dump), None if asked.names is None else Path(asked.names))
    return run_spec(asked.options, candidate.said(), asked.command), candidate


def _key(run: RunSpec, candidate: Candidate) -> str:
    from parity.compare.parts import key_of

    with closing(candidate.record(run, (), Path())) as dump:
        return key_of(run, dump)


# -- Ray ---------------------------------------------------------------------------------------------------------


def diff_on(engine: str, workers: int, asked: Asked, observer: Observer | None = None) -> Comparison:
    """The comparison by so many workers of an engine, `ray` or `ray:ADDRESS`; Ray starts on this machine by itself.

    A shard whose worker dies is computed again, and left out if that happens too often. Raises ParityError.
    """
    observer = observer or Observer()
    ray, address = _ray(engine), engine.partition(":")[2]
    ray.init(address=address or None, num_cpus=None if address else workers, include_dashboard=False, **_QUIET)
    try:
        # Ray prints of workers that died, and standard output belongs to the report.
        with tempfile.TemporaryDirectory(prefix="parity-") as folder, redirect_stdout(sys.stderr):
            parts = _computed(ray, workers, asked, Path(folder), observer)
            if not parts:
                raise UsageError(f"--engine {engine}: no worker lived to the end. See the logs of Ray.")
            return merge(parts, observer)
    finally:
        ray.shutdown()


_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def check_engine(engine: str, device: str) -> None:
    """Raise UsageError for an engine that is not known or not installed, or a GPU that it cannot give."""
    if engine.partition(":")[0] != "ray":
        raise UsageError(f"--engine {engine!r}: not known. Give ray, or ray:ADDRESS.")
    if device.startswith("cuda:"):
        raise UsageError(f"--device {device}: Ray gives each worker a GPU of its own. Give --device cuda.")
    _ray(engine)


def _ray(engine: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"--engine {engine}: Ray is not installed. pip install 'parity[ray]'.") from error
    return ray


def _computed(ray: Any, workers: int, asked: Asked, folder: Path, observer: Observer) -> list[Path]:
    import torch

    gpus = 1 if asked.options.device == "cuda" else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_RESTARTS)(_part_of)
    shards = [Shard(number, workers) for number in range(1, workers + 1)]
    # Threads decide in which order sums are added up.
    waiting = {task.remote(asked, shard, torch.get_num_threads()): shard for shard in shards}
    paths: list[Path] = []
    while waiting:
        observer.show("measuring on Ray", len(shards) - len(waiting), len(shards))
        (done, *_), _ = ray.wait(list(waiting))
        shard = waiting.pop(done)
        try:
            data = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ParityError) else error from None
        except ray.exceptions.WorkerCrashedError:
            continue
        path = folder / f"{shard.number}.part"
        path.write_bytes(data)
        paths.append(path)
    return paths


def _part_of(asked: Asked, shard: Shard, threads: int) -> bytes:
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        path = Path(folder) / "part"
        compute_part(asked, shard, path)
        return path.read_bytes()
