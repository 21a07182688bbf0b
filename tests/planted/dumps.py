"""A planted model's run as a dump of what its modules return, without chosen sites: as a port without taps has it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from parity.dump import ArchiveWriter
from parity.record.arrays import to_numpy
from parity.record.tap import first_tensor
from parity.reference.replay import Reference
from parity.run_spec import RunSpec
from tests.planted.base import observe

TAPS = ("q_rope", "k_rope", "context", "resid_mid", "product")


def dump_without(model: nn.Module, run: RunSpec, reference: Reference, path: Path, left_out: Collection[str]) -> Path:
    """The model's outputs at the reference's sites, but for those whose last name is `left_out`."""
    seen = observe(model, run.ids)
    last = reference.working.sites[-1].name
    if last not in seen and (logits := first_tensor(model(run.ids))) is not None:
        seen[last] = logits.detach()  # no module returns what a model does to the output of its head
    with ArchiveWriter(path, run.info("port")) as writer:
        for site in reference.working.sites:
            if site.name in seen and site.name.rsplit(".", 1)[-1] not in left_out:
                writer.add(site.name, to_numpy(seen[site.name]), site.dims)
    return path
