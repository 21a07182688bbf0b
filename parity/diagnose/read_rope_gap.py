"""What RoPE does in a port that recorded neither queries nor keys behind it, read off what attention made of them.

Which token sees which at what distance decides on every row of a causal attention, and the first rows know short
distances alone. So angles are fitted to the first rows, where no pair can have gone round, and then to ever more of
them: an estimate from short distances tells how often a pair has gone round at longer ones. Positions are read as
stretches: from the first token that is not where the last rule has it, each of a few rules is followed, and the one
that explains most of the following tokens is kept. RoPE knows distances alone: what is read is so far as all tokens
may be shifted by the same number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parity.diagnose.least_squares import Fit, Target, fit
from parity.diagnose.read_rope import with_angles, with_positions
from parity.diagnose.spans import span_before
from parity.diagnose.trial import Case
from parity.faults import Fault, Scope
from parity.faults.fault import plain
from parity.faults.patches.rope import ROTATED, frequencies, has_tables, positions_of, turning_by
from parity.reference.one_operation import LoadedPiece
from parity.sites import ends_of

# Tokens that a fit starts with, by how much more it goes on, and how many are enough to read from.
_FIRST, _MORE, _ENOUGH = 3, 1.8, 256
# Shares of the reference's angles from which a fit starts, if the first leads nowhere.
_STARTS = (1.0, 0.25)
# Prior of an angle: so many radians at the last token in sight; and of the logarithm of the tables' factor.
_TURN, _SIZE = 2.0, 0.3
# What is fitted leaves no more than this, in mean squares of rounding; a position no more of its row.
_FITS, _ROW = 4.0, 9.0
# From so many tokens on, angles that leave more have not been found.
_HOPELESS = 6
# A factor is told from the reference's beyond so many standard errors.
_SIGMAS = 5.0
# Stretches of positions that are read before it is given up, and the periods of a rule that repeats itself.
_STRETCHES, _PERIODS = 12, (2, 3, 4, 8)
# Where no rule leads on, counting may start anew, at any position below this.
_ANYWHERE = 128


@dataclass(frozen=True)
class _Gap:
    """The site behind a gap in which queries and keys turn: the first tokens of its case, and their rows."""

    case: Case
    at: LoadedPiece
    angles: Tensor
    factor: float
    positions: Tensor
    target: Target

    def rows(self, angles: Tensor, factor: float, positions: Tensor | None = None) -> Tensor:
        """What the reference makes of the candidate's inputs with these angles (p), factor and positions (b, t)."""
        fault = Fault(
            id="read", title="", sites=(), fix="", patch=plain(lambda s: turning_by(s, angles, factor, positions))
        )
        precise, site = self.case.bench.reference.precise, self.case.site
        return _rows(self.case, self.case.bench.compute(self.at, [site], precise, fault)[site])

    def turned(self, numbers: Tensor) -> Tensor:
        """`rows` with angles and, last, the logarithm of the factor over the reference's: (p + 1)."""
        return self.rows(numbers[:-1], self.factor * float(numbers[-1].exp()))


def read_rope_across(case: Case) -> Fault | None:
    """The fault that angles or positions show at a site, where queries and keys were not recorded behind RoPE."""
    scope = case.bench.scope(case.bench.reference.precise, case.at.piece)
    if scope.layer is None or case.at.input_ids.text is not None or not _is_across(case) or not has_tables(scope):
        return None
    if "token" not in case.bench.sites[case.site].dims[:-1]:
        return None
    try:
        return _angles(case) or _positions(case)
    finally:
        for model in (case.bench.reference.precise, case.bench.reference.working):
            model.prepare(case.bench.batch)


def _is_across(case: Case) -> bool:
    """Whether the operations behind a site turn queries and keys that were not recorded."""
    names = [site.name for site in case.bench.reference.working.sites_of(case.at.piece)]
    behind = span_before(names, names.index(case.site), lambda name: name in case.at.recorded)
    return any(not ends_of(site).isdisjoint(ROTATED) for site in behind)


# -- angles ----------------------------------------------------------------------------------------------------


def _angles(case: Case) -> Fault | None:
    """Pairs that turn by other angles, at the right positions."""
    found = angles_across(case)
    if found is None:
        return None
    scope = case.bench.scope(case.bench.reference.precise, case.at.piece)
    angles, factor = frequencies(scope)
    size = float(found.value[-1].exp())
    told = abs(float(found.value[-1])) > _SIGMAS * float(found.stderr[-1])
    also = f"; scores are {size**2:.4g} times as large" if told else ""
    return with_angles(
        found.value[:-1].to(angles.device),
        found.stderr[:-1].to(angles.device),
        angles.double(),
        factor * (size if told else 1.0),
        also,
    )


def angles_across(case: Case) -> Fit | None:
    """The angle of each pair per position, and last the logarithm of the tables' factor over the reference's: (p + 1).

    None where no angles explain the site.
    """
    return next((found for share in _STARTS if (found := _grown(case, share)) is not None), None)


