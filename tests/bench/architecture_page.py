"""The page of tests.bench.architectures: what came of a run, the table, the totals, what is not as it should be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DTYPES = ("float32", "bfloat16", "float16")
CLEAN = ("eager", "sdpa", "plain")
BUGS = ("attention scale", "RoPE theta", "activation", "router's choice", "router's weights", "norm eps")
BUGS += ("residual branch",)
# sdpa is what `from_pretrained` chooses: right or wrong, it is another model.
UNCAPPED = "transformers' sdpa leaves out the softcap of the attention scores"


@dataclass(frozen=True)
class Result:
    """One run. `outcome` is "match", "alarm", "inconclusive", "refused" or "crash" of a clean one, or "unmade" where
    transformers itself cannot make or run the model; of a planted one
    "named", "tied" (one of several that the report says it cannot tell apart), "unnamed" (localized), "elsewhere",
    "unseen" (no site differs enough), "refused" or "crash"."""

    architecture: str
    dtype: str
    what: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Shape:
    """What the reference is like: sites of one layer on average, and whether it runs in pieces."""

    architecture: str
    layer_sites: int
    is_cut: bool


AS_IT_SHOULD_BE = ("match", "named", "tied", "n/a")
_SIGNS = {"match": "✓", "named": "named", "tied": "tied", "unnamed": "found", "n/a": "–"}


def page(shapes: Sequence[Shape], results: Sequence[Result], option: str = "") -> str:
    """The table, the totals, and every run that was not as it should be."""
    from parity.run_spec import versions

    made_with = ", ".join(f"{key} {value}" for key, value in versions().items() if key != "parity")
    dtypes = [dtype for dtype in DTYPES if any(r.dtype == dtype for r in results)]
    heads = [f"{dtype}: {', '.join(CLEAN)}" for dtype in dtypes] + [f"{bug} ({', '.join(dtypes)})" for bug in BUGS]
    by_run = {(r.architecture, r.dtype, r.what): r.outcome for r in results}
    lines = [
        "# Architectures",
        "",
        f"Made by `python -m tests.bench.architectures{option}`: {made_with}.",
    ]
    lines += ["✓ is a match of a clean candidate; a planted bug is `named`, `found` exactly but without a name, or as"]
    lines += ["it says; `tied` is a right name among those that the report says it cannot tell apart. – is not there:"]
    lines += [f"the model has no such attention (or {UNCAPPED}), or nothing that the bug could change."]
    lines += ["What is `unmade` transformers itself cannot make so small, or cannot run.", ""]
    lines += [*_totals(results), ""]
    lines += [f"| architecture | sites a layer | cut | {' | '.join(heads)} |", "|---" * (len(heads) + 3) + "|"]
    shape_of = {shape.architecture: shape for shape in shapes}
    for name in dict.fromkeys(r.architecture for r in results):
        shape = shape_of.get(name)
        cells = [" ".join(_sign(by_run.get((name, dtype, what))) for what in CLEAN) for dtype in dtypes]
        cells += [" ".join(_sign(by_run.get((name, dtype, bug))) for dtype in dtypes) for bug in BUGS]
        cut = "–" if shape is None else "cut" if shape.is_cut else "whole"
        lines.append(f"| {name} | {shape.layer_sites if shape else '–'} | {cut} | {' | '.join(cells)} |")
    lines += ["", "## What is not as it should be", ""]
    lines += [as_line(r) for r in results if r.outcome not in AS_IT_SHOULD_BE] or ["Nothing."]
    return "\n".join(lines) + "\n"


def as_line(result: Result) -> str:
    text = f"- {result.architecture} {result.dtype}, {result.what}: {result.outcome}. {result.detail}"
    return text.replace("\n", " ").rstrip()


def _sign(outcome: str | None) -> str:
    return _SIGNS.get(outcome or "n/a", f"**{outcome}**")


def _totals(results: Sequence[Result]) -> list[str]:
    clean = [r for r in results if r.what in CLEAN and r.outcome not in ("n/a", "unmade")]
    planted = [r for r in results if r.what in BUGS and r.outcome != "no effect"]
    localized = _count(planted, "named", "tied", "unnamed", "wrong name")
    named = _count(planted, "named", "tied")
    names = len({r.architecture for r in results if r.outcome != "unmade"})
    return [
        f"- {names} architectures, {len(clean)} clean runs: {_count(clean, 'match')} match, "
        f"{_count(clean, 'alarm')} alarms, {_count(clean, 'inconclusive')} inconclusive, "
        f"{_count(clean, 'refused')} refused, {_count(clean, 'crash')} crashes",
        f"- {len(planted)} planted bugs: {localized} localized exactly ({_share(localized, len(planted))}), "
        f"{named} named ({_share(named, len(planted))}; {_count(planted, 'tied')} of them tied), "
        f"{_count(planted, 'wrong name')} by a wrong name, {_count(planted, 'unseen')} not seen, "
        f"{_count(planted, 'crash')} crashes",
    ]


def _count(results: Iterable[Result], *outcomes: str) -> int:
    return sum(r.outcome in outcomes for r in results)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"
