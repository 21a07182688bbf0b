"""Two engines and an invariance as reports of them may be given: one side wrong, and names that would be markup."""

from __future__ import annotations

from dataclasses import replace

from parity.engine_report import Contrast, Distance, Positions
from parity.invariance_report import Invariance, Variance
from tests.report_example import everything

EVIL = "<script>alert(1)</script>"


def contrast() -> Contrast:
    """A clean engine and one with findings, of whose log-probabilities a part is far apart."""
    wrong = everything()
    right = replace(wrong, verdict="match", findings=(), headline="every operation is within rounding")
    names = [m.site for m in wrong.sites]
    distances = [Distance(names[0], 0.0, 0.0, True), *(Distance(name, 3e-3, 1e-3, False) for name in names[1:])]
    spans = (Positions(1, 1, 0.01, 0.02), Positions(2, 3, 0.4, 0.01))
    return Contrast(right, wrong, tuple(distances), spans, ("llama.cpp", EVIL), "", 7, 9)


def invariance() -> Invariance:
    """One operation that varies against another engine."""
    variances = (Variance("model.layers.0.self_attn.context", f"against {EVIL}", 1e-3, 1.05),)
    return Invariance(
        EVIL, ("again", f"against {EVIL}"), 39, (), variances, (), "transformers, eager", True, "parity …"
    )
