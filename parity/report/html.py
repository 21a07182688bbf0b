"""The report as one HTML file that needs no network: verdict, findings, map, details on click."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment as Templates
from jinja2 import FileSystemLoader, StrictUndefined
from markupsafe import Markup

from parity import words
from parity.columns import COLUMNS, LAYER_COLUMNS, Column
from parity.predictions import NextToken
from parity.report import summaries, text
from parity.report.chart import NARROW, WIDTH, chart
from parity.report.glossary import WORDS
from parity.report.grid import grid, legend
from parity.report.layers import by_depth, rows
from parity.report.residual import call_starts, residual_map
from parity.results import ROUNDING, SEVERITY, Comparison, Finding, Measurement, Structure

_TEMPLATES = Path(__file__).with_name("templates")
# A profile of more bins than this is drawn narrower than one can see.
_BINS = 128
# The word of the glossary that explains a number of a site.
_WORD_OF = {"ratio": "ratio", "local_rel": "local-error", "inherited_rel": "inherited", "floor_rel": "floor"}


def render(comparison: Comparison) -> str:
    """The page. The same Comparison gives the same bytes."""
    script = _source("report.js")
    return page(
        "report.html.j2",
        c=comparison,
        env=comparison.environment,
        counts=_counts(comparison),
        layers=text.count_layers(comparison),
        findings=[_finding(f, comparison) for f in comparison.findings],
        grid=grid(comparison.sites),
        legend=legend(),
        charts=[drawn for width in (WIDTH, NARROW) if (drawn := chart(by_depth(comparison.sites), width))],
        rows=rows(comparison.sites),
        columns=LAYER_COLUMNS,
        next_token=_next_token(comparison.next_token),
        power=_power(comparison),
        coverage=summaries.coverage(comparison),
        unmeasured=summaries.unmeasured(comparison.sites),
        steps=summaries.steps(comparison.sites),
        severity={verdict: rank for rank, verdict in enumerate(SEVERITY)},
        data=_script_safe(_details(comparison)),
        script=Markup(script),
        script_hash=_hash(script),
        words_explained=True,
    )


def page(template: str, *more: str, words_explained: bool = False, **values: Any) -> str:
    """A template filled with values, in the style of all pages and of `more` files.

    `words_explained`: words are buttons, for which the page has the explanations.
    """
    style = "".join(map(_source, ("report.css", *more)))
    made = _templates(WORDS if words_explained else {}).get_template(template)
    return made.render(style=Markup(style), style_hash=_hash(style), **values)


def fragment(comparison: Comparison) -> str:
    """The verdict and the findings alone, to stand within another page: a notebook's, for one."""
    return (
        _templates({})
        .get_template("fragment.html.j2")
        .render(
            c=comparison,
            env=comparison.environment,
            findings=[_finding(f, comparison) | {"worst": None, "picture": None} for f in comparison.findings],
            layers=text.count_layers(comparison),
            power=_power(comparison),
        )
    )


