"""What measuring a site costs, in nanoseconds a number: `python -m tests.bench.measure_speed [--device cuda]`.

Each quantity is timed on one activation of a layer, best of a few; beside it stands what a copy of as many float32
numbers takes, in the same run. Processor time over all threads on a CPU, wall time on a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from parity.compare.metrics import counting_ulps, measuring
from parity.reference.floor import local_error
from parity.reference.replay import Replayed
from parity.reference.transfer import run_together
from parity.sites import Site

REPEATS = 7


def nanoseconds(action: Callable[[], object], numbers: int, device: str) -> float:
    """Best of a few runs, for each number."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    best = float("inf")
    for _ in range(REPEATS):
        start = clock()
        action()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best / numbers * 1e9


def made(working: torch.dtype, device: str, masked: bool) -> Replayed:
    """A site (1, 2048, 1024) of which the candidate rounds as the reference does, but not to the same numbers."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if working is torch.float32 else torch.float32
    truth, noise = (torch.randn(1, 2048, 1024, generator=generator, dtype=wide) for _ in range(2))
    if masked:
        truth.triu_(1).add_(torch.full_like(truth, -3e38).tril_(-1))
    moved = (truth * (1 + 2.0**-9 * noise)).to(working)
    site = Site("model.layers.0.mlp", "mlp", "output", ("batch", "token", "hidden"), tuple(truth.shape))
    passes = (truth.to(working), truth, moved, truth, truth.to(working), truth * (1 + 1e-4 * noise))
    return Replayed(site, *(x.to(device) for x in passes), summands=1024)


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu")
    device = options.parse_args().device
    print(f"{'ns a number':24}{'metrics':>9}{'local':>9}{'ULPs':>9}{'copy':>9}")
    for working in (torch.bfloat16, torch.float16, torch.float32):
        for masked in (False, True):
            site = made(working, device, masked)
            assert site.candidate is not None
            c, plain, source = site.candidate, site.plain, site.truth.float()
            target = torch.empty_like(source)
            actions = (
                lambda c=c, plain=plain: run_together([measuring(c, plain)]),
                lambda site=site, dtype=working: local_error(site, dtype, dtype, None),
                lambda c=c, plain=plain: run_together([counting_ulps(c, plain)]),
                lambda source=source, target=target: target.copy_(source),
            )
            row = (nanoseconds(action, c.numel(), device) for action in actions)
            name = str(working).removeprefix("torch.") + (", masked" if masked else "")
            print(f"{name:24}" + "".join(f"{value:9.2f}" for value in row), flush=True)


if __name__ == "__main__":
    main()
