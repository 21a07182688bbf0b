"""Rollout files: token ids with log-probabilities, in the shapes that vLLM, SGLang, TRL, verl and slime write.

JSON lines, one JSON value, or safetensors; told apart by content. Every shape comes down to a row with a prompt, a
completion, and one log-probability for each token of the completion (None where the file has none, or masks it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity.errors import DumpError
from parity.rollouts.tensors import Row, read_tensors
from parity.untrusted import parse_json, what_is_no_file

_LARGEST = 1 << 30  # bytes
_TOKEN_ID = "token_id:"

# How the programs call the same thing. The first name that a record has counts.
_PROMPT = ("prompt_ids", "prompt_token_ids", "input_ids", "prompt_tokens")
_COMPLETION = ("completion_ids", "response_ids", "output_ids", "token_ids", "response_tokens")
_LOGPROBS = ("logprobs", "response_logprobs", "rollout_log_probs", "sampling_logprobs", "log_probs")
_MASK = ("response_mask", "completion_mask", "loss_mask")


@dataclass(frozen=True)
class Rollouts:
    """The rows of a file, and whose shape it has."""

    rows: tuple[Row, ...]
    format: str


class _ShapeError(ValueError):
    """A record is not what its shape promises; the message says what was found."""


def read_rollouts(path: Path) -> Rollouts:
    """Read a rollout file. Raises DumpError in one line: what is wrong, what was found, what to write."""
    if odd := what_is_no_file(path):
        raise DumpError(f"{path}: is {odd} — a file of rollouts is expected — give JSON lines or safetensors")
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise DumpError(f"{path}: has {size} bytes — at most {_LARGEST} are read — give a part of the rollouts")
        raw = path.read_bytes()
    except OSError as error:
        raise DumpError(f"{path}: cannot be read — {error.strerror} — check its name") from error
    if raw[8:9] == b"{" and b"\0" in raw[:8]:  # safetensors begin with the length of their header
        rows = read_tensors(path)
        found = Rollouts(rows, "safetensors")
    else:
        found = _of_records(path, raw)
    if not any(value is not None for row in found.rows for value in row.logprobs):
        raise DumpError(
            f"{path}: has no log-probability of a completion's token — found {len(found.rows)} rows — "
            "ask the engine for them (vLLM: logprobs=0, SGLang: return_logprob=True)"
        )
    return found


def _of_records(path: Path, raw: bytes) -> Rollouts:
    rows: list[Row] = []
    formats: dict[str, None] = {}
    for number, record in _records(path, raw):
        where = f"{path}: record {number}"
        if not isinstance(record, dict):
            raise DumpError(f"{where}: is no JSON object — found {type(record).__name__} — write one object a line")
        shape = next((shape for shape in _SHAPES if shape[1] in record), _PLAIN)
        try:
            rows += shape[2](record)
        except _ShapeError as error:
            raise DumpError(f"{where}: read as {shape[0]}, but {error}") from None
        except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DumpError(
                f"{where}: not of the shape of {shape[0]} — {reason:.80} — `parity logprobs --help` names the shapes"
            ) from None
        formats[shape[0]] = None
    return Rollouts(tuple(rows), ", ".join(formats))


def _records(path: Path, raw: bytes) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file, numbered from 1: one a line, or one for all of it (a list is a list of records)."""
    try:
        whole = parse_json(raw, unique=False)
        yield from enumerate(whole if isinstance(whole, list) else [whole], 1)
        return
    except (ValueError, UnicodeDecodeError):
        pass
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line, unique=False)
        except (ValueError, UnicodeDecodeError) as error:
            raise DumpError(
                f"{path}: line {number} is not JSON — {error!s:.80} — write JSON lines or safetensors"
            ) from None


# -- shapes ---------------------------------------------------------------------------------------------------


def _completions(record: dict[str, Any]) -> Iterator[Row]:
    """vLLM's server, /v1/completions and /v1/chat/completions with return_token_ids."""
    for choice in record["choices"]:
        prompt = choice.get("prompt_token_ids") or record.get("prompt_token_ids") or record.get("prompt")
        said = choice.get("logprobs") or {}
        content = said.get("content")
        values = [item["logprob"] for item in content] if content is not None else said.get("token_logprobs")
        names = [item["token"] for item in content] if content is not None else said.get("tokens")
        ids = choice.get("token_ids") or _ids_of(names)
        yield _row(prompt, ids, values, hint="ask with return_token_ids")


def _ids_of(names: Any) -> list[int] | None:
    """Token ids that stand in place of tokens: `token_id:15`."""
    if not names or not all(isinstance(name, str) and name.startswith(_TOKEN_ID) for name in names):
        return None
    return [int(name.removeprefix(_TOKEN_ID)) for name in names]


def _request_output(record: dict[str, Any]) -> Iterator[Row]:
    """vLLM's RequestOutput: for each token a table of the likeliest, by token id."""
    for output in record["outputs"]:
        ids, tables = output["token_ids"], output.get("logprobs") or []
        values = [_value(table[str(token)]) for token, table in zip(ids, tables, strict=False)]
        yield _row(record.get("prompt_token_ids"), ids, values, hint="keep prompt_token_ids")


