"""What can be said of a run before torch is imported, which takes seconds: errors of its options come first."""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from parity.errors import CandidateError, ParityError, UsageError
from parity.reference.checkpoint import EMBEDDED, Checkpoint, find, looks_like_hub_id
from parity.reference.own_weights import OWN, check_weights
from parity.reference.tokenizer import require_tokenizer
from parity.untrusted import require_content, what_is_no_file

DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("eager", "sdpa")
_DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "npu", "xla", "xpu")
_LONGEST_TEXT = 1 << 26  # bytes of a file of text or token ids

Rows = tuple[tuple[int, ...], ...]
# A row of the catalogue: its id, and the keywords that follow.
_ROW = re.compile(r'^\s+id="([a-z0-9-]+)",$(.*?)^\)', re.MULTILINE | re.DOTALL)


def check_options(options: Any, *, has_dump: bool = False) -> None:
    """Raise a ParityError for what no run can mean; with a dump, it may say what to run and of which model.

    `options` are RunOptions.
    """
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UsageError(f"dtype {options.dtype!r} is not one of {', '.join(DTYPES)}.")
    if options.attention not in ATTENTIONS:
        raise UsageError(f"attention {options.attention!r} is not one of {', '.join(ATTENTIONS)}.")
    if not re.fullmatch(rf"({'|'.join(_DEVICES)})(:\d+)?", options.device):
        raise UsageError(f"device {options.device!r}: not known. Give one of {', '.join(_DEVICES)}, or such as cuda:1.")
    if options.noise < 0:
        raise UsageError(f"--noise {options.noise}: give a number of passes, 0 for none.")
    rows = None if options.tokens is None else parse_tokens(options.tokens, ragged=options.pad is not None)
    texts = prompts_of(options)
    if rows is None and not texts and not has_dump:
        raise UsageError("nothing to run. Give --prompt TEXT, --prompt-file FILE or --tokens IDS.")
    if "" in texts:
        raise UsageError("the prompt is empty: no token to run. Give some text, or token ids.")
    if options.pad and rows is None and len(texts) < 2:
        raise UsageError("--pad fills up the shorter rows of a batch. Give several prompts, or rows of --tokens.")
    if options.chat and not texts:
        raise UsageError("--chat applies a template to a prompt. Give --prompt or --prompt-file with it.")
    if options.faults:
        check_spec(options.faults, "faults", UsageError)
    if options.weights not in (None, OWN):
        check_weights(options.weights)
    if options.accept and not options.faults:
        _check_regimes(options.accept)
    if options.model is None and has_dump:
        return
    name = options.model or EMBEDDED
    if not Path(name).expanduser().is_dir() and looks_like_hub_id(name):
        return  # asking the hub takes longer than torch
    checkpoint = find(name)
    if texts:
        require_tokenizer(checkpoint)
    _check_rows(checkpoint, rows or ())


