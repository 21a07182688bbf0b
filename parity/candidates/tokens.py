"""Do two runs speak of the same model and the same tokens? The cheapest of all bugs, so it is looked at first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from parity.dump import Dump, RunInfo
from parity.errors import IncomparableError, UsageError
from parity.reference.checkpoint import Checkpoint
from parity.reference.tokenizer import PromptIds, tokenize
from parity.results import Check

if TYPE_CHECKING:
    from parity.reference.batch import Batch


def require_same_model(dump: Dump, checkpoint: Checkpoint) -> None:
    """Raise IncomparableError if the dump says that other weights were run."""
    theirs = dump.info.fingerprint
    if theirs is not None and theirs != (ours := checkpoint.fingerprint()):
        raise IncomparableError(
            f"{dump.path}: these are two checkpoints: it records model {dump.info.model!r} (fingerprint {theirs}), "
            f"but {checkpoint.name!r} has fingerprint {ours}. Give --model the checkpoint that was recorded."
        )


def require_same_tokens(dump: Dump, asked: Sequence[tuple[int, ...]]) -> None:
    """Raise IncomparableError if the dump says that other token ids were run than the reference is asked."""
    theirs = dump.info.token_ids
    if theirs is None or theirs == tuple(asked):
        return
    if len(theirs) != len(asked):
        how = f"{len(theirs)} rows against {len(asked)}"
    else:
        how = next(difference(PromptIds(b, None, None), a) for a, b in zip(theirs, asked, strict=True) if a != b)
    raise IncomparableError(
        f"{dump.path}: holds a run on token ids {preview(theirs)}, the reference was asked {preview(asked)} ({how}). "
        "Run the port on the same ids (parity record writes them to a .tokens.txt file)."
    )


def require_same_padding(dump: Dump, asked: Batch) -> None:
    """Raise IncomparableError if a dump of the same token ids had another mask or other positions than are asked."""
    from parity.reference.batch import Batch

    info = dump.info
    if info.token_ids is None:
        return
    theirs = Batch.of_rows(info.token_ids, info.attention_mask, info.position_ids)
    if theirs.same_as(asked):
        return
    if asked.text is not None and theirs.text is None:
        raise IncomparableError(
            f"{dump.path}: holds a run without a mask, the reference was asked a padded batch. "
            "If the port had the mask, write it: parity.attention_mask, 1 for text and 0 for padding."
        )
    what = "attention_mask" if (theirs.text is None) != (asked.text is None) else "mask or positions"
    raise IncomparableError(
        f"{dump.path}: holds a run with another {what} than the reference was asked. "
        "Run the port on the same batch, or leave the prompt out: the dump says what it ran."
    )


def token_check(info: RunInfo, checkpoint: Checkpoint) -> Check | None:
    """Whether the ids of a dump are those that the checkpoint's tokenizer gives for the dump's prompt.

    None where the dump does not say both, or the checkpoint has no tokenizer.
    """
    if not info.prompt or info.token_ids is None or len(info.token_ids) != 1:
        return None
    theirs = info.token_ids[0]
    try:
        plain = tokenize(checkpoint, info.prompt)
    except UsageError:
        return None
    if not (found := difference(plain, theirs)):
        return Check("token ids", True, "those of the tokenizer")
    if _is_within(plain, theirs):
        return Check("token ids", True, "those of the tokenizer, among others (of a chat template?)")
    return Check("token ids", False, found)


def padding_remark(info: RunInfo, checkpoint: Checkpoint) -> Check | None:
    """A remark where a row of a dump begins or ends in two pad ids or more; None elsewhere, or without a pad id.

    Without a mask the reference reads padding as text, and what a port hid may look wrong.
    """
    config = checkpoint.config()
    pad = config.get("pad_token_id")
    if type(pad) is not int or info.token_ids is None or info.attention_mask is not None:
        return None
    for number, row in enumerate(info.token_ids):
        for where, ids in (("begins", row), ("ends", row[::-1])):
            count = next((i for i, token in enumerate(ids) if token != pad), len(ids))
            if count > 1:
                detail = (
                    f"row {number} {where} in {count} pad ids ({pad}): read as text, for want of parity.attention_mask"
                )
                return Check("padding", True, detail)
    return None


def _is_within(prompt: PromptIds, theirs: tuple[int, ...]) -> bool:
    """Whether a template surrounds the prompt: more than one mark that a tokenizer adds or leaves out."""
    text = tuple(i for i in prompt.ids if i not in (prompt.begin, prompt.end))
    starts = range(len(theirs) - len(text) + 1)
    return len(theirs) > len(prompt.ids) + 1 and any(theirs[i : i + len(text)] == text for i in starts)


def difference(tokenizer: PromptIds, theirs: tuple[int, ...]) -> str:
    """How ids differ from those that the tokenizer gives; empty if they do not."""
    own = tokenizer.ids
    if theirs == own:
        return ""
    for name, mark, at_begin in (("BOS", tokenizer.begin, True), ("EOS", tokenizer.end, False)):
        if mark is None:
            continue
        if own == ((mark, *theirs) if at_begin else (*theirs, mark)):
            return f"the ids carry no {name} ({mark}), the tokenizer adds one"
        if theirs == ((mark, *own) if at_begin else (*own, mark)):
            if mark == own[0 if at_begin else -1]:
                return f"the ids carry {name} ({mark}) twice"
            return f"the ids carry the mark {name} ({mark}), the tokenizer adds none"
    at = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), min(len(own), len(theirs)))
    ours, other = (str(ids[at]) if at < len(ids) else "no more" for ids in (own, theirs))
    return f"tokenizers give other ids for this prompt: position {at} has {other}, expected {ours}"


def preview(rows: Sequence[tuple[int, ...]]) -> str:
    """The first ids of a batch, and its shape."""
    first = ", ".join(map(str, rows[0][:6])) if rows else ""
    return f"[{first}{', …' if rows and len(rows[0]) > 6 else ''}] ({len(rows)} x {len(rows[0]) if rows else 0})"
