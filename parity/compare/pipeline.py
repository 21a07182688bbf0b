"""The straight way: a candidate and a run in, a Comparison out.

record → align → measure → judge → accept → explain → conclude. A live candidate is recorded to a temporary dump first;
from there on live and offline are the same way. Memory holds one piece of weights and its activations.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from parity.candidates.base import Candidate, require_calls
from parity.compare.conclude import conclude
from parity.compare.dump_check import name_checks
from parity.compare.explain import explain, judge
from parity.compare.hidden_states import with_hidden_states
from parity.compare.measure import Measured, measure
from parity.compare.regimes import in_regimes
from parity.compare.sides import Sides, not_asked_for, pair_up
from parity.observer import Observer
from parity.quantization import WeightError
from parity.reference.integrity import reference_checks
from parity.reference.padding_check import padding_check
from parity.reference.replay import Reference
from parity.reference.self_check import self_check
from parity.reference.weight_cost import weight_costs
from parity.reference.weight_error import weight_errors
from parity.results import Check, Comparison
from parity.run_spec import RunSpec


def diff(
    run: RunSpec,
    candidate: Candidate,
    observer: Observer | None = None,
    reference: Reference | None = None,
    checks: tuple[Check, ...] = (),
) -> Comparison:
    """Record the candidate and compare it with the reference; `reference` may serve many runs, `checks` were made.

    Raises ParityError: CandidateError, DumpError, ModelError, UsageError or IncomparableError.
    """
    observer = replace(observer or Observer(), troubles=[])  # one observer may watch many runs
    with opened(run, candidate, observer, reference) as sides:
        return compare(replace(sides, checks=(*sides.checks, *checks)), observer)


@contextmanager
def opened(
    run: RunSpec,
    candidate: Candidate,
    observer: Observer,
    reference: Reference | None = None,
    *,
    checked: bool = True,
) -> Iterator[Sides]:
    """Both sides of a comparison, the candidate recorded and, unless that is left to others, the reference checked."""
    reference = reference or Reference(run.model())
    left_out = not_asked_for(reference.working, run)
    run = run.continued(reference.working)
    require_calls(candidate, run)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder, closing(candidate):
        observer.show(f"recording {candidate.name}", 0, 1)
        with observer.timed("record candidate"):
            dump = candidate.record(run, reference.working.sites, Path(folder) / "candidate.h5")
            dump = with_hidden_states(dump, reference.working)
        run, reference = _on_own_weights(run, candidate, reference)
        with closing(dump):
            pairs = pair_up(dump, candidate, reference.working, run)
            checks: tuple[Check, ...] = ()
            if checked:
                checks = (
                    *self_check(reference, run.batch),
                    *padding_check(reference, run.batch),
                    *reference_checks(reference.working, run.batch),
                    *candidate.checks(run.checkpoint),
                    *name_checks(dump, pairs),
                )
            # From here on the dump says all there is to say, and the candidate's weights would only take memory.
            candidate.close()
            yield Sides(run, reference, dump, pairs, candidate.name, checks, left_out=left_out)


def _on_own_weights(run: RunSpec, candidate: Candidate, reference: Reference) -> tuple[RunSpec, Reference]:
    """The run and the reference with the weights that a recorded candidate has quantized, where float32 keeps them."""
    own = candidate.own_weights() if run.options.weights is None and run.dtype == "float32" else None
    if own is None:
        return run, reference
    run = replace(run, checkpoint=replace(run.checkpoint, weights=own))
    return run, Reference(run.model())


def compare(sides: Sides, observer: Observer) -> Comparison:
    """Measure, judge, accept, explain, conclude."""
    return finished(sides, measure(sides, observer), observer)


def finished(sides: Sides, measured: Measured, observer: Observer) -> Comparison:
    """All that comes after measuring, wherever that was done."""
    run = in_regimes(sides, measured, judge(sides, measured, observer), observer)
    explained = explain(run.sides, run.judged, observer)
    with observer.timed("weights"):
        errors = _ranked(weight_errors(sides.run.checkpoint), sides.run)
    return conclude(run, explained, errors, observer)


def _ranked(errors: list[WeightError], run: RunSpec) -> list[WeightError]:
    """The errors of weights with what each costs, the most expensive first, where that is asked for."""
    if not run.options.rank_weights or not errors:
        return errors
    costs = weight_costs(run.checkpoint, run.batch, run.device, run.options.attention)
    known = [replace(error, cost=costs.get(error.tensor)) for error in errors]
    return sorted(known, key=lambda error: -1.0 if error.cost is None else error.cost, reverse=True)
