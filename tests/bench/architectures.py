"""Every decoder: clean runs must match in three dtypes, and bugs planted in a live model must be found and named.

    python -m tests.bench.architectures [--jobs 16] [--only llama,mamba2] [--dtypes float32,bfloat16]
    python -m tests.bench.architectures --every      all other causal language models that transformers has

Makes the checkpoints of tests.architectures, or the smaller ones of tests.small_decoders. Clean candidates are `hf:`
with eager and with sdpa and the plain model as `from_pretrained` gives it; planted bugs are those of
tests.bench.architecture_bugs. The right place of a bug is the first site, in order of execution, where the broken
model differs at all. Writes tests/bench/ARCHITECTURES.md or EVERY_DECODER.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
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
from parity.reference.build import choose_experts
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.results import BAD, ROUNDING, Comparison, Measurement
from parity.run_spec import RunSpec
from tests.architectures import ARCHITECTURES, make
from tests.bench.architecture_bugs import PLANTS, ROTATED, Bug, other_theta
from tests.bench.architecture_page import AS_IT_SHOULD_BE, BUGS, CLEAN, DTYPES, UNCAPPED, Result, Shape, as_line, page
from tests.small_decoders import make_small, others

PAGE, PAGE_OF_EVERY = (Path(__file__).with_name(f"{name}.md") for name in ("ARCHITECTURES", "EVERY_DECODER"))
TOKENS = tuple((i * 37 + 11) % 200 + 3 for i in range(40))  # more than any window; the padding token is not among them


def examine(name: str, dtype: str) -> list[Result | Shape]:
    """All runs of one architecture in one dtype."""
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="parity-arch-") as folder:
        path = Path(folder) / name
        if name in ARCHITECTURES:
            make(name, path)
        elif reason := _unmade(name, path):
            return [Result(name, dtype, what, "unmade", reason) for what in CLEAN[:1]]
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
        rounding: dict[str, float] = {}
        return [shape, *_clean(name, run, reference, rounding), *_planted(name, run, reference, rounding)]


def _unmade(name: str, path: Path) -> str:
    """Makes a small checkpoint and runs it; says why where that is nothing that transformers itself can do."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(make_small(name, path)).eval()
        with torch.no_grad():
            model(torch.tensor([TOKENS]), use_cache=False)
    except Exception as error:
        return _where(error)
    return ""


def _clean(name: str, run: RunSpec, reference: Reference, rounding: dict[str, float]) -> Iterator[Result]:
    """The clean runs; `rounding` is told how far each site of the eager one is from the reference."""
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
            rounding |= {site.site: site.max_abs for site in compared.sites} if what == "eager" else {}
        yield Result(name, run.dtype, what, outcome, detail, time.perf_counter() - start)


def _verdict(compared: Comparison) -> tuple[str, str]:
    bad = _bad(compared)
    if bad or compared.findings:
        return "alarm", ", ".join(f"{s.site} {s.verdict} {s.ratio or 0:.3g}" for s in bad[:3])
    return ("match", "") if compared.verdict == "match" else (compared.verdict, compared.headline)


def _planted(name: str, run: RunSpec, reference: Reference, rounding: Mapping[str, float]) -> Iterator[Result]:
    for what, plant in zip(BUGS, (PLANTS[0], None, *PLANTS[1:]), strict=True):
        start = time.perf_counter()
        try:
            bug, model = _broken(run, plant)
            if bug is None:
                continue
            outcome, detail = _found(diff(run, open_candidate(model), None, reference), bug, rounding)
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
    choose_experts(model)
    return model


def _found(compared: Comparison, bug: Bug, rounding: Mapping[str, float]) -> tuple[str, str]:
    """How a bug was found, and what was said where it was not all right.

    The first site that a bug changes is the first that is not as far from the reference as without it.
    """
    bad = [site.site for site in _bad(compared)]
    said = [finding.fault.id for finding in compared.findings if finding.fault]
    detail = f"wrong: {', '.join(bad[:4]) or 'nothing'}; said {', '.join(said) or 'no name'}"
    first = next((s.site for s in compared.sites if s.max_abs != rounding.get(s.site, 0.0)), None)
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
    if site.partition("#")[0] == first.partition("#")[0]:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="architectures, with commas between them")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--every", action="store_true", help="those that transformers has beside these")
    parser.add_argument("--page", type=Path, default=None, help=f"where the page goes [default: {PAGE.name}]")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else others() if arguments.every else list(ARCHITECTURES)
    jobs = [(name, dtype) for name in names for dtype in arguments.dtypes.split(",")]
    found: list[Result | Shape] = []
    start = time.perf_counter()
    with ProcessPoolExecutor(min(arguments.jobs, len(jobs)), get_context("spawn")) as pool:
        for done in as_completed([pool.submit(examine, *job) for job in jobs]):
            found += done.result()
            for result in done.result():
                if isinstance(result, Result) and result.outcome not in AS_IT_SHOULD_BE:
                    print(as_line(result), file=sys.stderr, flush=True)
    order = {name: i for i, name in enumerate(names)}
    results = sorted((r for r in found if isinstance(r, Result)), key=lambda r: order[r.architecture])
    text = page([s for s in found if isinstance(s, Shape)], results, " --every" if arguments.every else "")
    if not arguments.only or arguments.page:
        (arguments.page or (PAGE_OF_EVERY if arguments.every else PAGE)).write_text(text)
    print(text)
    print(f"{time.perf_counter() - start:.0f} s, {sum(r.seconds for r in results):.0f} s of runs", file=sys.stderr)
    return int(any(r.outcome in ("alarm", "crash", "inconclusive", "elsewhere", "wrong name") for r in results))


if __name__ == "__main__":
    sys.exit(main())
