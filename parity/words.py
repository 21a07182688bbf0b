"""The reasons that results carry as data, in words: the one place where they become sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from parity.other_bits import OtherBits
from parity.reasons import VITAL, Gap, GapKind, Inconclusive, Invisible, NotTried, Stage, Trouble
from parity.results import ROUNDING, Comparison, Finding, Measurement
from parity.sites import is_cached

# -- why a site was not measured ------------------------------------------------------------------------------


def _misshapen(g: Gap) -> str:
    declared = f" declared as {' '.join(g.dims)!r}" if g.dims else ""
    wanted = " ".join(f"{axis}={size}" for axis, size in zip(g.axes, g.sizes, strict=False))
    return f"shape {g.shape}{declared} does not fit {wanted}"


def _ambiguous(g: Gap) -> str:
    return f"shape {g.shape} can be read as {' or '.join(map(repr, g.readings[:3]))}"


_GAPS: dict[GapKind, Callable[[Gap], str]] = {
    "not recorded": lambda _: "not recorded by the candidate",
    "not observable": lambda _: "never there in this runtime, which computes it within another operation",
    "misshapen": _misshapen,
    "ambiguous": _ambiguous,
    "reference overflows": lambda _: "overflows; so does the reference in this dtype",
    "inputs not finite": lambda _: "its inputs are not finite",
    "too rough": lambda g: f"the reference's own rounding is {g.share:.0%} of the value",
    "left out": lambda g: f"left out: {g.detail}",
    "unknown": lambda g: g.detail,
}


def gap(found: Gap) -> str:
    """Why a site was not measured: `not recorded by the candidate`."""
    return _GAPS[found.kind](found)


def reason(m: Measurement) -> str:
    """What a site's verdict rests on."""
    if m.gap is not None:
        return gap(m.gap)
    return f"{m.reason}, in the accepted regime {m.regime}" if m.regime else m.reason


# -- where a finding begins -----------------------------------------------------------------------------------


def begins(finding: Finding) -> str:
    """From which token on an operation is wrong, and in which call of several; empty if that is not known."""
    if finding.first_token is None:
        return ""
    call, where = finding.first_call, "in the row of token" if is_cached(finding.families[0]) else "at token"
    first = f"first {where} {finding.first_token}"
    if call is None:
        return first
    if call.step == 0:
        return f"{first}: right up to chunk {call.number}, wrong from chunk {call.number + 1}"
    if call.step == 1:
        return f"{first}: the prompt is right, wrong from the first decoded token"
    return f"{first}: right up to decoding step {call.step - 1}, wrong from step {call.step}"


# -- what a run could not have seen ---------------------------------------------------------------------------


_NOT_TRIED = {
    "no place": ": this model has no such operation",
    "large": ": embedding and head are large",
    "not recorded": ": not enough was recorded",
    "whole": ": the model cannot be run in pieces",
    "failed": ": trying it failed",
    "unknown": "",
}


def unseen(item: Invisible | NotTried, dtype: str) -> tuple[str, str]:
    """Why a fault would have gone unseen: what many faults have in common, and what is said of this one alone."""
    if isinstance(item, NotTried):
        return f"not tried{_NOT_TRIED[item.why]}", item.detail
    if item.kind == "no effect":
        return "no effect on this run", f"needs {item.needs}" if item.needs else ""
    return f"drowns in {dtype or 'rounding'}", f"{item.ratio:.1g}x the floor"


# -- what failed ----------------------------------------------------------------------------------------------

_TROUBLES: dict[Stage, str] = {
    "second look": "whether another order of summation explains the sites in doubt is not known",
    "regimes": "whether an accepted regime explains what is wrong is not known",
    "own faults": "whether your own faults change anything is not known",
    "causes": "the cause was not looked for",
    "error map": "where the error lies was not mapped",
    "wrong constants": "constants that are off by less than rounding were not looked for",
    "power": "what this run could have seen is not known",
    "other bits": "how the first operation with other bits rounds was not looked for",
    "next token": "the next tokens were not compared",
    "token names": "the tokens have no text",
    "pictures": "the pictures were not drawn",
    "page": "index.html was not written",
    "markdown": "report.md was not written",
    "step summary": "the step summary was not written",
}


def trouble(found: Trouble) -> str:
    """What a run lacks because a stage failed, and why: `the pictures were not drawn: ValueError: no font`."""
    at = f" at {found.about}" if found.about else ""
    return f"{_TROUBLES[found.stage]}{at}: {found.reason}"


# -- the whole run --------------------------------------------------------------------------------------------


def spoken(c: Comparison) -> Comparison:
    """The Comparison with its headline and answer."""
    return replace(c, headline=headline(c), answer=answer(c))


def headline(c: Comparison) -> str:
    """What the verdict of the run rests on."""
    if c.inconclusive is not None:
        return _inconclusive(c.inconclusive, c)
    unmeasured = c.coverage.known - c.coverage.measured
    if c.verdict == "match" and c.coverage.unexamined:
        return f"logits agree{in_regimes(c)}; {_not_examined(c.coverage.unexamined)}, as was allowed"
    if c.verdict == "diverged" and not c.findings:
        return _other_bits(c)
    if c.verdict == "diverged":
        rest = "the rest of what was measured is rounding" if unmeasured else "everything else is rounding"
        return f"{_operations(c)}; {rest}{in_regimes(c)}"
    tail = f"; {unmeasured} sites unmeasured, judged through the next measured one" if unmeasured else ""
    return f"every operation is within the reference's own rounding{in_regimes(c)}{tail}"