def _grown(case: Case, share: float) -> Fit | None:
    """What is fitted to ever more tokens, from a share of the reference's angles."""
    tokens = min(case.at.input_ids.shape[1], _ENOUGH)
    count, found = min(_FIRST, tokens), None
    while True:
        gap = _first(case, count)
        start = torch.cat([gap.angles * share, gap.angles.new_zeros(1)]) if found is None else found.value
        width = torch.full_like(start, _TURN / count)
        width[-1] = _SIZE
        found = fit(gap.turned, start, width, gap.target)
        if count >= min(_HOPELESS, tokens) and not found.misfit <= _FITS:
            return None
        if count == tokens:
            return found
        count = min(tokens, max(count + 1, int(count * _MORE)))


# -- positions -------------------------------------------------------------------------------------------------


def _positions(case: Case) -> Fault | None:
    """Tokens at other positions, turning by the right angles."""
    rows, tokens = case.at.input_ids.shape
    gap = _first(case, min(tokens, _ENOUGH))
    where = _stretches(gap) if rows == 1 else None
    if where is None or torch.equal(where, gap.positions):
        return None
    scope = case.bench.scope(case.bench.reference.precise, case.at.piece)
    return with_positions(*_to_the_end(where, scope), gap.factor)


def _stretches(gap: _Gap) -> Tensor | None:
    """The position of each token, (1, t); None if no rules explain them."""
    tokens = gap.positions.shape[1]
    known = gap.positions[:, :1]
    if not _followed(gap, gap.positions, 0)[0].shape[1]:
        return None  # the first token sees itself alone, wherever it is
    for _ in range(_STRETCHES):
        best = max((_followed(gap, rule, known.shape[1]) for rule in _rules(known, gap.positions)), key=_length)
        if not best[0].shape[1]:
            tried = (
                torch.cat([known, _counting(first, tokens - known.shape[1])], 1)
                for first in range(min(tokens, _ANYWHERE))
            )
            best = max((_followed(gap, rule.to(known), known.shape[1]) for rule in tried), key=_length)
        if not best[0].shape[1]:
            return None
        known = torch.cat([known, best[0]], 1)
        if known.shape[1] == tokens:
            return known
    return None


def _rules(known: Tensor, right: Tensor) -> Iterator[Tensor]:
    """Ways in which positions may go on behind those that are known, (1, t) with these."""
    left = right.shape[1] - known.shape[1]
    last = int(known[0, -1])
    goings = [_counting(last + 1, left), torch.full((1, left), last), _counting(last + 2, left), _counting(0, left)]
    goings += [last - 1 - _counting(0, left), right[:, known.shape[1] :].cpu()]
    steps = known.diff(dim=1).cpu()
    for period in _PERIODS:
        if steps.shape[1] >= period:
            again = steps[:, -period:].repeat(1, left // period + 1)[:, :left]
            goings.append(last + again.cumsum(1))
    for going in goings:
        yield torch.cat([known, going.to(known)], 1)


def _followed(gap: _Gap, rule: Tensor, known: int) -> tuple[Tensor, float]:
    """The positions of a rule (1, t) behind the known ones as far as each explains its token, and what they leave."""
    misfit = gap.target.misfit(gap.rows(gap.angles, gap.factor, rule))[known:]
    wrong = (~(misfit <= _ROW)).nonzero().flatten()
    length = int(wrong[0]) if len(wrong) else len(misfit)
    return rule[:, known : known + length], float(misfit[:length].mean()) if length else 0.0


def _length(followed: tuple[Tensor, float]) -> tuple[int, float]:
    return followed[0].shape[1], -followed[1]


def _counting(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count)[None]


def _to_the_end(where: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
    """The positions that were read, those of later tokens counted on from the last, and the reference's: (1, t)."""
    right = positions_of(scope)
    more = right.shape[1] - where.shape[1]
    return torch.cat([where, _counting(int(where[0, -1]) + 1, more).to(where)], 1).double(), right.double()


# -- the first tokens --------------------------------------------------------------------------------------------


def _first(case: Case, count: int) -> _Gap:
    """The first tokens of a case; the reference is prepared for them."""
    precise = case.bench.reference.precise
    recorded = {}
    for name, value in case.at.recorded.items():
        dims = case.bench.sites[name].dims
        if dims.count("token") == 1:
            recorded[name] = value.narrow(dims.index("token"), 0, count)
    hidden = None if case.at.hidden is None else case.at.hidden[:, :count]
    batch = case.at.input_ids.part(slice(None), slice(count))
    at = replace(case.at, input_ids=batch, hidden=hidden, recorded=recorded)
    precise.prepare(batch)
    scope = case.bench.scope(precise, case.at.piece)
    angles, factor = frequencies(scope)
    truth = _rows(case, case.truth)
    own = _rows(case, case.floor) - truth
    variance = torch.maximum(own.square().mean(1), own.square().mean())
    target = Target(_rows(case, case.candidate), own, variance).first(count)
    return _Gap(case, at, angles.double().to(own.device), factor, positions_of(scope), target)


def _rows(case: Case, value: Tensor) -> Tensor:
    """A value at the site with a row for each token, (t, d)."""
    return value.movedim(case.bench.sites[case.site].dims.index("token"), 0).flatten(1).to(case.truth.device).double()
