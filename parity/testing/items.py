"""A port's comparison as test items: one for each prompt and layer, and for each of the ends.

    import parity.testing

    test_my_port = parity.testing.cases(candidate="my_port.py:load", model="Qwen/Qwen3-0.6B", prompts=["The sky is"])

This module says what the items are and what they hold; `parity.testing.plugin` runs them. Paths are relative to
the folder of the test file.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from parity.candidates.base import beside
from parity.errors import ModelError, UsageError
from parity.options import RunOptions, run_options, shell
from parity.reference.checkpoint import EMBEDDED, find
from parity.settings import NEXT_TOKEN, Settings, parse
from parity.testing.acceptance import EMBEDDING, FINAL_NORM, LOGITS

if TYPE_CHECKING:
    from parity.results import Comparison

_LONGEST_SLUG = 24
_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "num_layers")

Prompt = str | Sequence[int]
Batch = Sequence[Prompt]


@dataclass(frozen=True)
class Port:
    """What `cases` was asked for."""

    candidate: str
    prompts: tuple[Prompt | Batch, ...]
    options: RunOptions
    settings: Settings
    missing: str
    names: str | None


@dataclass(frozen=True)
class Run:
    """One comparison, which all items of a prompt share. `id` is the prompt's part of their names."""

    id: str
    options: RunOptions
    candidate: str
    names: str | None

    @property
    def key(self) -> str:
        """Short text that is equal where the comparison would be."""
        what = json.dumps([asdict(self.options), self.candidate, self.names], default=str, sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:12]

    @property
    def command(self) -> list[str]:
        """The same comparison as a command line."""
        return self.options.command(self.candidate, self.names)


@dataclass(frozen=True)
class Case:
    """One test item: a part of a run (`layers.3`, `logits`, …) and what it must hold.

    `candidate` is as `cases` was given it.
    """

    run: Run
    candidate: str
    part: str
    parts: tuple[str, ...]
    settings: Settings
    skip_missing: bool


def cases(
    *,
    candidate: str,
    prompts: Sequence[Prompt | Batch],
    thresholds: Mapping[str, Mapping[str, float]] | None = None,
    allow_unmeasured: Sequence[str] = (),
    missing: str = "error",
    **options: Any,
) -> Callable[..., None]:
    """A test with one item for each prompt and layer, the embedding, final norm, logits and next token.

    It stands in a module or in a class, but not in a unittest.TestCase: there pytest makes no items of one test.

    candidate         module:factory, file.py:factory, or a dump (then with exactly the prompt it was made of)
    prompts           texts, "@file" for a text file, or tuples of token ids; a list of texts, or of such tuples, is a
                      batch, whose shorter rows are padded (on the left, or pad="right")
    thresholds        as `[tool.parity.thresholds]`, looked at after it: {"*.mlp.*": {"ratio": 4}}; the verdict
                      decides where there are no numbers. ratio is of the site's own error to the reference's
                      rounding; mse, cosine and max_abs compare with the reference's own run; kl is the largest of
                      all positions, in nats
    allow_unmeasured  globs of sites that the candidate need not have
    missing           "error" or "skip" where there is no such model
    options           those of `parity diff`: model, dtype, decode, chunks, inner, …; and names, a name map (JSON)

    Raises UsageError where an argument makes no sense; what a missing file means is said at collection.
    """
    if missing not in ("error", "skip"):
        raise UsageError(f"cases(missing={missing!r}): not known. Give 'error' or 'skip'.")
    if isinstance(prompts, str) or not prompts:
        raise UsageError(f"cases(prompts={prompts!r}): a list of prompts is expected, of one or more.")
    settings = parse(thresholds or {}, allow_unmeasured, "cases()")
    names = options.pop("names", None)
    port = Port(candidate, tuple(prompts), run_options(options, "cases()"), settings, missing, names)

    # In a class, pytest hands over the instance first and expects it to be no fixture.
    def test(_self: object = None, /, *, parity_case: Case, parity_check: Callable[[Case], None]) -> None:
        parity_check(parity_case)

    caller = sys._getframe(1)
    test.__code__ = _placed(test.__code__, caller.f_code.co_filename, caller.f_lineno)
    test.__dict__["parity_port"] = port
    return test


def _placed(code: CodeType, file: str, line: int) -> CodeType:
    """The code as if it stood where `cases` was called: that is where pytest says a test is."""
    return code.replace(co_filename=file, co_firstlineno=line)


# -- what the items are --------------------------------------------------------------------------------------