def _templates(explained: Mapping[str, str]) -> Templates:
    made = Templates(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals["explained"] = explained
    made.filters.update(
        visible=text.visible,
        quoted=text.quoted,
        number=text.number,
        times=text.times,
        plural=text.plural,
        plain=_keep_newlines,
        trouble=words.trouble,
        accepted=text.accepted,
        weights=text.weights,
        ranges=text.ranges,
        with_words=partial(_with_words, made, explained),
        costs=summaries.costs,
    )
    return made


def _with_words(templates: Templates, explained: Mapping[str, str], sentence: str) -> Markup:
    """A sentence whose words that are explained are buttons."""
    word = templates.get_template("parts.html.j2").module.word  # type: ignore[attr-defined]
    parts = re.split(rf"\b({'|'.join(explained)})\b", sentence) if explained else [sentence]
    return Markup("").join(word(part) if i % 2 else part for i, part in enumerate(parts))


def _source(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    """What the page's content security policy calls this script or style: nothing else may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _keep_newlines(value: str) -> str:
    return "\n".join(map(text.visible, value.split("\n")))


def _counts(comparison: Comparison) -> list[tuple[str, int]]:
    found = [m.verdict for m in comparison.sites]
    return [(verdict, found.count(verdict)) for verdict in SEVERITY if verdict in found]


def _finding(finding: Finding, comparison: Comparison) -> dict[str, Any]:
    index = {m.site: i for i, m in enumerate(comparison.sites)}
    worst = summaries.worst_site(finding, comparison)
    env = comparison.environment
    return {
        "data": finding,
        "picture": finding.residual and residual_map(finding.residual, env.tokens, env.calls),
        "ulps": _ulps(worst),
        "families": text.families(finding),
        "where": text.where(finding, text.count_layers(comparison)),
        "begins": words.begins(finding),
        "span": text.span(finding),
        "explanation": text.explanation(finding.fault) if finding.fault else [],
        "worst": None if worst is None else (index[worst.site], worst),
    }


def _ulps(m: Measurement | None) -> list[tuple[str, float, str]]:
    """Bins of a site's histogram in ULP up to the last that is not empty: name, width in percent, share."""
    if m is None or not m.ulps:
        return []
    most, total = max(m.ulps), sum(m.ulps)
    last = max(i for i, count in enumerate(m.ulps) if count or not i)
    names = text.ulp_bins()
    return [(names[i], 100 * n / (most or 1), _share(n, total or 1)) for i, n in enumerate(m.ulps[: last + 1])]


def _share(count: int, total: int) -> str:
    return "< 0.1 %" if 0 < count / total < 0.0005 else text.percent(count / total)


def _next_token(token: NextToken | None) -> dict[str, Any] | None:
    if token is None:
        return None
    return {"ranks": summaries.ranks(token), "margins": summaries.margins(token), "data": token}


def _power(comparison: Comparison) -> dict[str, Any] | None:
    power = comparison.power
    if power is None:
        return None
    groups = summaries.invisible(comparison)
    unseen = sum(len(faults) for _, faults in groups)
    return {
        "visible": power.visible,
        "unseen": unseen,
        "impossible": len(power.unseen) - unseen,
        "groups": groups,
    }


# -- details of each site, for the script ---------------------------------------------------------------------


def _details(comparison: Comparison) -> dict[str, Any]:
    """What the script shows of each site, in the order of `Comparison.sites`; texts that recur are numbered."""
    shared = _Numbered()
    return {
        "tokens": comparison.environment.tokens,
        "rounding": ROUNDING,
        "calls": call_starts(comparison.environment.calls),
        "columns": [_column(column) for column in COLUMNS],
        "ulp_bins": text.ulp_bins(),
        "sites": [_site(m, shared) for m in comparison.sites],
        "texts": shared.texts,
    }


def _column(column: Column) -> dict[str, Any]:
    """`decimals` are those of a form like `.7f`; where there are none, the script chooses."""
    decimals = int(column.form[1:-1]) if column.form.endswith("f") else None
    return {"key": column.key, "meaning": column.meaning, "decimals": decimals, "word": _WORD_OF.get(column.key)}


class _Numbered:
    """Texts that many sites share, once each."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def __call__(self, value: str) -> int:
        if value not in self._numbers:
            self._numbers[value] = len(self.texts)
            self.texts.append(text.visible(value))
        return self._numbers[value]


def _site(m: Measurement, number_of: _Numbered) -> dict[str, Any]:
    values = {column.key: _rounded(getattr(m, column.key), column.digits) for column in COLUMNS}
    return {
        "name": text.visible(m.site),
        "verdict": m.verdict,
        "reason": number_of(words.reason(m)),
        "values": {key: value for key, value in values.items() if value is not None},
        "bit_equal": m.bit_equal,
        "dtype": text.visible(m.dtype or ""),
        "shape": list(m.shape),
        "steps": [number_of(step) for step in m.steps],
        "ulps": None if m.ulps is None else list(m.ulps),
        "structure": _structure(m.structure) if m.structure else None,
    }


def _structure(s: Structure) -> dict[str, Any]:
    """Profiles at most `_BINS` wide, each bin the largest of its neighbours; `width` tokens are in a bin."""
    width = math.ceil(len(s.by_token) / _BINS) or 1
    pooled = [_largest(s.by_token[i : i + width]) for i in range(0, len(s.by_token), width)]
    return {
        "by_token": [_rounded(v, 3) for v in pooled],
        "width": width * s.pooled,
        "by_head": [_rounded(v, 3) for v in s.by_head],
        "gain": _rounded(s.gain, 4),
        "cosine": _rounded(s.cosine, 3),
        "channel": s.channel,
        "share": _rounded(s.channel_share, 3),
        "first_token": s.first_token,
    }


def _largest(values: tuple[float, ...]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _rounded(value: float | None, digits: int) -> float | int | str | None:
    if value is None:
        return None
    if not math.isfinite(value):
        return text.number(value)
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) and abs(short) < 1e9 else short


def _script_safe(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in, nor begin another."""
    raw = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        raw = raw.replace(character, f"\\u{ord(character):04x}")
    return Markup(raw)
