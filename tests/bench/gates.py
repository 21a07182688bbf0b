"""The shoot-out of criteria: on right and on broken candidates, what would each usual gate have said, and what parity?

    python -m tests.bench.gates                     74 architectures, ports with every planted bug, real models
    python -m tests.bench.gates --few               six architectures and every sixth bug
    python -m tests.bench.gates --jobs 8 --into FILE   FILE keeps what is done; the real models in it are those that
                                                    `python -m tests.bench.real_models --into FILE` has run

Writes tests/bench/GATES.md and the picture gates.svg from all runs in FILE.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tests.bench.gate_page import README, page, picture
from tests.bench.gate_runs import examine, jobs_of
from tests.bench.outcomes import read

PAGE, PICTURE = (Path(__file__).with_name(name) for name in ("GATES.md", "gates.svg"))
FAMILIES = ("architectures", "ports")


def main() -> None:
    """Make the runs, write page and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", action="store_true", help="six architectures and every sixth bug")
    parser.add_argument("--families", nargs="*", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--into", type=Path, help="a file that keeps the runs")
    given = parser.parse_args()
    file = given.into or Path(tempfile.mkdtemp()) / "runs.jsonl"
    jobs = jobs_of(given.few, tuple(given.families))
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        futures = {pool.submit(examine, job, file): job for job in jobs}
        for number, future in enumerate(as_completed(futures), 1):
            done = future.result()
            print(f"{number} of {len(jobs)}: {futures[future].name}, {len(done)} runs", file=sys.stderr, flush=True)
    runs = [run for run in read(file) if run.family in (*FAMILIES, "real", README)]
    text = page(runs)
    print(text)
    PAGE.write_text(text, encoding="utf-8")
    picture(runs, PICTURE)


if __name__ == "__main__":
    main()
