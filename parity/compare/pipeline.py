"""The composition: a reference and a candidate in, a Comparison out.

record → dump → align → replay → measure → judge. A live candidate is recorded to a temporary dump first; from
there on live and offline are the same way. Memory holds one piece of weights and its activations.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parity import words
from parity.candidates import torch_module
from parity.compare.align import AmbiguousLayoutError, Pair, align
from parity.compare.judge import RoundingMode, covered, findings, judge_run, judge_site, luck, rounding_mode
from parity.compare.metrics import Metrics, measure, ulp_histogram
from parity.compare.next_token import NextTokenWatch
from parity.compare.run_spec import DTYPES, Question, versions
from parity.diagnose.error_map import with_residuals
from parity.diagnose.match import Bench, diagnose
from parity.diagnose.power import power
from parity.diagnose.weak_constants import coherent
from parity.dump import ArchiveWriter, Array, Dump, Entry, NameMap, open_dump, rename
from parity.errors import IncomparableError
from parity.observer import Clock
from parity.reasons import Gap
from parity.record.arrays import to_numpy, to_torch
from parity.record.discover import with_sizes
from parity.reference.floor import Local, local_error
from parity.reference.integrity import reference_checks, weight_check
from parity.reference.pieces import Piece, PiecewiseModel
from parity.reference.precision import unit_roundoff
from parity.reference.replay import Reference, Replayed
from parity.results import Check, Comparison, Environment, Finding, Measurement
from parity.sites import Site

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


def silent(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


def record_reference(
    question: Question,
    path: Path,
    progress: Progress = silent,
    model: PiecewiseModel | None = None,
    during: Callable[[Piece], AbstractContextManager[Any]] = nullcontext,
) -> list[Site]:
    """Record the reference's plain run to an HDF5 dump, each piece inside `during(piece)`. Returns the sites."""
    model = model or question.reference()
    sites = {site.name: site for site in _sites(model, question)}
    pieces = model.pieces
    with ArchiveWriter(path, question.info(f"transformers {versions()['transformers']}")) as writer:

        def tap(site: str, value: Tensor) -> Tensor:
            writer.add(site, to_numpy(value), sites[site].dims)
            return value

        hidden = None
        for done, piece in enumerate(pieces):
            progress(f"recording {_piece_name(piece)}", done, len(pieces))
            with model.loaded(piece), during(piece):
                hidden = model.run(piece, question.ids, hidden, tap)
    return list(sites.values())


def record_candidate(question: Question, spec: str, path: Path) -> list[str]:
    """Record a live candidate to an HDF5 dump. Returns the reference's sites that it does not have."""
    sites = question.reference().sites
    module = torch_module.build(spec, question.checkpoint.path, question.dtype, question.device)
    _record_live(module, question, sites, path, spec, None)
    have = {site.name for site in torch_module.own_sites(module, sites)}
    return [site.name for site in sites if site.name not in have]


def diff_live(question: Question, spec: str, progress: Progress = silent, names: NameMap | None = None) -> Comparison:
    """Build the candidate, record it, and compare it with the reference.

    `names` is a name map, for a candidate whose modules are not named as the checkpoint's are.
    """
    clock = Clock()
    reference = reference_for(question)
    # No name holds the candidate here, so that it can be let go of once it is recorded.
    return diff_module(question, _built(question, spec, progress, clock), spec, reference, progress, clock, names)


def _built(question: Question, spec: str, progress: Progress, clock: Clock) -> nn.Module:
    with clock("load candidate"):
        progress(f"loading {spec}", 0, 1)
        return torch_module.build(spec, question.checkpoint.path, question.dtype, question.device)


def diff_module(
    question: Question,
    module: nn.Module,
    name: str,
    reference: Reference,
    progress: Progress = silent,
    clock: Clock | None = None,
    names: NameMap | None = None,
) -> Comparison:
    """Compare a torch module that already stands in memory; `reference` may serve many questions."""
    clock = clock or Clock()
    model = reference.working
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        path = Path(folder) / "candidate.h5"
        with clock("record candidate"):
            progress(f"recording {name}", 0, 1)
            _record_live(module, question, model.sites, path, name, names)
        checks = [weight_check(module, question.checkpoint)]
        axes: dict[str, tuple[str, ...]] = {}
        with rename(open_dump(path), names or {}) as dump:
            try:
                pairs = _align(dump, model, question, axes)
            except AmbiguousLayoutError:
                # A live candidate can be asked which axis counts what; a file cannot.
                axes = torch_module.known_axes(module, question.ids.to(question.device), model.sites, names)
                pairs = _align(dump, model, question, axes)
            del module
            return _compare(question, reference, dump, pairs, name, checks, progress, clock)