def _check_rows(checkpoint: Checkpoint, rows: Rows) -> None:
    config = checkpoint.config()
    table = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    vocabulary, positions = table.get("vocab_size"), table.get("max_position_embeddings")
    longest = max(map(len, rows), default=0)
    if isinstance(positions, int) and longest > positions > 0:
        raise UsageError(
            f"the prompt has {longest} tokens, but {checkpoint.name} has positions for {positions}. Shorten it."
        )
    if isinstance(vocabulary, int):
        outside = next((token for row in rows for token in row if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise UsageError(
                f"token id {outside} is outside the vocabulary of {checkpoint.name} (0 … {vocabulary - 1})."
            )


def check_file(path: Path) -> None:
    """Raise DumpError if there is no dump to open: the libraries that read arrays take a while to load."""
    with suppress(OSError):  # which opening it says better
        if not path.is_dir():
            require_content(path)


def check_output(path: Path, *, hashed: bool = False) -> None:
    """Raise UsageError if the name of a recording, or of the hashes of one, promises a format that is not written."""
    if hashed and path.suffix != ".safetensors":
        raise UsageError(f"{path}: hashes are written as safetensors. Give a name that ends in .safetensors.")
    if path.suffix not in ("", ".h5", ".hdf5", ".safetensors"):
        raise UsageError(f"{path}: no {path.suffix} is written. Give a name that ends in .h5 or .safetensors.")


def check_spec(spec: str, word: str, error: type[ParityError] = CandidateError) -> None:
    """Raise if a SPEC `module:name` or `file.py:name` is malformed, or its file or module does not exist."""
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise error(f"{word} {spec!r}: write module:function or file.py:function, for example my_port.py:load.")
    if where.endswith(".py"):
        if not Path(where).is_file():
            what = what_is_no_file(Path(where))
            raise error(f"{word} {spec!r}: {f'{where} is {what}' if what else f'no file {where}'} in {Path.cwd()}.")
    elif PathFinder.find_spec(where.partition(".")[0]) is None:
        raise error(f"{word} {spec!r}: no module {where.partition('.')[0]!r}. Install it, or give file.py:name.")


def check_injection(text: str, *, more: bool) -> None:
    """Raise UsageError if FAULT[=NUMBER][@LAYER] is malformed or, unless the user has `more` faults, unknown."""
    match = re.fullmatch(r"([^=@]+)(?:=([^@]+))?(?:@(\d+))?", text)
    if not match:
        raise UsageError(f"--inject {text!r}: write FAULT, FAULT@LAYER or FAULT=NUMBER@LAYER.")
    if match[2] is not None:
        try:
            float(match[2])
        except ValueError:
            raise UsageError(f"--inject {text!r}: {match[2]!r} is not a number.") from None
    known = fault_ids()
    if not more and match[1] not in known:
        near = difflib.get_close_matches(match[1], known, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}?" if near else "`parity faults` lists them."
        raise UsageError(f"no fault has the id {match[1]!r}. {hint}")


def _check_regimes(text: str) -> None:
    known = fault_ids(regimes=True)
    for id in filter(None, map(str.strip, text.split(","))):
        if id not in known:
            near = difflib.get_close_matches(id, known, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UsageError(f"--accept {id!r:.60}: no precision regime. {hint}Regimes are {', '.join(known)}.")


def fault_ids(*, regimes: bool = False) -> tuple[str, ...]:
    """The ids of the catalogue of faults, or of its regimes, read off its source: the catalogue is made of torch."""
    folder = Path(__file__).parent / "faults"
    rows = (row for file in sorted(folder.glob("*.py")) for row in _ROW.findall(file.read_text(encoding="utf-8")))
    return tuple(id for id, row in rows if not regimes or "    regime=True,\n" in row)


def prompts_of(options: Any) -> tuple[str, ...]:
    """The texts that options say to run, from the files that they are in; none without. Raises UsageError."""
    if options.prompts is not None:
        lines = read_text("--prompts", options.prompts).splitlines()
        if not (texts := tuple(line for line in lines if line.strip())):
            raise UsageError(f"--prompts {options.prompts}: empty, no prompt to run. Write one a line.")
        return texts
    if options.prompt_file is not None:
        return (read_text("prompt file", options.prompt_file),)
    if options.prompt is None:
        return ()
    return (options.prompt,) if isinstance(options.prompt, str) else options.prompt


def parse_tokens(text: str, *, ragged: bool = False) -> Rows:
    """Token ids from the option's own text, or from the file that it names. Raises UsageError.

    Rows may be of several lengths if they are `ragged`.
    """
    where = "--tokens"
    if not set(text) <= set("0123456789, \n"):
        if _exists(text):
            where, text = f"--tokens {text}", read_text("--tokens", Path(text))
        elif stray := next((word for word in _words(text) if not _is_id(word)), None):
            raise UsageError(
                f"--tokens: {stray!r:.60} is not a token id, and no file is named {text!r:.60}. "
                "Give numbers such as '1 2 3', or a file with one row a line."
            )
    for number, line in enumerate(text.splitlines(), 1):
        stray = next((word for word in _words(line) if not _is_id(word)), None)
        if stray is not None:
            raise UsageError(f"{where}: {stray!r:.60} in line {number} is not a token id. Give numbers, a row a line.")
    rows = tuple(tuple(map(int, words)) for line in text.splitlines() if (words := _words(line)))
    if not rows:
        raise UsageError(f"{where}: empty, no token to run. Give numbers such as '1 2 3', or a file.")
    if not ragged and len({len(row) for row in rows}) > 1:
        counts = ", ".join(str(len(row)) for row in rows[:6])
        raise UsageError(f"{where}: rows of {counts} ids. Rows are equally long, or padded: give --pad left or right.")
    return rows


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # longer than any name, or with a NUL
        return False


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _is_id(word: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,40}", word) is not None


def read_text(what: str, path: Path) -> str:
    """The text of a file that an option names. Raises UsageError."""
    try:
        if kind := what_is_no_file(path):
            raise UsageError(f"{what} {path}: is {kind}. Give a text file.")
        if (size := path.stat().st_size) > _LONGEST_TEXT:
            raise UsageError(f"{what} {path}: is {size} bytes long. Give at most {_LONGEST_TEXT}.")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UsageError(f"{what} {str(path)!r:.200}: not a readable text file ({reason}).") from error
