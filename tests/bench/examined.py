"""One run through every gate: what the usual checks say of a candidate's arrays, and what parity says of the same."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor

from parity.candidates.base import open_candidate
from parity.compare.pipeline import compare, opened
from parity.compare.recording import record_reference
from parity.compare.sides import Sides
from parity.dump import Dump, open_dump
from parity.errors import ParityError
from parity.observer import Observer
from parity.record.arrays import to_numpy, to_torch
from parity.reference.replay import Reference
from parity.results import BAD, Comparison
from parity.run_spec import RunSpec
from tests.bench.gate_list import BITS, CLOSE, DIFF, relative_difference
from tests.bench.outcomes import Examined

# rtol and atol of torch.testing.assert_close, by dtype.
TOLERANCE = {torch.bfloat16: (1.6e-2, 1e-5), torch.float16: (1e-3, 1e-5), torch.float32: (1.3e-6, 1e-5)}
_ROWS = 16  # of the logits at once: a vocabulary of 262144 in float64 is 2 MB a row
Where = Callable[[str, str], bool]  # (a site, the first that the bug changes): whether it may be wrong with it


@dataclass(frozen=True)
class Planted:
    """A bug in a candidate: its id in the tables, the right ids of the catalogue, and where it may be seen.

    guilty  the sites where it is wrong, where that is known; None: the first whose bits it changes, and `may` says
            what else is the same operation
    base    the clean run of the same implementation, whose bits are those without the bug
    """

    id: str
    names: frozenset[str]
    may: Where = lambda site, first: site == first
    guilty: frozenset[str] | None = None
    base: str = "reference"


@dataclass
class Bench:
    """One model, dtype and prompt, with the reference's own run on disk, for as many candidates as there are.

    `bits` has of each clean run the hash of every site.
    """

    family: str
    run: RunSpec
    reference: Reference
    dump: Dump
    bits: dict[str, dict[str, str]] = field(default_factory=dict)

    def examine(self, what: str, candidate: Any, planted: Planted | None = None) -> Examined:
        """Run a candidate through parity and all gates; one that cannot be run says why."""
        start = time.perf_counter()
        key = (self.family, self.run.checkpoint.path.name, self.run.dtype, what)
        bug = planted.id if planted else ""
        try:
            opening = opened(self.run, open_candidate(candidate), Observer(), self.reference)
            with opening as sides:
                figures, bits = self._look(sides)
                compared = compare(sides, Observer())
        except ParityError as error:
            return Examined(*key, bug, "not run", str(error).splitlines()[0])
        if planted is None:
            self.bits[what] = bits
        logits = compared.logits
        figures |= {"error_ratio": float(logits.total_ratio or 0.0) if logits else 0.0}
        said = self._said(compared, planted, bits)
        return Examined(
            *key,
            bug,
            compared.verdict,
            compared.headline,
            figures={name: value for name, value in figures.items() if name != "first"},
            points=figures["first"],
            largest=max((site.ratio for site in compared.sites if site.ratio is not None), default=0.0),
            seconds=time.perf_counter() - start,
            **said,
        )

    def _said(self, compared: Comparison, planted: Planted | None, bits: Mapping[str, str]) -> dict[str, Any]:
        """What parity flagged and named, where the bug is, and whether that is right."""
        flagged = [site.site for site in compared.sites if site.verdict in BAD]
        names = [[f.fault.id, *f.fault.rivals] if f.fault else [] for f in compared.findings]
        said = {"flagged": tuple(flagged), "named": tuple(n[0] if n else "unknown" for n in names)}
        if planted is None:
            return said
        base = self.bits[planted.base]
        order = [site.name for site in self.reference.working.sites if site.name in bits]
        changed = next((site for site in order if bits[site] != base.get(site)), "")
        if planted.guilty is not None:
            guilty = tuple(sorted(planted.guilty & set(order)))
            return said | {"first": changed, "guilty": guilty, "naming": naming(names, planted.names)}
        guilty = tuple(site for site in order if changed and (site == changed or planted.may(site, changed)))
        return said | {"first": changed, "guilty": guilty, "naming": naming(names, planted.names)}

    def _look(self, sides: Sides) -> tuple[dict[str, Any], dict[str, str]]:
        """The figures of the gates, and the hash of every site."""
        first, bits = dict.fromkeys((BITS, DIFF, CLOSE), ""), {}
        last = self.reference.working.sites[-1].name
        figures: dict[str, Any] = {}
        for site in self.reference.working.sites:
            mine, theirs = sides.recorded(site), to_torch(self.dump.read(site.name))
            if mine is None:
                continue
            bits[site.name] = hashlib.sha256(to_numpy(mine).tobytes()).hexdigest()
            fails = {BITS: bits[site.name] != self.bits["reference"][site.name]} | _failing(mine, theirs)
            first |= {kind: site.name for kind, bad in fails.items() if bad and not first[kind]}
            if site.name == last:
                figures = logit_figures(mine, theirs, self.run.ids)
        return figures | {"first": first}, bits


@contextmanager
def bench(family: str, run: RunSpec, folder: Path) -> Iterator[Bench]:
    """A bench whose reference has been run and recorded in a folder."""
    reference = Reference(run.model())
    path = folder / f"reference-{run.dtype}.h5"
    record_reference(run, path, reference.working, Observer())
    with open_dump(path) as dump:
        bits = {site: hashlib.sha256(dump.read(site).tobytes()).hexdigest() for site in dump.entries}
        yield Bench(family, run, reference, dump, {"reference": bits})


def naming(said: Iterable[list[str]], right: frozenset[str]) -> str:
    """`named` (all findings rightly), `tied` (the right name is among those not told apart), `wrong`, `unnamed`."""
    groups = list(said)
    if any(group and not right & set(group) for group in groups):
        return "wrong"
    if not groups or not all(groups):
        return "unnamed"
    return "named" if all(group[0] in right for group in groups) else "tied"


def _failing(mine: Tensor, theirs: Tensor) -> dict[str, bool]:
    """Whether two tensors of any one shape fail SGLang's comparator and torch's tolerance."""
    if not theirs.is_floating_point():
        same = torch.equal(mine.long(), theirs.long())
        return {DIFF: not same, CLOSE: not same}
    rtol, atol = TOLERANCE.get(theirs.dtype, TOLERANCE[torch.float32])
    a, b = mine.double().flatten(), theirs.double().flatten()
    far = relative_difference(float(a @ a), float(b @ b), float(a @ b)) > 1e-3
    return {DIFF: far, CLOSE: not torch.allclose(a, b, rtol=rtol, atol=atol)}


def logit_figures(mine: Tensor, theirs: Tensor, ids: Tensor) -> dict[str, Any]:
    """The figures of logits (b, t, v) against the reference's, read some rows at a time; ids are (b, t)."""
    rtol, atol = TOLERANCE.get(theirs.dtype, TOLERANCE[torch.float32])
    after = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -1)], dim=1).flatten()
    pairs = zip(mine.flatten(0, 1).split(_ROWS), theirs.flatten(0, 1).split(_ROWS), after.split(_ROWS), strict=True)
    sums = torch.zeros(8, dtype=torch.float64)
    max_kl, ratios = 0.0, list[Tensor]()
    for c, r, following in ((c.double(), r.double(), f) for c, r, f in pairs):
        apart, close = (c - r).abs(), torch.isclose(c, r, rtol=rtol, atol=atol)
        parts = (c * c, r * r, c * r, c, r, apart * apart, close, torch.isclose(c, r, rtol=1e-2, atol=1e-2))
        sums += torch.stack([part.sum(dtype=torch.float64) for part in parts])
        log_c, log_r = c.log_softmax(-1), r.log_softmax(-1)
        kl = (log_r.exp() * (log_r - log_c)).sum(-1)
        max_kl = max(max_kl, float(kl.max()) if bool(kl.isfinite().all()) else float("inf"))
        known = following >= 0
        ratios.append((log_c - log_r)[known].gather(1, following[known, None]).abs().exp().flatten())
    cc, rr, cr, c_sum, r_sum, dd, close_count, near_count = sums.tolist()
    count, spread = mine.numel(), rr - r_sum * r_sum / mine.numel()
    together = cr - c_sum * r_sum / count
    every = torch.cat(ratios)
    return {
        "cosine": cr / (cc * rr) ** 0.5 if cc * rr else 0.0,
        "pcc": together / ((cc - c_sum * c_sum / count) * spread) ** 0.5,
        "mse": dd / count,
        "nmse": dd / spread,
        "max_kl": max_kl,
        "token_ratio": float(every.mean()) if len(every) else 1.0,
        "close": close_count == count,
        "close_share": near_count / count,
        "same_token": bool((mine[:, -1].argmax(-1) == theirs[:, -1].argmax(-1)).all()),
    }