def _other_bits(c: Comparison) -> str:
    """Where a run that only rounds has other bits first, and how many: all that --exact finds fault with."""
    other = [m for m in c.sites if m.bit_equal is False]
    first = other[0]
    differing, numbers = sum((first.ulps or ())[1:]), sum(first.ulps or ())
    how = f": {differing} of {numbers} numbers, {reason(first)}" if numbers else f": {reason(first)}"
    count = f"{len(other)} of {c.coverage.measured} sites"
    return f"other bits at {count}, all of it rounding; first at {first.site}{how}{_otherwise(c.other_bits)}"


_FEW = 3


def _otherwise(bits: OtherBits | None) -> str:
    """How the first operation with other bits rounds, if that was proved; else how far its bits are off."""
    if bits is None:
        return ""
    if not bits.ways:
        far = "" if bits.floors is None else f", which are {bits.floors:.2g}x the reference's own rounding away"
        return f"; no order of sums or place of rounding that was tried gives these bits{far}"
    more = len(bits.ways) - _FEW
    named = [*bits.ways[:_FEW], *[f"{more} more way{'s' * (more > 1)}"] * (more > 0)]
    each = "each of these gives" if named[1:] else "that gives"
    return f"; {', or '.join(named)}: {each} all {bits.tried} numbers bit for bit"


def in_regimes(c: Comparison) -> str:
    """On whose weights and in which precision regimes the verdict holds: `, in the accepted regime kv-cache-fp16`."""
    own = ", on the candidate's own weights" if c.weights else ""
    ids = list(dict.fromkeys(finding.fault.id for finding in c.accepted if finding.fault))
    return f"{own}, in the accepted regime{'s' * (len(ids) > 1)} {', '.join(ids)}" if ids else own


def _operations(c: Comparison) -> str:
    wrong = sum(f.verdict != "imprecise" for f in c.findings)
    rough = len(c.findings) - wrong
    parts = [f"{wrong} wrong operation{'s' * (wrong != 1)}"] * bool(wrong)
    parts += [f"{rough} less precise than the dtype needs"] * bool(rough)
    return ", ".join(parts)


def _inconclusive(why: Inconclusive, c: Comparison) -> str:
    if why.kind == "check failed":
        return next(f"{check.name}: {check.detail}" for check in c.checks if not check.ok)
    if why.kind == "no site":
        return "the logits were not measured: no site"
    if why.kind == "logits unmeasured":
        return f"the logits were not measured: {reason(c.sites[-1])}"
    if why.kind == "logits off":
        return f"every operation rounds as it should, yet the logits are {why.ratio:.1f}x as far off as the reference's"
    if why.kind == "flips":
        return f"{why.count} top tokens differ by more than rounding explains"
    if why.kind == "too rough":
        first = next(m for m in c.sites if m.gap is not None and m.gap.kind == "too rough")
        more = f" and {why.count - 1} more" if why.count > 1 else ""
        return f"nothing can be said of {first.site}{more}: {reason(first)}"
    if why.kind == "left out":
        first = next(m for m in c.sites if m.gap is not None and m.gap.kind == "left out")
        wrong = "nothing is wrong in what was measured"
        return f"{wrong}, but {why.count} of {c.coverage.known} sites were {reason(first)}"
    if why.kind == "trouble":
        return trouble(next(t for t in c.troubles if t.stage in VITAL))
    return f"logits agree; {_not_examined(why.count)}: record more sites, or accept it with --allow-unexamined"


def _not_examined(count: int) -> str:
    return f"{count} operation{'s' * (count != 1)} not examined"


def answer(c: Comparison) -> str:
    """ "MSE 8.5e-3 at the logits: rounding or a bug?", in one line."""
    logits = c.logits
    if logits is None or logits.verdict == "unmeasured" or logits.mse is None or logits.total_ratio is None:
        return "the logits were not measured"
    is_wrong = c.verdict == "diverged" and bool(c.findings)
    noise = "" if c.noise_ratio is None else f"; {c.noise_ratio:.2g} standard deviations of stochastic rounding"
    if logits.max_abs == 0:
        hidden = ", although not every operation is right: see the findings" if is_wrong else ""
        return f"logits MSE 0: the same values as in the reference's own run{hidden}{noise}"
    size = f"logits MSE {logits.mse:.2g}, cosine {logits.cosine:.6f}"
    if logits.total_ratio <= ROUNDING:
        explained = "rounding explains all of it"
        if is_wrong:
            explained = "as large as rounding makes, although not all of it is rounding: see the findings"
        elif c.verdict == "diverged":
            explained = "rounding explains all of it, but the same bits were asked for"
    else:
        explained = "rounding does not explain it" if is_wrong else "more than rounding usually makes"
    whose = "the reference's own rounding error"
    if c.accepted:
        size = f"{size} against the reference outside of regimes"
        whose = "the rounding error of the reference in them"
    return f"{size}: {logits.total_ratio:.2g}x {whose}, {explained}{noise}"
