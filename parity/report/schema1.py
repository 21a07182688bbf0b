"""Reports of schema 1, in which reasons were sentences and the families of a finding one text, as schema 2.

What is not of the types of schema 1 is left as it is: reading schema 2 says what is wrong with it.
"""

from __future__ import annotations

import re
from typing import Any

_FIXED_GAPS = {
    "not recorded by the candidate": "not recorded",
    "overflows; so does the reference in this dtype": "reference overflows",
    "its inputs are not finite": "inputs not finite",
}
_MISSHAPEN = re.compile(
    r"shape \((\d{1,18}(?:, \d{1,18})*)?,?\)(?: declared as '([^']*)')? does not fit ((?:[^ =]+=\d{1,18} ?)+)"
)
_TOO_ROUGH = re.compile(r"the reference's own rounding is (\d+)% of the value")
_NO_EFFECT = re.compile(r"no effect on this run(?:; needs (.*))?", re.DOTALL)
_DROWNS = re.compile(r"drowns in (\w+): (\d+(?:\.\d+)?(?:e[+-]\d+)?)x the floor")
# The reference's own error was exceeded by more than this at the logits of an inconclusive run.
_TOTAL = 4.0


def upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """A report of schema 1 (parsed JSON) as one of schema 2: the same findings, sites and numbers."""
    new = raw | {"schema": 2}
    if isinstance(raw.get("sites"), list):
        new["sites"] = [_site(site) for site in raw["sites"]]
    if isinstance(raw.get("findings"), list):
        new["findings"] = [_finding(finding) for finding in raw["findings"]]
    if isinstance(raw.get("power"), dict):
        new["power"] = _power(raw["power"])
    if raw.get("verdict") == "inconclusive":
        new["inconclusive"] = _inconclusive(new)
    return new


def _site(site: Any) -> Any:
    if not isinstance(site, dict) or site.get("verdict") != "unmeasured" or not isinstance(site.get("reason"), str):
        return site
    return site | {"reason": "", "gap": _gap(site["reason"])}


def _gap(reason: str) -> dict[str, Any]:
    if reason in _FIXED_GAPS:
        return {"kind": _FIXED_GAPS[reason]}
    if found := _MISSHAPEN.fullmatch(reason):
        shape, dims, wanted = found.groups()
        pairs = [item.rpartition("=") for item in wanted.split()]
        return {
            "kind": "misshapen",
            "shape": [int(size) for size in (shape or "").split(",") if size],
            "dims": (dims or "").split(),
            "axes": [axis for axis, _, _ in pairs],
            "sizes": [int(size) for _, _, size in pairs],
        }
    if found := _TOO_ROUGH.fullmatch(reason):
        return {"kind": "too rough", "share": int(found[1]) / 100}
    return {"kind": "unknown", "detail": reason}


def _finding(finding: Any) -> Any:
    if not isinstance(finding, dict) or not isinstance(finding.get("family"), str):
        return finding
    return {key: value for key, value in finding.items() if key != "family"} | {
        "families": finding["family"].split(", ")
    }


def _power(power: dict[str, Any]) -> dict[str, Any]:
    items = power.get("invisible")
    if not isinstance(items, list) or not all(isinstance(i, dict) and isinstance(i.get("reason"), str) for i in items):
        return power
    invisible, untried, dtype = [], [], ""
    for item in items:
        fault = {"fault": item.get("fault")}
        if found := _NO_EFFECT.fullmatch(item["reason"]):
            invisible.append(fault | {"kind": "no effect", "needs": found[1] or ""})
        elif found := _DROWNS.fullmatch(item["reason"]):
            dtype = found[1]
            invisible.append(fault | {"kind": "drowns", "ratio": float(found[2])})
        else:
            untried.append(fault | {"why": "large" if item["reason"].startswith("not tried: embedding") else "unknown"})
    return power | {"invisible": invisible, "not_tried": untried, "dtype": dtype}


def _inconclusive(report: dict[str, Any]) -> dict[str, Any] | None:
    """Why the run was inconclusive, worked out from its numbers in the order in which they were looked at."""
    checks, sites = report.get("checks"), report.get("sites")
    if isinstance(checks, list) and any(isinstance(c, dict) and c.get("ok") is False for c in checks):
        return {"kind": "check failed"}
    if not isinstance(sites, list) or not sites or not isinstance(sites[-1], dict):
        return {"kind": "no site"}
    logits, token = sites[-1], report.get("next_token")
    if logits.get("verdict") == "unmeasured":
        return {"kind": "logits unmeasured"}
    flips = token.get("unexplained_flips") if isinstance(token, dict) else None
    total = logits.get("total_ratio")
    if not flips or not (isinstance(total, int | float) and total <= _TOTAL):
        return {"kind": "logits off", "ratio": "nan" if total is None else total}
    return {"kind": "flips", "count": flips}
