"""Does an operation give the same bits whatever runs beside it? Every operation is asked on the same inputs.

The candidate runs once; then it runs in another setting (a batch of the same row, chunks, tokens one by one, other
threads), and what flows on from each site is the first run's value. So an operation that varies is not held against
those that come after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from parity.candidates.base import Candidate
from parity.candidates.torch_module import TorchModule
from parity.candidates.transformers_model import TransformersModel
from parity.compare.measure import measure
from parity.compare.pipeline import opened
from parity.errors import UsageError
from parity.invariance_report import Invariance, Variance
from parity.observer import Observer
from parity.reference.pieces import PiecewiseModel
from parity.reference.replay import Reference
from parity.run_spec import RunSpec


@dataclass(frozen=True)
class Settings:
    """What is varied: sizes of the batch, sizes of chunks, tokens that are decoded one by one, numbers of threads."""

    batch: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    decode: int = 0
    threads: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Setting:
    name: str
    run: RunSpec
    threads: int


@dataclass
class _Asked:
    """The first run's values by site, and what another run differs in."""

    first: dict[str, Tensor] = field(default_factory=dict)
    unread: dict[str, None] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)

    def keep(self, site: str, _start: int, _tokens: int, value: Tensor) -> Tensor:
        self.first[site] = value.clone()
        return value

    def hold_to(self, site: str, start: int, tokens: int, value: Tensor) -> Tensor:
        expected = _part(self.first.get(site), value, start, tokens)
        if expected is None:
            self.unread[site] = None
            return value
        if value.dtype != expected.dtype or not torch.equal(value, expected):
            self.apart[site] = max(self.apart.get(site, 0.0), _distance(value, expected))
        return expected.clone()


def as_module(candidate: Candidate) -> TorchModule:
    """A candidate whose operations can be asked. Raises UsageError for one that only hands over what it recorded."""
    if not isinstance(candidate, TorchModule):
        raise UsageError(
            f"{candidate.name}: only a torch module can be run again on given inputs. Give module:factory."
        )
    return candidate


def invariance(
    run: RunSpec,
    candidate: TorchModule,
    settings: Settings,
    observer: Observer,
    *,
    against: TorchModule | None = None,
    exact: bool = False,
) -> Invariance:
    """Ask every operation of a candidate; `against` is another candidate that is asked on the first one's inputs.

    Raises UsageError for settings that make no sense to the run, and CandidateError.
    """
    if len(run.token_ids) != 1:
        raise UsageError(f"{len(run.token_ids)} rows of tokens: --batch repeats one row. Give one.")
    reference = Reference(run.model())
    with opened(run, candidate, observer, reference, checked=False) as sides:
        floors = {site: one.local.floor_rel for site, one in measure(sides, observer).sites.items()}
    varied = list(_settings(run, settings))
    model = reference.working
    asked, found = _ask(candidate, model, run, varied, floors)
    if against is not None:
        other = _Asked(first=asked.first)
        against.fed(run, model.sites, other.hold_to)
        varied.append(_Setting(f"against {against.name}", run, 0))
        found += _variances(other, varied[-1].name, floors)
        against.close()
    plain = TransformersModel("", {"attn": run.options.attention}, {})
    ours = [setting for setting in varied if not setting.name.startswith("against ")]
    _, of_reference = _ask(plain, model, run, ours, floors)
    plain.close()
    candidate.close()
    return Invariance(
        candidate=candidate.name,
        settings=tuple(setting.name for setting in varied),
        measured=len(asked.first.keys() - asked.unread.keys()),
        unread=tuple(asked.unread),
        variances=tuple(found),
        of_reference=tuple(of_reference),
        reference=f"transformers, {run.options.attention}",
        exact=exact,
        command=run.command,
    )


def _ask(
    candidate: TorchModule, model: PiecewiseModel, run: RunSpec, varied: Sequence[_Setting], floors: dict[str, float]
) -> tuple[_Asked, list[Variance]]:
    asked, found = _Asked(), list[Variance]()
    candidate.fed(run, model.sites, asked.keep)
    for setting in varied:
        asked.apart.clear()
        with _threads(setting.threads):
            candidate.fed(setting.run, model.sites, asked.hold_to)
        found += _variances(asked, setting.name, floors)
    return asked, found


def _variances(asked: _Asked, setting: str, floors: dict[str, float]) -> list[Variance]:
    order = {site: position for position, site in enumerate(asked.first)}
    found = []
    for site in sorted(asked.apart, key=lambda name: order[name]):
        distance, floor = asked.apart[site], floors.get(site)
        whole = not asked.first[site].is_floating_point() or floor is None
        found.append(Variance(site, setting, distance, None if whole else distance / floor if floor else float("inf")))
    return found


def _settings(run: RunSpec, settings: Settings) -> Iterator[_Setting]:
    tokens = len(run.token_ids[0])
    yield _Setting("again", run, 0)
    for size in settings.batch:
        if size > 1:
            yield _Setting(f"batch {size}", replace(run, token_ids=run.token_ids * size), 0)
    for size in settings.chunks:
        if not 0 < size < tokens:
            raise UsageError(f"--chunks {size}: the prompt has {tokens} tokens. Give less.")
        rest = tokens % size
        calls = (size,) * (tokens // size) + ((rest,) if rest else ())
        yield _Setting(f"chunks of {size}", replace(run, calls=calls), 0)
    if settings.decode:
        if not 0 < settings.decode < tokens:
            raise UsageError(f"--decode {settings.decode}: the prompt has {tokens} tokens. Give less.")
        calls = (tokens - settings.decode, *(1,) * settings.decode)
        yield _Setting(f"{settings.decode} tokens decoded", replace(run, calls=calls), 0)
    for count in settings.threads:
        yield _Setting(f"threads {count}", run, count)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads of torch during the block; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _part(first: Tensor | None, value: Tensor, start: int, tokens: int) -> Tensor | None:
    """What of the first run's value a call with `tokens` after `start` others should give; None if that is not seen."""
    if first is None or first.dim() != value.dim():
        return None
    found = first
    if value.dim() and value.shape[0] != first.shape[0] and value.shape[0] % first.shape[0] == 0:
        times = value.shape[0] // first.shape[0]
        if value.shape[1:] == first.shape[1:]:
            return first.repeat(times, *(1,) * (first.dim() - 1))
    for axis in range(value.dim()):
        size = value.shape[axis]
        if size == found.shape[axis]:
            continue
        narrowed = found.shape[axis] == first.shape[axis]
        if size == tokens and narrowed:
            found = found.narrow(axis, start, tokens)
        elif size == start + tokens:
            found = found.narrow(axis, 0, size)
        else:
            return None
    return found


def _distance(value: Tensor, expected: Tensor) -> float:
    if not value.is_floating_point():
        return float((value != expected).double().mean())
    size = float(expected.double().norm())
    return float((value.double() - expected.double()).norm()) / size if size else float("inf")
