"""The runs of the shoot-out that are not those of real models: other architectures, and ports with planted bugs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from impl.qwen3 import Config
from parity.compare.inject import Injected
from parity.errors import ParityError
from parity.faults import parse
from parity.observer import Observer
from parity.options import RunOptions
from parity.reference.checkpoint import EMBEDDED, find
from parity.reference.tokenizer import tokenize
from parity.run_spec import RunSpec
from tests.architectures import ARCHITECTURES, make
from tests.bench.architectures import TOKENS
from tests.bench.examined import Bench, Planted, bench
from tests.bench.gate_page import README
from tests.bench.outcomes import Examined, append, read
from tests.bench.real_bugs import LIVE, THETA, injected, live
from tests.planted import BUGS, CAUSES, CLEAN, Variant, build
from tests.planted.kinds import KINDS, checkpoint

DTYPES = ("bfloat16", "float32")
# A port that is right and rounds otherwise than the reference in every product: the bugs are planted beside it.
BESIDE = next(variant for variant in CLEAN if variant.id == "split-4")
LEGAL = ("plain", "sdpa", "online-softmax", "ops-fp32", "norm-weight-fp32", "rope-fp32", "stream-fp32", "swiglu-fused")
LAYERS = 4
# The first example of the README: the embedded model, its prompt, and a fault in one layer.
PROMPT, SHOWN = "The capital of France is", "rope-interleaved@14"
FEW_ARCHITECTURES = ("llama", "gemma3", "qwen3_moe", "phi3", "gpt_neox", "mamba2")
EVERY = 6  # of the planted bugs, with --few


@dataclass(frozen=True)
class Job:
    """One model in one dtype: `name` is an architecture, or a kind of checkpoint with the bugs numbered `part`."""

    family: str
    name: str
    dtype: str
    part: tuple[int, ...] = ()


def jobs_of(few: bool, families: tuple[str, ...]) -> list[Job]:
    """All jobs; with `few`, of six architectures and every sixth bug."""
    names = [name for name in FEW_ARCHITECTURES if name in ARCHITECTURES] if few else list(ARCHITECTURES)
    jobs = [Job("architectures", name, dtype) for name in names for dtype in DTYPES]
    numbers = list(range(0, len(BUGS), EVERY if few else 1))
    for kind in KINDS:
        mine = [n for n in numbers if _kind(BUGS[n]) == kind]
        parts = [tuple(mine[start : start + 12]) for start in range(0, len(mine), 12)]
        jobs += [Job("ports", kind, dtype, part) for dtype in DTYPES for part in parts]
    return [Job(README, EMBEDDED, "bfloat16"), *(job for job in jobs if job.family in families)]


def _kind(bug: Variant) -> str:
    """The checkpoint that has what a bug changes, by its needs; an untied head is in all of them."""
    return bug.needs if bug.needs in KINDS else "plain"


def examine(job: Job, file: Path) -> list[Examined]:
    """The runs of one job, all of them, unless the file has them; they are added to it."""
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="parity-gates-") as name:
        folder = Path(name)
        is_port = job.family == "ports"
        run = _run(job, folder)
        path = run.checkpoint.path
        done = {each.key for each in read(file)}
        if (job.family, path.name, job.dtype, _last(job)) in done:
            return []
        try:
            with bench(job.family, run, folder) as on:
                runs = list(_ports(on, job) if is_port else _readme(on) if job.family == README else _architecture(on))
        except ParityError as error:  # one that transformers cannot run in this dtype
            runs = [Examined(job.family, path.name, job.dtype, "eager", "", "not run", str(error).splitlines()[0])]
    append(file, runs)
    return runs


def _run(job: Job, folder: Path) -> RunSpec:
    """The model of a job, made in a folder, and its tokens."""
    if job.family == README:
        found = find(EMBEDDED)
        tokens = tuple(tokenize(found, PROMPT).ids)
    elif job.family == "ports":
        found = find(str(checkpoint(job.name, folder, LAYERS)))
        tokens = tuple((97 * i * i + 31 * i) % 301 for i in range(80))
    else:
        found, tokens = find(str(make(job.name, folder / job.name))), TOKENS
    options = RunOptions(model=str(found.path), dtype=job.dtype, power=False)
    return RunSpec(found, (tokens,), job.dtype, options)


def _readme(on: Bench) -> Iterator[Examined]:
    """A right port beside the fault, which is planted by the catalogue as `--inject` does."""
    yield on.examine("eager", "hf:?attn=eager")
    yield on.examine("sdpa", "hf:?attn=sdpa")
    yield on.examine(SHOWN, Injected(parse(SHOWN), on.reference, Observer()), injected(SHOWN))


def _last(job: Job) -> str:
    """A run that a job that is done has left."""
    return f"{BUGS[job.part[-1]].id}" if job.family == "ports" else "eager"


def _architecture(on: Bench) -> Iterator[Examined]:
    """Clean with eager and sdpa, and the live bugs beside sdpa where there is a right one."""
    yield on.examine("eager", "hf:?attn=eager")
    attention = "eager"
    if not getattr(on.reference.working.config, "attn_logit_softcapping", None):
        sdpa = on.examine("sdpa", "hf:?attn=sdpa")
        attention = "eager" if sdpa.verdict == "not run" else "sdpa"
        yield sdpa
    for name in (*LIVE, THETA):
        made = live(on.run, name, attention)
        if made is not None:
            yield on.examine(name, *made)


def _ports(on: Bench, job: Job) -> Iterator[Examined]:
    """Legal ports, once, and ports with a bug in one layer."""
    path, count = on.run.checkpoint.path, LAYERS
    legal = [variant for variant in CLEAN if variant.id in LEGAL and job.dtype in variant.dtypes]
    beside = on.examine(BESIDE.id, build(BESIDE, path, job.dtype))
    if 0 in job.part:
        yield beside
        for variant in legal:
            yield on.examine(variant.id, build(variant, path, job.dtype))
    config = Config.read(path / "config.json")
    for bug in (BUGS[number] for number in job.part):
        if job.dtype not in bug.dtypes or not bug.fits(config):
            yield Examined(job.family, path.name, job.dtype, bug.id, bug.id, "not run", "not in this dtype or model")
            continue
        places = bug.places(count)
        layers = tuple(range(count)) if bug.everywhere_only else (places[len(places) // 2],)
        guilty = frozenset(bug.guilty_sites(layers))
        planted = Planted(bug.id, frozenset(CAUSES[bug.id].faults), guilty=guilty, base=BESIDE.id)
        yield on.examine(bug.id, _port(bug, path, job.dtype, layers), planted)


def _port(bug: Variant, path: Path, dtype: str, layers: tuple[int, ...]) -> nn.Module:
    """The port of BESIDE with a bug; what damages the file must come before it is loaded."""
    if bug.damage is not None:
        module = build(bug, path, dtype, layers)
        BESIDE.apply(module, range(LAYERS))
        return module
    module = build(BESIDE, path, dtype)
    bug.apply(module, layers)
    return module