def _value(entry: Any) -> Any:
    return entry["logprob"] if isinstance(entry, dict) else entry


def _sglang(record: dict[str, Any]) -> Iterator[Row]:
    """SGLang's /generate with return_logprob: [log-probability, token id, text] for each token."""
    meta = record["meta_info"]
    output = meta["output_token_logprobs"]
    prompt = _first(record, _PROMPT)
    if prompt is None:
        prompt = [item[1] for item in meta.get("input_token_logprobs") or []]
        if not prompt or meta.get("prompt_tokens") not in (None, len(prompt)):
            raise _ShapeError(
                f"has {len(prompt)} of {meta.get('prompt_tokens')} prompt tokens — "
                "ask with logprob_start_len=0, or add the request's input_ids"
            )
    ids = [item[1] for item in output]
    if record.get("output_ids") not in (None, ids):
        raise _ShapeError("output_ids are not the ids in output_token_logprobs — write what the engine returned")
    yield _row(prompt, ids, [item[0] for item in output], hint="add input_ids")


def _slime(record: dict[str, Any]) -> Iterator[Row]:
    """slime's samples: prompt and response in one list of tokens."""
    count, tokens = int(record["response_length"]), record["tokens"]
    if not 0 < count < len(tokens):
        raise _ShapeError(f"response_length is {count} of {len(tokens)} tokens — write 1 to {len(tokens) - 1}")
    values = _first(record, _LOGPROBS)
    yield _row(tokens[:-count], tokens[-count:], values, _first(record, _MASK), hint="write rollout_log_probs")


def _plain(record: dict[str, Any]) -> Iterator[Row]:
    """TRL and verl: prompt, completion and log-probabilities, of one row or of a batch."""
    prompts, completions, values = (_first(record, names) for names in (_PROMPT, _COMPLETION, _LOGPROBS))
    if prompts is None or completions is None or values is None:
        raise _ShapeError(
            f"has the keys {', '.join(list(record)[:6]) or 'none'} — write prompt_ids, completion_ids and logprobs"
        )
    mask, ids = _first(record, _MASK), record.get("logprob_token_ids")
    if not completions or not isinstance(completions[0], list):
        yield _row(prompts, completions, _chosen(values, ids, completions), mask, hint="write prompt_ids")
        return
    # A prompt with several completions stands once, before all of them.
    each, rest = divmod(len(completions), max(len(prompts), 1))
    if rest or len(values) != len(completions):
        raise _ShapeError(
            f"{len(prompts)} prompts, {len(completions)} completions, {len(values)} rows of log-probabilities — "
            "write as many rows of each"
        )
    for i, completion in enumerate(completions):
        inside = ids[i] if ids is not None else None
        chosen = _chosen(values[i], inside, completion)
        yield _row(prompts[i // each], completion, chosen, mask[i] if mask else None, hint="write prompt_ids")


def _chosen(values: Sequence[Any], ids: Any, completion: Sequence[int]) -> list[Any]:
    """The value of the token itself, where a list of the likeliest ones stands for each token."""
    if not values or not isinstance(values[0], list):
        return list(values)
    if ids is None:
        if any(len(each) != 1 for each in values):
            raise _ShapeError("has several log-probabilities for a token — write logprob_token_ids, or the token's own")
        return [each[0] for each in values]
    return [each[names.index(token)] for each, names, token in zip(values, ids, completion, strict=True)]


def _row(prompt: Any, completion: Any, values: Any, mask: Any = None, *, hint: str) -> Row:
    for what, ids in (("prompt", prompt), ("completion", completion)):
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise _ShapeError(f"has no token ids of the {what} — found {ids!r:.40} — {hint}")
    if not isinstance(values, list) or len(values) != len(completion):
        found = len(values) if isinstance(values, list) else "no"
        raise _ShapeError(f"has {found} log-probabilities for {len(completion)} tokens — write one for each")
    if not all(value is None or (isinstance(value, int | float) and type(value) is not bool) for value in values):
        raise _ShapeError("has a log-probability that is no number — write numbers, null where there is none")
    if mask is not None and len(mask) != len(completion):
        raise _ShapeError(f"has a mask of {len(mask)} for {len(completion)} tokens — write one for each")
    kept = mask or [1] * len(completion)
    return Row(
        tuple(prompt),
        tuple(completion),
        tuple(float(v) if v is not None and keep else None for v, keep in zip(values, kept, strict=True)),
    )


def _first(record: dict[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


_Shape = tuple[str, str, Callable[[dict[str, Any]], Iterator[Row]]]
# Whose it is, the key that tells it, and what reads a record.
_SHAPES: tuple[_Shape, ...] = (
    ("vLLM, server", "choices", _completions),
    ("vLLM, RequestOutput", "outputs", _request_output),
    ("SGLang", "meta_info", _sglang),
    ("slime", "response_length", _slime),
)
_PLAIN: _Shape = ("TRL or verl", "", _plain)