def diff_dump(
    question: Question, dump: Dump, reference: Reference, progress: Progress = silent, name: str | None = None
) -> Comparison:
    """Compare a dump that a port in any language wrote; `name` is what the report calls it, by default its path."""
    theirs = dump.info.token_ids
    if theirs is not None and theirs != question.token_ids:
        raise IncomparableError(
            f"{dump.path}: holds a run on token ids {_preview(theirs)}, "
            f"the reference was asked {_preview(question.token_ids)}. "
            "Run the port on the same ids (parity record writes them to a .tokens.txt file)."
        )
    pairs = _align(dump, reference.working, question, {})
    return _compare(question, reference, dump, pairs, name or str(dump.path), [], progress, Clock())


def reference_for(question: Question) -> Reference:
    """The reference that answers a question, no weight of it loaded. Raises UsageError and ModelError."""
    return Reference(question.reference())


# -- the straight way ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """A site after measuring, before it is judged: the run's rounding mode is known only at the end."""

    pair: Pair
    metrics: Metrics
    local: Local
    ulps: tuple[int, ...] | None
    dtype: str


def _compare(
    question: Question,
    reference: Reference,
    dump: Dump,
    pairs: dict[str, Pair | Gap],
    name: str,
    checks: list[Check],
    progress: Progress,
    clock: Clock,
) -> Comparison:
    model = reference.working
    working, checks = model.dtype, [*reference_checks(model, question.ids), *checks]
    # In float32 one site on a narrower grid is an operation that computes there; all of them are a port that does.
    stored = DTYPES[working_dtype(dump)] if working is torch.float32 else None
    measured: dict[str, _Measured] = {}
    watch = NextTokenWatch(question.checkpoint)
    pieces = len(model.pieces)

    def recorded(site: Site) -> Tensor | None:
        pair = pairs[site.name]
        return to_torch(pair.read(dump.read(site.name))) if isinstance(pair, Pair) else None

    replayed = reference.replay(question.ids, recorded, question.noise)
    for done in range(pieces):
        progress(f"replaying {_piece_name(model.pieces[done])}", done, pieces)
        with clock("replay"):
            _piece, sites = next(replayed)
        with clock("measure"):
            for site in sites:
                pair = pairs[site.site.name]
                if isinstance(pair, Pair):
                    entry = dump.entries[pair.site.name]
                    measured[pair.site.name] = _measure(site, pair, entry, working, stored, model.head_dim)
                if site is sites[-1] and done == pieces - 1:
                    watch.see(site)
    progress("judging", pieces, pieces)
    bench = Bench(reference, question.ids, recorded)
    return _conclude(question, model, dump, pairs, measured, name, checks, watch, clock, bench, progress)


def _measure(
    site: Replayed, pair: Pair, entry: Entry, working: torch.dtype, stored: torch.dtype | None, head_dim: int | None
) -> _Measured:
    assert site.candidate is not None, "unreachable because pairs are read before the replay"
    metrics = measure(to_numpy(site.candidate), to_numpy(site.own))
    local = local_error(site, working, _storage(site.candidate, working, stored), head_dim)
    # A masked score may be any large negative number: how far apart two of them are says nothing.
    telling = not local.bit_equal and not site.site.name.endswith(".scores")
    ulps = ulp_histogram(to_numpy(site.candidate), to_numpy(site.floor)) if telling else None
    return _Measured(pair, metrics, local, ulps, entry.dtype)


def _storage(candidate: Tensor, working: torch.dtype, stored: torch.dtype | None) -> torch.dtype:
    """The dtype whose grid the candidate's numbers lie on: its own, or a narrower one dumped in a wider.

    `stored` is the dtype that all of the dump must be stored in for this to be no error; None if any will do.
    """
    if candidate.dtype in (torch.bfloat16, torch.float16):
        return candidate.dtype
    narrow = [d for d in (torch.bfloat16, torch.float16) if torch.equal(candidate.to(d).to(candidate.dtype), candidate)]
    return narrow[0] if narrow and working not in narrow and stored in (None, narrow[0]) else working


def _conclude(
    question: Question,
    model: PiecewiseModel,
    dump: Dump,
    pairs: dict[str, Pair | Gap],
    measured: dict[str, _Measured],
    name: str,
    checks: list[Check],
    watch: NextTokenWatch,
    clock: Clock,
    bench: Bench,
    progress: Progress,
) -> Comparison:
    faults = question.faults
    mode = rounding_mode([m.local for m in measured.values()], unit_roundoff(model.dtype))
    lucky = luck({site: m.local for site, m in measured.items()})
    sites = [
        _judged(measured[site], mode, lucky[site])
        if isinstance(pair, Pair)
        else Measurement(site, "unmeasured", "", gap=pair)
        for site, pair in pairs.items()
    ]
    found = findings(sites)
    if found and model.is_cut:
        with clock("diagnose"):
            found = with_residuals(diagnose(found, bench, faults), sites, bench)
    if model.is_cut and model.dtype is not torch.float32 and not mode.truncates:
        with clock("wrong constants"):
            leaning = coherent(sites, bench, faults)
        sites = _accused(sites, leaning)
        found = (*found, *leaning)
    could_see = None
    if model.is_cut and question.power:
        with clock("power"):
            watched = partial(progress, "what this run could have seen")
            could_see = power(bench, faults, watched, {f.fault.id for f in found if f.fault})
    next_token = watch.result()
    verdict, why = judge_run(sites, found, checks, next_token)
    comparison = Comparison(
        verdict=verdict,
        headline="",
        answer="",
        findings=found,
        sites=tuple(sites),
        next_token=next_token,
        coverage=covered(sites),
        checks=tuple(checks),
        environment=_environment(question, model, dump, name, measured, clock),
        power=could_see,
        noise_ratio=watch.noise_ratio(),
        inconclusive=why,
    )
    return words.spoken(comparison)


