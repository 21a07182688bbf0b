"""Every decoder: clean runs must match in three dtypes, and bugs planted in a live model must be found and named.

    python -m tests.bench.architectures [--jobs 16] [--only llama,mamba2] [--dtypes float32,bfloat16]

Makes the checkpoints of tests.architectures. Clean candidates are `hf:` with eager and with sdpa and the plain model
as `from_pretrained` gives it; planted bugs are those of tests.bench.architecture_bugs. The right place of a bug is
the first site, in order of execution, where the broken model differs at all. Writes tests/bench/ARCHITECTURES.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from parity.candidates.base import open_candidate
from parity.compare.pipeline import diff
from parity.errors import ParityError
from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.results import BAD, ROUNDING, Comparison, Measurement
from parity.run_spec import RunSpec
from tests.architectures import ARCHITECTURES, make
from tests.bench.architecture_bugs import PLANTS, ROTATED, Bug, other_theta

PAGE = Path(__file__).with_name("ARCHITECTURES.md")
DTYPES = ("float32", "bfloat16", "float16")
CLEAN = ("eager", "sdpa", "plain")
BUGS = ("attention scale", "RoPE theta", "activation", "router's choice", "router's weights", "norm eps")
BUGS += ("residual branch",)
# sdpa is what `from_pretrained` chooses: right or wrong, it is another model.
UNCAPPED = "transformers' sdpa leaves out the softcap of the attention scores"
TOKENS = tuple((i * 37 + 11) % 200 + 3 for i in range(40))  # more than any window; the padding token is not among them


@dataclass(frozen=True)
class Result:
    """One run. `outcome` is "match", "alarm", "inconclusive", "refused" or "crash" of a clean one; of a planted one
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


def examine(name: str, dtype: str) -> list[Result | Shape]:
    """All runs of one architecture in one dtype."""
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="parity-arch-") as folder:
        path = make(name, Path(folder) / name)
        options = RunOptions(model=str(path), dtype=dtype, power=False)
        run = RunSpec(find(str(path)), (TOKENS,), dtype, options)
        try:
            reference = Reference(run.model())
        except ParityError as error:
            return [Result(name, dtype, what, "refused", str(error)) for what in CLEAN]
        except Exception as error:
            return [Result(name, dtype, what, "crash", _where(error)) for what in CLEAN]
        working = reference.working
        inside = [len(working.sites_of(piece)) for piece in working.pieces if isinstance(piece, int)]
        shape = Shape(name, round(sum(inside) / len(inside)) if inside else len(working.sites), working.is_cut)
        return [shape, *_clean(name, run, reference), *_planted(name, run, reference)]


def _clean(name: str, run: RunSpec, reference: Reference) -> Iterator[Result]:
    capped = getattr(reference.working.config, "attn_logit_softcapping", None)
    for what in CLEAN:
        if capped and what != "eager":
            yield Result(name, run.dtype, what, "n/a", UNCAPPED)
            continue
        start = time.perf_counter()
        try:
            candidate = _load(run) if what == "plain" else f"hf:?attn={what}"
            compared = diff(run, open_candidate(candidate), None, reference)
        except ParityError as error:
            no_such = what == "sdpa" and "scaled_dot_product_attention" in str(error)
            outcome, detail = ("n/a" if no_such else "refused"), str(error)
        except Exception as error:
            outcome, detail = "crash", _where(error)
        else:
            outcome, detail = _verdict(compared)
        yield Result(name, run.dtype, what, outcome, detail, time.perf_counter() - start)


def _verdict(compared: Comparison) -> tuple[str, str]:
    bad = _bad(compared)
    if bad or compared.findings:
        return "alarm", ", ".join(f"{s.site} {s.verdict} {s.ratio or 0:.3g}" for s in bad[:3])
    return ("match", "") if compared.verdict == "match" else (compared.verdict, compared.headline)


def _planted(name: str, run: RunSpec, reference: Reference) -> Iterator[Result]:
    for what, plant in zip(BUGS, (PLANTS[0], None, *PLANTS[1:]), strict=True):
        start = time.perf_counter()
        try:
            bug, model = _broken(run, plant)
            if bug is None:
                continue
            outcome, detail = _found(diff(run, open_candidate(model), None, reference), bug)
        except ParityError as error:
            outcome, detail = "refused", str(error)
        except Exception as error:
            outcome, detail = "crash", _where(error)
        yield Result(name, run.dtype, what, outcome, detail, time.perf_counter() - start)


def _broken(run: RunSpec, plant: Any) -> tuple[Bug | None, nn.Module]:
    if plant is not None:
        model = _load(run, attn_implementation="eager")
        return plant(model), model
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(run.checkpoint.path)
    bug = other_theta(config)
    return bug, _load(run, attn_implementation="eager", config=config)


def _load(run: RunSpec, **more: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, run.dtype)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(run.checkpoint.path, dtype=dtype, **more).eval()
    return model