def expand(port: Port, folder: Path, settings: Settings) -> list[Case]:
    """The items of a port whose test file lies in `folder`. Raises UsageError and ModelError."""
    model = port.options.model or EMBEDDED
    model = str(folder / model) if (folder / model).is_dir() else model
    parts = (EMBEDDING, *(f"layers.{i}" for i in range(_layers(model))), FINAL_NORM, LOGITS, NEXT_TOKEN)
    skip = port.missing == "skip"
    accept = ",".join([*settings.accept, *([port.options.accept] if port.options.accept else [])])
    port = replace(port, options=replace(port.options, accept=accept or None))
    return [
        Case(run, port.candidate, part, parts, settings.and_then(port.settings), skip)
        for run in _runs(port, model, folder)
        for part in parts
    ]


def _runs(port: Port, model: str, folder: Path) -> Iterator[Run]:
    candidate = beside(folder, port.candidate)
    names = str(_existing(folder, port.names, f"names {port.names!r}")) if port.names else None
    seen: dict[str, int] = {}
    for prompt in port.prompts:
        slug, what = _said(prompt, port, folder)
        seen[slug] = seen.get(slug, 0) + 1
        options = replace(port.options, model=model, **what)
        yield Run(slug if seen[slug] == 1 else f"{slug}-{seen[slug]}", options, candidate, names)


def _said(prompt: Prompt | Batch, port: Port, folder: Path) -> tuple[str, dict[str, Any]]:
    """The slug of a prompt or batch, and the options that say it."""
    if not isinstance(prompt, str) and any(isinstance(row, (str, list, tuple)) for row in prompt):
        return _batch(prompt, port.options.pad)  # type: ignore[arg-type]
    return _prompt(prompt, folder)  # type: ignore[arg-type]


def _batch(rows: Batch, pad: str | None) -> tuple[str, dict[str, Any]]:
    """The slug of a batch, and the options that say it."""
    slug = f"batch-of-{len(rows)}"
    if all(isinstance(row, str) and row and not row.startswith("@") for row in rows):
        return slug, {"prompt": tuple(rows)}
    if not all(isinstance(row, (list, tuple)) for row in rows):
        raise UsageError(
            f"prompts: {rows!r:.80} is no batch. Give texts alone (no @file), or tuples of token ids alone."
        )
    each = [_prompt(row, Path())[1]["tokens"] for row in rows]
    ragged = len({len(row) for row in rows}) > 1
    return slug, {"tokens": "\n".join(each), "pad": pad or ("left" if ragged else None)}


def _prompt(prompt: Prompt, folder: Path) -> tuple[str, dict[str, Any]]:
    """The slug of a prompt, and the option that says it."""
    if not isinstance(prompt, str):
        ids = tuple(prompt)
        if not ids or not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise UsageError(f"prompt {prompt!r}: neither text nor token ids. Give a string or a tuple of integers.")
        return f"{len(ids)}-tokens", {"tokens": " ".join(map(str, ids))}
    if not prompt:
        raise UsageError("prompt '': no token to run. Give some text, or a tuple of token ids.")
    if not prompt.startswith("@"):
        return _slug(prompt), {"prompt": prompt}
    path = _existing(folder, prompt[1:], f"prompt {prompt!r}")
    return _slug(path.stem), {"prompt_file": path}


def _existing(folder: Path, file: str, what: str) -> Path:
    if not (folder / file).is_file():
        raise UsageError(f"{what}: no file {folder / file}. Give its path from the folder of the test file.")
    return folder / file


def _slug(text: str) -> str:
    """The first words, as they can stand in the name of a test."""
    slug = "-".join(re.findall(r"[a-z0-9]+", text[:200].lower()))
    if len(slug) > _LONGEST_SLUG:
        slug = slug[: _LONGEST_SLUG + 1].rpartition("-")[0] or slug[:_LONGEST_SLUG]
    return slug or "prompt"


def _layers(model: str) -> int:
    """How many layers config.json says the model has. Raises ModelError."""
    path = _config(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}). Download the checkpoint again.") from error
    for table in (config, config.get("text_config") or {}):
        for key in _LAYERS_KEYS:
            if isinstance(table.get(key), int):
                return int(table[key])
    raise ModelError(f"{path}: does not say how many layers there are (num_hidden_layers). Is it a decoder?")


def _config(model: str) -> Path:
    """Where config.json is. Of a model on the hub nothing else is downloaded before a test runs."""
    if model == EMBEDDED or model.count("/") != 1 or model.startswith((".", "/", "~")) or Path(model).is_dir():
        return find(model).path / "config.json"
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:
        # The hub client's error classes differ by version and by transport; each means that it is not available here.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model {model!r}: no directory, and the hub did not deliver its config.json: {reason[:200].rstrip('.')}. "
            "Check the name, go online, or give cases(..., missing='skip')."
        ) from error


# -- comparing -----------------------------------------------------------------------------------------------


def compare(run: Run) -> Comparison:
    """Make the comparison. Raises ParityError."""
    from parity.api import compared

    return compared(run.candidate, run.names, run.options, shell(run.command))
