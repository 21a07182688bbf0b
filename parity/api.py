"""What `import parity` offers, and what the commands do: a comparison or a recording in one call."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.candidates.base import Candidate, dump_file, open_candidate
from parity.dump import copy_as_safetensors, open_dump, write_tokens
from parity.errors import UsageError
from parity.observer import Observer
from parity.options import IMPL, RunOptions, run_options, shell
from parity.preflight import check_output

if TYPE_CHECKING:
    from parity.engine_report import Contrast
    from parity.results import Comparison


def diff(
    candidate: Any = IMPL, *, names: Path | str | None = None, observer: Observer | None = None, **options: Any
) -> Comparison:
    """Compare a candidate with transformers, operation by operation, on the candidate's own inputs.

    candidate  a torch module, or a SPEC: module:factory, file.py:factory, a dump
    names      a name map (JSON): the candidate's names to the reference's
    observer   is told how far the comparison is
    options    those of `parity diff`: model, prompt, prompt_file, tokens, dtype, device, attention, inner, …

    Raises ParityError, with one line that says what is wrong, what was found and how to mend it.

    >>> comparison = diff("impl.qwen3:load", prompt="Hello", power=False)
    >>> comparison.verdict, comparison.exit_code, len(comparison.findings)
    ('match', 0, 0)
    """
    chosen = run_options(options, "parity.diff")
    command = chosen.command(str(candidate), names) if isinstance(candidate, (str, Path)) else []
    return compared(candidate, names, chosen, shell(command), observer)


def compared(
    candidate: Any, names: Path | str | None, options: RunOptions, command: str, observer: Observer | None = None
) -> Comparison:
    """Compare a candidate (as `diff` takes it); what the options leave out is as the candidate itself says."""
    opened = open_candidate(candidate, names)
    from parity.compare.pipeline import diff as compare
    from parity.run_spec import run_spec

    options = replace(options, weights=options.weights or opened.weights)
    run = run_spec(options, opened.said(), command)
    return compare(run, opened, observer)


def diff_dumps(
    dumps: tuple[Path, Path],
    names: Path | str | None,
    options: RunOptions,
    command: str,
    observer: Observer | None = None,
) -> Comparison | Contrast:
    """Compare two dumps.

    Where the first is the reference's recording, the second is compared with the reference's run, and a check says
    whether the recording's arrays are that. Otherwise both are engines, each judged on its own inputs.
    """
    from parity.candidates.tokens import require_same_model, require_same_padding, require_same_tokens
    from parity.compare.pipeline import diff as compare
    from parity.engines.contrast import contrast
    from parity.engines.own_runs import checked_reference
    from parity.run_spec import run_spec

    first, second = dumps
    candidate = dump_file(second, names)
    said = candidate.said()
    with open_dump(first) as recording:
        asked = recording.info
        other_weights = None not in (asked.fingerprint, said.fingerprint) and asked.fingerprint != said.fingerprint
        if not (asked.producer or "").startswith("transformers ") or other_weights:
            return contrast(dumps, names, options, command, observer or Observer())
        if asked.token_ids:
            rows = ("token_ids", "attention_mask", "position_ids")
            said = replace(said, **{name: getattr(asked, name) for name in rows})
        said = replace(said, model=asked.model)
        run = run_spec(options, said, command)
        require_same_model(recording, run.checkpoint)
        require_same_tokens(recording, run.token_ids)
        require_same_padding(recording, run.batch)
        reference, check = checked_reference(recording, run)
    return compare(run, candidate, observer, reference, (check,))


@dataclass(frozen=True)
class Recorded:
    """What a recording left.

    ids      the file of the token ids, as text that any language can read
    tokens   how many there are in a row
    missing  the reference's sites that the candidate does not have
    """

    ids: Path
    tokens: int
    missing: tuple[str, ...] = ()


def record(
    path: Path | str,
    candidate: Any = None,
    *,
    names: Path | str | None = None,
    observer: Observer | None = None,
    hashed: bool = False,
    **options: Any,
) -> Recorded:
    """Record every activation of the reference, or of a candidate, to a dump (*.h5, or
    *.safetensors), and the token ids beside it; `hashed`, hashes of their bits alone (*.safetensors).

    The other arguments are those of `diff`. Raises ParityError.

    >>> record("ref.h5", prompt="The sky is").tokens
    4
    >>> with open_dump("ref.h5") as dump:
    ...     dump.entries["model.layers.3.self_attn.q_rope"].dims, dump.read("lm_head").shape
    (('batch', 'head', 'token', 'head_dim'), (1, 4, 1000))
    """
    opened = None if candidate is None else open_candidate(candidate, names)
    return recorded(Path(path), opened, run_options(options, "parity.record"), observer, hashed=hashed)


def recorded(
    path: Path,
    candidate: Candidate | None,
    options: RunOptions,
    observer: Observer | None = None,
    *,
    hashed: bool = False,
) -> Recorded:
    """Record the reference, or an open candidate; as HDF5, or as safetensors if the name says so."""
    check_output(path, hashed=hashed)
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no directory {path.parent}. Create it first.")
    if path.suffix == ".safetensors" and not hashed:  # whose header says first how large everything is
        with tempfile.TemporaryDirectory(prefix=".parity-", dir=path.parent) as folder:
            whole = Path(folder) / "recorded.h5"
            done = recorded(whole, candidate, options, observer)
            with open_dump(whole) as dump:
                copy_as_safetensors(dump, path)
            ids = done.ids.rename(path.with_suffix(".tokens.txt"))
        return replace(done, ids=ids)
    from parity.compare.recording import record_candidate, record_reference
    from parity.run_spec import run_spec

    run = run_spec(options)
    model = run.model()
    run = run.continued(model)
    missing: tuple[str, ...] = ()
    if hashed:
        from parity.engines.hashing import record_hashes

        missing = record_hashes(run, candidate, model, path, observer or Observer())
    elif candidate is None:
        record_reference(run, path, model, observer or Observer())
    else:
        missing = record_candidate(run, candidate, model, path)
    ids = path.with_suffix(".tokens.txt")
    write_tokens(ids, run.token_ids)
    return Recorded(ids, len(run.token_ids[0]), missing)
