"""The report as one HTML file that needs no network: verdict, findings, map, details on click."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment as Templates
from jinja2 import FileSystemLoader, StrictUndefined
from markupsafe import Markup

from parity import words
from parity.report import summaries as gather
from parity.report import text
from parity.report.chart import chart
from parity.report.grid import grid, legend
from parity.report.layers import rows
from parity.results import ROUNDING, SEVERITY, Comparison, Finding, Measurement, Structure

_TEMPLATES = Path(__file__).with_name("templates")
# A profile of more bins than this is drawn narrower than one can see.
_BINS = 128
_METRICS = (
    "ratio",
    "row_max",
    "local_rel",
    "floor_rel",
    "inherited_rel",
    "rel_l2",
    "total_ratio",
    "mse",
    "max_abs",
    "cosine",
    "ulp_max",
)
# A cosine near 1 says something only in its last digits.
_DIGITS = {"cosine": 9}


def render(comparison: Comparison) -> str:
    """The page. The same Comparison gives the same bytes."""
    style, script = (_source(name) for name in ("report.css", "report.js"))
    page = _templates().get_template("report.html.j2")
    return page.render(
        c=comparison,
        env=comparison.environment,
        text=text,
        gather=gather,
        counts=_counts(comparison),
        layers=text.count_layers(comparison),
        findings=[_finding(f, comparison) for f in comparison.findings],
        grid=grid(comparison.sites),
        legend=legend(),
        chart=chart(gather.by_depth(comparison.sites)),
        rows=rows(comparison.sites),
        severity={verdict: rank for rank, verdict in enumerate(SEVERITY)},
        data=_script_safe(_details(comparison)),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _templates() -> Templates:
    templates = Templates(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters.update(
        visible=text.visible, quoted=text.quoted, number=text.number, times=text.times, plain=_keep_newlines
    )
    return templates


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
    worst = gather.worst_site(finding, comparison)
    return {
        "data": finding,
        "families": text.families(finding),
        "where": text.where(finding, text.count_layers(comparison)),
        "span": text.span(finding),
        "explanation": text.explanation(finding.fault) if finding.fault else [],
        "worst": None if worst is None else (index[worst.site], worst),
    }


# -- details of each site, for the script ---------------------------------------------------------------------


def _details(comparison: Comparison) -> dict[str, Any]:
    """Compact rows in the order of `Comparison.sites`; the script knows the order of the columns."""
    verdicts = sorted({m.verdict for m in comparison.sites})
    reasons = _Numbered()
    return {
        "tokens": comparison.environment.tokens,
        "rounding": ROUNDING,
        "metrics": _METRICS,
        "ulp_bins": text.ulp_bins(),
        "verdicts": verdicts,
        "sites": [_site(m, verdicts.index(m.verdict), reasons, comparison) for m in comparison.sites],
        "texts": reasons.texts,
    }


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


def _site(m: Measurement, verdict: int, number_of: _Numbered, comparison: Comparison) -> list[Any]:
    return [
        text.visible(m.site),
        verdict,
        number_of(words.reason(m)),
        [_rounded(getattr(m, name), _DIGITS.get(name, 5)) for name in _METRICS],
        None if m.bit_equal is None else int(m.bit_equal),
        text.visible(m.dtype or ""),
        list(m.shape),
        [number_of(step) for step in m.steps],
        None if m.ulps is None else list(m.ulps),
        _structure(m.structure) if m.structure else 0,
    ]


def _structure(s: Structure) -> list[Any]:
    """Profiles at most `_BINS` wide, each bin the largest of its neighbours; and how many tokens a bin holds."""
    width = math.ceil(len(s.by_token) / _BINS) or 1
    pooled = [_largest(s.by_token[i : i + width]) for i in range(0, len(s.by_token), width)]
    return [
        [_rounded(v, 3) for v in pooled],
        width * s.pooled,
        [_rounded(v, 3) for v in s.by_head],
        _rounded(s.gain, 4),
        _rounded(s.cosine, 3),
        s.channel,
        _rounded(s.channel_share, 3),
        s.first_token,
    ]


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