def _accused(sites: list[Measurement], leaning: Sequence[Finding]) -> list[Measurement]:
    """The sites with the verdict that a coherent finding gives them."""
    guilty = {site: finding for finding in leaning for site in finding.sites}
    return [replace(m, verdict="wrong", reason=guilty[m.site].evidence[0]) if m.site in guilty else m for m in sites]


def _judged(m: _Measured, mode: RoundingMode, lucky: float) -> Measurement:
    verdict, ratio, reason = judge_site(m.local, mode, lucky)
    x, local = m.metrics, m.local
    return Measurement(
        site=m.pair.site.name,
        verdict=verdict,
        reason="" if isinstance(reason, Gap) else reason,
        gap=reason if isinstance(reason, Gap) else None,
        ratio=ratio,
        row_max=local.row_max,
        local_rel=local.local_rel,
        inherited_rel=local.inherited_rel,
        floor_rel=local.floor_rel,
        total_ratio=local.total_ratio,
        bit_equal=local.bit_equal,
        mse=x.mse,
        cosine=x.cosine,
        max_abs=x.max_abs,
        rel_l2=x.rel_l2,
        ulp_max=x.ulp_max,
        ulps=m.ulps,
        structure=local.structure.shortened(),
        dtype=m.dtype,
        shape=m.pair.site.shape,
        steps=m.pair.steps,
    )


# -- small things --------------------------------------------------------------------------------------------


def _record_live(
    module: nn.Module, question: Question, sites: Sequence[Site], path: Path, name: str, names: NameMap | None
) -> None:
    ids = question.ids.to(question.device)
    torch_module.record(module, ids, sites, path, question.info(name), names)


def _sites(model: PiecewiseModel, question: Question) -> tuple[Site, ...]:
    return with_sizes(model.sites, *question.ids.shape)


def _align(
    dump: Dump, model: PiecewiseModel, question: Question, axes: dict[str, tuple[str, ...]]
) -> dict[str, Pair | Gap]:
    pairs: dict[str, Pair | Gap] = {}
    for site in _sites(model, question):
        entry = dump.entries.get(site.name)
        if entry is None:
            pairs[site.name] = Gap("not recorded")
        else:
            declared = replace(entry, dims=entry.dims or axes.get(site.name))
            pairs[site.name] = align(declared, site, model.head_dim, len(question.token_ids[0]))
    return pairs


def _piece_name(piece: int | str) -> str:
    return f"layer {piece}" if isinstance(piece, int) else piece


def _preview(rows: tuple[tuple[int, ...], ...]) -> str:
    first = ", ".join(map(str, rows[0][:6])) if rows else ""
    return f"[{first}{', …' if rows and len(rows[0]) > 6 else ''}] ({len(rows)} x {len(rows[0]) if rows else 0})"


def _environment(
    question: Question,
    model: PiecewiseModel,
    dump: Dump,
    name: str,
    measured: dict[str, _Measured],
    clock: Clock,
) -> Environment:
    kinds = [m.dtype for m in measured.values()]
    return Environment(
        model=question.checkpoint.name,
        fingerprint=dump.info.fingerprint or question.checkpoint.fingerprint(),
        candidate=name,
        prompt=question.prompt,
        tokens=len(question.token_ids[0]),
        batch=len(question.token_ids),
        working_dtype=question.dtype,
        candidate_dtype=max(set(kinds), key=kinds.count) if kinds else "unknown",
        truth_dtype="float64" if model.dtype is torch.float32 else "float32",
        device=question.device,
        attention=question.attention,
        versions=versions(),
        command=question.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds={what: round(seconds, 3) for what, seconds in clock.seconds.items()},
    )


def working_dtype(dump: Dump) -> str:
    """The dtype that a dump's numbers were made in, read off their bits: most sites decide.

    A float32 dump of bfloat16 tensors holds only numbers that bfloat16 has.
    """
    kinds = [_grid(dump.read(site)) for site in dump.entries]
    return max(DTYPES, key=kinds.count)


def _grid(array: Array) -> str:
    """The narrowest working dtype that has all of (the first 64K) numbers of an array."""
    if array.dtype.name != "float32":
        return str(array.dtype.name)
    sample = to_torch(array.reshape(-1)[:65536])
    narrow = [name for name in ("bfloat16", "float16") if torch.equal(sample.to(DTYPES[name]).float(), sample)]
    return narrow[0] if narrow else "float32"
