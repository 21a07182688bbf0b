"""Words and numbers as every report writes them."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from parity.predictions import NextToken
from parity.quantization import WeightError
from parity.results import ULP_BINS, Comparison, FaultMatch, Finding, Reading
from parity.sites import layer_of

# Characters that move the cursor, reorder a line or cannot be seen: a dump may carry any of them.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
_SHORT_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def visible(text: str) -> str:
    """The text on one line, with an escape for each character that could not be seen or would act on a terminal."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in _UNSEEN else c for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def quoted(text: str) -> str:
    """A token as it is shown: in quotes, so that its blanks are seen."""
    return "'" + visible(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def number(value: float | None, form: str = "") -> str:
    """A number for a table; a dash where there is none. Without a form: a ratio, in at most six characters."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if form:
        return format(value, form)
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.0f}" if abs(value) < 1e5 else f"{value:.0e}"


def times(ratio: float | None) -> str:
    """A ratio as a multiple: `541x`."""
    return "–" if ratio is None else f"{number(ratio)}x"


def percent(share: float) -> str:
    """A share in percent; close to 1 it keeps the digits that matter.

    >>> percent(0.5), percent(0.999998)
    ('50 %', '99.9998 %')
    """
    if not math.isfinite(share):
        return number(share)
    digits = 4 if 0.99 < share < 1 else 1
    shown = f"{100 * share:.{digits}f}".rstrip("0").rstrip(".")
    return f"{'> 99.9999' if share < 1 and shown == '100' else shown} %"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as text, sorted.

    >>> ranges([9, 0, 1, 2, 3, 7])
    '0-3, 7, 9'
    """
    parts: list[list[int]] = []
    for value in sorted(set(numbers)):
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def plural(count: int, one: str, many: str = "") -> str:
    """`1 site`, `2 sites`."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def ulp_bins() -> list[str]:
    """The bins of a histogram in ULP: 0, 1, 2, 3–4, …, > 1024."""
    ranges = ((low + 1, high) for low, high in pairwise(ULP_BINS))
    return ["0", *(f"{low}–{high}" if low < high else f"{high}" for low, high in ranges), f"> {ULP_BINS[-1]}"]


def constant(value: float, digits: int = 6) -> str:
    """A constant as one writes it in a config.

    >>> constant(1e6), constant(1e-5), constant(0.125)
    ('1e6', '1e-5', '0.125')
    """
    if not math.isfinite(value):
        return number(value)
    mantissa, _, exponent = f"{value:.{max(digits - 1, 0)}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    if mantissa in ("1", "-1", "5", "-5") and not -3 < int(exponent) < 4 and value:
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{digits}g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def reading(name: str, read: Reading) -> str:
    """`rope_theta = 1e4 ± 3; the config says 1e6`."""
    exact = not math.isfinite(read.stderr) or not math.isfinite(read.value) or read.stderr <= 0
    digits = 6
    if not exact and read.value:
        digits = min(max(math.floor(math.log10(abs(read.value))) - math.floor(math.log10(read.stderr)) + 1, 1), 9)
    error = "" if exact else f" ± {constant(read.stderr, 1)}"
    return f"{visible(name)} = {constant(read.value, digits)}{error}; the config says {constant(read.expected)}"


def explanation(fault: FaultMatch) -> list[str]:
    """What makes the fault believable: what it explains, what it reads off, what else would fit."""
    lines = [f"explains {percent(fault.explained)} of the error, remainder {times(fault.remainder_ratio)} the floor"]
    lines += [f"the candidate uses {reading(name, read)}" for name, read in fault.reads.items()]
    if fault.rivals:
        lines.append(f"cannot be told apart in this run from: {', '.join(map(visible, fault.rivals))}")
    return lines


def families(finding: Finding) -> str:
    """The families of a finding; those after the first without the path that they share with it."""
    first, *others = finding.families
    path = first.rpartition(".")[0] + "."
    return visible(", ".join([first, *(other.removeprefix(path) for other in others)]))


def where(finding: Finding, layers: int) -> str:
    """In which of the model's layers a finding is."""
    if not finding.layers:
        return "outside the layers"
    count = len(set(finding.layers))
    if count == 1:
        return f"layer {finding.layers[0]} only"
    if count == layers:
        return f"all {layers} layers"
    return f"layers {ranges(finding.layers)} ({count} of {layers})"


def count_layers(comparison: Comparison) -> int:
    """How many layers the model has, by the names of its sites."""
    return len({layer for m in comparison.sites if (layer := layer_of(m.site)) is not None})


def span(finding: Finding) -> str:
    """The unmeasured sites that the finding covers too, or nothing."""
    if not finding.span:
        return ""
    if len(finding.span) == 1:
        return f"or in the unmeasured site before it, {visible(finding.span[0])}"
    return f"or in one of the {len(finding.span)} unmeasured sites before it, from {visible(finding.span[0])}"


def flips(token: NextToken) -> str:
    """At how many positions the two sides would say different tokens, or nothing if at none."""
    if not token.flips:
        return ""
    explained = (
        f"{token.unexplained_flips} not explained by rounding"
        if token.unexplained_flips
        else "all explained by rounding"
    )
    return f"top token differs at {token.flips} of {plural(token.positions, 'position')}, {explained}"


def ending(comparison: Comparison, *, token: Callable[[str], str], prose: Callable[[str], str]) -> Iterator[str]:
    """What both sides would say next, and what the whole run amounts to.

    `token` and `prose` make a token and a sentence safe to show.
    """
    said = comparison.next_token
    if said is not None and said.reference and said.candidate:
        ours, theirs = said.reference[0], said.candidate[0]
        yield (
            f"next token: reference {token(ours.text)} ({number(ours.logit, '.2f')}), "
            f"candidate {token(theirs.text)} ({number(theirs.logit, '.2f')})"
        )
        if said.flips:
            yield flips(said)
    if comparison.answer:
        yield prose(comparison.answer)
    if comparison.weights:
        yield prose(weights(comparison.weights))
    layers = count_layers(comparison)
    yield from (prose(accepted(finding, layers)) for finding in comparison.accepted)


def weights(errors: Sequence[WeightError]) -> str:
    """How far the candidate's own weights are off the checkpoint's: `weights: 15 in Q8_0, 10 in F32; …`."""
    kinds = Counter(error.format for error in errors)
    worst = max(errors, key=lambda error: error.relative)
    against = max((error.ratio for error in errors if error.ratio is not None), default=None)
    formats = ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common())
    return (
        f"weights: {formats}; off the checkpoint by up to "
        f"{percent(worst.relative)} ({worst.tensor}), the worst block {times(against)} what its format allows"
    )


def accepted(finding: Finding, layers: int) -> str:
    """What was accepted, where, and how far off it is outside and inside the regime."""
    assert finding.fault is not None, "unreachable because a regime is what is accepted"
    inside = times(finding.fault.remainder_ratio)
    return (
        f"accepted: {finding.fault.id} at {', '.join(finding.families)}, {where(finding, layers)}: "
        f"{times(finding.ratio)} the floor without it, {inside} in it"
    )
