"""The candidate's own weights beside the checkpoint's: a tensor that is worse than its format allows is a finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from parity.compare.explain import Explained
from parity.quantization import WeightError
from parity.results import Check, Finding, Measurement
from parity.sites import family, layer_of

_PARAMETERS = (".weight", ".bias")


def accusing(explained: Explained, errors: Sequence[WeightError]) -> Explained:
    """What was explained, with a finding for each tensor that is further off than its format allows."""
    names = {m.site for m in explained.sites}
    bad = {site: e for e in errors if e.ratio is not None and e.ratio > 1 and (site := _site(e.tensor)) in names}
    if not bad:
        return explained
    sites = tuple(_accused(m, bad[m.site]) if m.site in bad else m for m in explained.sites)
    return replace(explained, sites=sites, findings=(*(_finding(s, e) for s, e in bad.items()), *explained.findings))


def weight_check(explained: Explained, errors: Sequence[WeightError]) -> list[Check]:
    """Whether all of the weights were judged; nothing where the reference computed with its own."""
    if not errors:
        return []
    names = {m.site for m in explained.sites}
    unjudged = [e for e in errors if e.ratio is None or (e.ratio > 1 and _site(e.tensor) not in names)]
    if unjudged:
        first, more = unjudged[0], f" and {len(unjudged) - 1} more" if len(unjudged) > 1 else ""
        said = f": {first.how}" if first.how else ", whose errors cannot be judged"
        return [Check("quantized weights", False, f"{first.tensor}{more} in {first.format}{said}")]
    return [Check("quantized weights", True, f"{len(errors)} tensors beside the checkpoint's")]


def _site(tensor: str) -> str:
    return next((tensor.removesuffix(end) for end in _PARAMETERS if tensor.endswith(end)), tensor)


def _said(error: WeightError) -> str:
    return f"its weight is no {error.format} of the checkpoint's: {error.how}"


def _accused(m: Measurement, error: WeightError) -> Measurement:
    return replace(m, verdict="wrong", reason=_said(error))


def _finding(site: str, error: WeightError) -> Finding:
    layer = layer_of(site)
    return Finding(
        families=(family(site),),
        sites=(site,),
        layers=() if layer is None else (layer,),
        verdict="wrong",
        ratio=error.ratio or 0.0,
        first_token=None,
        evidence=(_said(error), "the operation is right on the candidate's own weight"),
    )