def _found(compared: Comparison, bug: Bug) -> tuple[str, str]:
    """How a bug was found, and what was said where it was not all right."""
    bad = [site.site for site in _bad(compared)]
    said = [finding.fault.id for finding in compared.findings if finding.fault]
    detail = f"wrong: {', '.join(bad[:4]) or 'nothing'}; said {', '.join(said) or 'no name'}"
    first = next((site.site for site in compared.sites if site.max_abs), None)
    if first is None:
        return "no effect", "the broken model computes what the reference computes"
    detail = f"at {first}; {detail}"
    if not bad:
        logits = compared.logits
        # A branch that is normalized before it is added may carry any factor.
        drowns = compared.verdict == "match" and logits is not None and (logits.total_ratio or 0) <= ROUNDING
        return ("no effect" if drowns else "unseen"), f"{detail}; {compared.verdict}"
    if first not in bad or not all(_may_be_wrong(site, first, bug) for site in bad):
        return "elsewhere", detail
    # What the report says cannot be told apart is one statement: it is right if the bug is among it.
    said_of = [{finding.fault.id, *finding.fault.rivals} for finding in compared.findings if finding.fault]
    is_right = bool(said_of) and all(names & set(bug.names) for names in said_of)
    is_named = is_right and all(finding.fault for finding in compared.findings)
    if not is_named:
        return ("wrong name" if said and not is_right else "unnamed"), detail
    return ("named" if set(said) <= set(bug.names) else "tied"), detail


def _may_be_wrong(site: str, first: str, bug: Bug) -> bool:
    if site == first:
        return True
    if bug.spreads == "family":
        return _end(site) == _end(first) or _end(site) in ROTATED
    return bug.spreads == "inside" and site.startswith(f"{bug.place.rpartition('.')[0]}.")


def _end(site: str) -> str:
    return site.rpartition(".")[2].partition("#")[0]


def _bad(compared: Comparison) -> list[Measurement]:
    return [site for site in compared.sites if site.verdict in BAD]


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).splitlines()[0][:160] if str(error) else ""
    return f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})"


# -- the page ------------------------------------------------------------------------------------------------------

AS_IT_SHOULD_BE = ("match", "named", "tied", "n/a")
_SIGNS = {"match": "✓", "named": "named", "tied": "tied", "unnamed": "found", "n/a": "–"}


def page(shapes: Sequence[Shape], results: Sequence[Result]) -> str:
    """The table, the totals, and every run that was not as it should be."""
    from parity.run_spec import versions

    made_with = ", ".join(f"{key} {value}" for key, value in versions().items() if key != "parity")
    dtypes = [dtype for dtype in DTYPES if any(r.dtype == dtype for r in results)]
    heads = [f"{dtype}: {', '.join(CLEAN)}" for dtype in dtypes] + [f"{bug} ({', '.join(dtypes)})" for bug in BUGS]
    by_run = {(r.architecture, r.dtype, r.what): r.outcome for r in results}
    lines = [
        "# Every decoder of tests/architectures.py",
        "",
        f"Made by `python -m tests.bench.architectures`: {made_with}.",
    ]
    lines += ["✓ is a match of a clean candidate; a planted bug is `named`, `found` exactly but without a name, or as"]
    lines += ["it says; `tied` is a right name among those that the report says it cannot tell apart. – is not there:"]
    lines += [f"the model has no such attention (or {UNCAPPED}), or nothing that the bug could change.", ""]
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
    lines += [_line(r) for r in results if r.outcome not in AS_IT_SHOULD_BE] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _line(result: Result) -> str:
    text = f"- {result.architecture} {result.dtype}, {result.what}: {result.outcome}. {result.detail}"
    return text.replace("\n", " ").rstrip()


def _sign(outcome: str | None) -> str:
    return _SIGNS.get(outcome or "n/a", f"**{outcome}**")


def _totals(results: Sequence[Result]) -> list[str]:
    clean = [r for r in results if r.what in CLEAN and r.outcome != "n/a"]
    planted = [r for r in results if r.what in BUGS and r.outcome != "no effect"]
    localized = _count(planted, "named", "tied", "unnamed", "wrong name")
    named = _count(planted, "named", "tied")
    names = len({r.architecture for r in results})
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="architectures, with commas between them")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--page", type=Path, default=None, help=f"where the page goes [default: {PAGE.name}]")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(ARCHITECTURES)
    jobs = [(name, dtype) for name in names for dtype in arguments.dtypes.split(",")]
    found: list[Result | Shape] = []
    start = time.perf_counter()
    with ProcessPoolExecutor(min(arguments.jobs, len(jobs)), get_context("spawn")) as pool:
        for done in as_completed([pool.submit(examine, *job) for job in jobs]):
            found += done.result()
            for result in done.result():
                if isinstance(result, Result) and result.outcome not in AS_IT_SHOULD_BE:
                    print(_line(result), file=sys.stderr, flush=True)
    order = {name: i for i, name in enumerate(names)}
    results = sorted((r for r in found if isinstance(r, Result)), key=lambda r: order[r.architecture])
    text = page([s for s in found if isinstance(s, Shape)], results)
    if not arguments.only or arguments.page:
        (arguments.page or PAGE).write_text(text)
    print(text)
    print(f"{time.perf_counter() - start:.0f} s, {sum(r.seconds for r in results):.0f} s of runs", file=sys.stderr)
    return int(any(r.outcome in ("alarm", "crash", "inconclusive", "elsewhere", "wrong name") for r in results))


if __name__ == "__main__":
    sys.exit(main())
