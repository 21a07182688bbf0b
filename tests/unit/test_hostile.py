"""A table of files made to do harm, and the one line that each gets: within seconds, in little memory.

Each row runs the command line in a forked process, with limits that the system holds.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import select
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest

from parity.cli import main
from parity.dump import ArchiveWriter, RunInfo, open_dump, write_safetensors
from parity.errors import printable
from tests.unit import hostile as make
from tests.unit.hostile import ESCAPES, HUGE, Build

SECONDS = 20  # a hang limit, on a machine that has other things to do
MEMORY = 600 << 20  # bytes more than this process has


@dataclass(frozen=True)
class Row:
    """What is built, under which name, the line that it gets, and how parity is called."""

    build: Build
    line: str
    name: str = "port.safetensors"
    command: tuple[str, ...] = ("check", "FILE")


def h5(build: Build, line: str) -> Row:
    return Row(build, line, "port.h5")


def npz(line: str, *members: tuple[str, bytes], compressed: bool = False) -> Row:
    return Row(make.npz(*members, compressed=compressed), line, "port.npz")


def folder(line: str, **files: bytes) -> Row:
    return Row(make.folder(**files), line, "port")


def model(build: Build, line: str) -> Row:
    return Row(build, line, "model", ("diff", "--tokens", "1 2", "--model", "FILE"))


def names(content: bytes, line: str) -> Row:
    return Row(make.content(content), line, "names.json", NAMES)


def attribute(name: str, value: object) -> Build:
    return make.archive(lambda file: file.attrs.__setitem__(name, value))


def said(old: str, new: str) -> Build:
    """An archive in whose text of the run something is replaced."""
    return make.archive(lambda file: make.put("run", file["run"][()].decode().replace(old, new))(file))


NAMES = ("check", "plain.safetensors", "--names", "FILE")
SOUND = make.npy(np.zeros(3, np.float32))
DEEP = make.nested(100_000)

TABLE: dict[str, Row] = {
    # -- what is no file
    "a FIFO": Row(make.fifo, "is a FIFO — expected a file"),
    "a FIFO called .h5": h5(make.fifo, "is a FIFO"),
    "a socket": Row(make.unix_socket, "is a socket"),
    "a device": Row(make.device, "is a device"),
    "a link to itself": Row(make.loop, "does not exist"),
    "a directory of directories": Row(make.within(lambda p: p.mkdir(), "a.npy"), "a.npy: is a directory", "port"),
    "a FIFO in a folder": Row(make.within(make.fifo, "a.npy"), "a.npy: is a FIFO", "port"),
    "a FIFO as parity.json": Row(
        make.after(make.folder(a__npy=SOUND), make.within(make.fifo, "parity.json")), "parity.json: is a FIFO", "port"
    ),
    "a FIFO as name map": Row(make.fifo, "is a FIFO", "names.json", NAMES),
    "a FIFO as prompt": Row(make.fifo, "FIFO", "text", ("diff", "--prompt-file", "FILE")),
    "a FIFO as token ids": Row(make.fifo, "FIFO", "ids", ("diff", "--tokens", "FILE")),
    "a device as prompt": Row(make.device, "device", "text", ("diff", "--prompt-file", "FILE")),
    "a FIFO as report": Row(make.fifo, "FIFO", "report.json", ("report", "FILE")),
    "a FIFO as candidate": Row(make.fifo, "FIFO", "port.py", ("diff", "--tokens", "1", "-c", "port.py:load")),
    "a device as report": Row(make.device, "device", "report.json", ("report", "FILE")),
    # -- safetensors
    "a header of an exabyte": Row(make.raw({}, length=1 << 60), "is not safetensors"),
    "a header longer than its file": Row(make.raw({}, length=1 << 20), "is truncated"),
    "a sparse header of 90 MB": Row(
        make.sparse((90_000_000).to_bytes(8, "little") + b"{", 1 << 34), "a header that is not JSON"
    ),
    "a tensor of 16 GB in 132 bytes": Row(make.one(shape=[HUGE], end=4 * HUGE), "is truncated"),
    "a header nested deeply": Row(make.raw(DEEP), "nested more than 32 deep"),
    "a table nested deeply": Row(make.raw({"a": {"b": [[[[]]]]}} | {"c": 1}), "is not safetensors — found 'a'"),
    "metadata nested deeply": Row(make.metadata(token_ids=DEEP.decode()), "'parity.token_ids' is not JSON — nested"),
    "a tensor named twice": Row(
        make.raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}'), "'a' is there twice"
    ),
    "overlapping tensors": Row(make.raw({"a": make.tensor(), "b": make.tensor()}), "'a' and 'b' overlap"),
    "offsets that run backwards": Row(make.one(begin=8, end=0), "has the wrong size"),
    "offsets behind the end": Row(make.one(begin=1 << 50, end=(1 << 50) + 8), "is truncated"),
    "offsets below zero": Row(make.one(begin=-8, end=0), "is not safetensors"),
    "a negative size": Row(make.one(shape=[-2, -1]), "is not safetensors"),
    "a shape that is no list": Row(make.one(shape="2"), "is not safetensors"),
    "sizes that are true": Row(make.one(shape=[True, 2]), "is not safetensors"),
    "a hundred axes": Row(make.one(shape=[1] * 99 + [2]), "on at most 16 axes"),
    "a size beyond counting": Row(make.one(shape=[0, 1 << 70], end=0), "has the shape (0, 1180591620717411303424)"),
    "an unknown dtype": Row(make.one(dtype="F4_E2M1"), "has dtype F4_E2M1"),
    "a dtype that is a list": Row(make.one(dtype=["F32"]), "is not safetensors"),
    "a dtype of a megabyte": Row(make.one(dtype="F" * 1_000_000), "has dtype FFFF"),
    "a dtype that commands the terminal": Row(make.one(dtype=ESCAPES), "has dtype \\x1b]0;owned\\x07\\x1b"),
    "a name that commands the terminal": Row(make.raw({ESCAPES: 3}), "is not safetensors"),
    "a key that commands the terminal": Row(make.metadata(**{ESCAPES: "x"}), "unknown metadata"),
    "token ids that are text": Row(make.metadata(token_ids='["1\\u001b[2J"]'), "token ids are not"),
    "token ids that are infinite": Row(make.metadata(token_ids="[[Infinity]]"), "token ids are not integers"),
    "token ids of ten thousand digits": Row(make.metadata(token_ids=f"[[{'9' * 10_000}]]"), "is not JSON"),
    "five million token ids": Row(make.metadata(token_ids=f"[[{'1,' * 5_000_000}1]]"), "token ids are too many"),
    "a text of invalid UTF-8": Row(make.raw(b'{"\xff\xfe": 1}'), "a header that is not JSON"),
    "a lone surrogate": Row(make.raw(b'{"\\ud800": 1}'), "found '\\ud800' as 1"),
    # -- HDF5
    "a link into another file": h5(
        make.created(lambda s: s.__setitem__("lm_head", h5py.ExternalLink("secret.h5", "/lm_head"))),
        "found a link into another file",
    ),
    "a soft link out": h5(
        make.created(lambda s: s.__setitem__("lm_head", h5py.SoftLink("/elsewhere"))), "found a soft link"
    ),
    "an index in another file": h5(
        make.archive(make.put("index", h5py.ExternalLink("secret.h5", "/index")), outside=True),
        "found a link into another file",
    ),
    "sites in another file": h5(
        make.archive(make.put("sites", h5py.ExternalLink("secret.h5", "/")), outside=True),
        "found a link into another file",
    ),
    "external storage": h5(make.created(make.external), "found external storage"),
    "a virtual dataset": h5(make.created(make.virtual), "found a virtual dataset"),
    "16 GB in a few kilobytes": h5(make.created(make.bomb, [HUGE]), f"needs {4 * HUGE} bytes of memory"),
    "16 GB of which nothing is stored": h5(
        make.created(lambda s: s.create_dataset("lm_head", (HUGE,), "<f4", chunks=(1 << 20,)), [HUGE]),
        "the file stores 0 for it",
    ),
    "16 GB contiguous and absent": h5(
        make.created(lambda s: s.create_dataset("lm_head", (HUGE,), "<f4"), [HUGE]), "the file stores 0 for it"
    ),
    "a text of 1 GB": h5(make.archive(make.giant_text), "its 'run' is not text"),
    "a run that is numbers": h5(make.archive(make.put("run", np.zeros(3))), "its 'run' is not text"),
    "an index nested deeply": h5(make.archive(make.put("index", DEEP.decode())), "its 'index' is damaged"),
    "a site that is a group": h5(make.created(lambda s: s.create_group("lm_head")), "is not a dataset"),
    "big-endian numbers": h5(make.created(lambda s: s.create_dataset("lm_head", (1000,), ">f4")), "found >f4"),
    "an index of negative sizes": h5(make.index(shape=[-1000]), "has the shape (-1000,)"),
    "an index of sizes in text": h5(make.index(shape="1000"), "has the shape ('1', '0', '0', '0')"),
    "an index of an unknown dtype": h5(make.index(dtype="float12\x1b[2J"), "has dtype float12\\x1b[2J"),
    "an index of a dtype that is a table": h5(make.index(dtype={}), "has dtype {}"),
    "an index of nameless axes": h5(make.index(dims=[3]), "not all are text"),
    "an index that climbs": h5(
        make.archive(make.put("index", '{"../run": {"dims": null, "shape": [], "dtype": "float32"}}')),
        "has lost 1 sites",
    ),
    "a format that is a table": h5(attribute("parity_format", np.zeros(9)), "has format"),
    "a producer that is a list": h5(said('"producer": null', '"producer": [1]'), "the run's producer is not text"),
    "half of an archive": h5(make.after(make.archive(lambda _f: None), make.halved), "is truncated"),
    # -- numpy
    "100 MB in 100 kB": Row(make.zeros(100), "of memory — the file stores", "port.npz"),
    "an array named twice": npz("'a' is there twice", ("a.npy", SOUND), ("a.npy", SOUND)),
    "an encrypted array": Row(make.edited_zip, "encrypted", "port.npz"),
    "an array that claims 16 GB": npz("is truncated", ("a.npy", make.header("<f4", (HUGE,)))),
    "an array of negative size": npz("is truncated", ("a.npy", make.header("<f4", (-3,)))),
    "big-endian in npz": npz("is big-endian", ("a.npy", make.npy(np.zeros(3, ">f4")))),
    "a dtype that is code": npz("is not a whole npy array", ("a.npy", make.header("__import__('os')", (3,)))),
    "a header nested like code": npz(
        "is not a whole npy array", ("a.npy", b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000)
    ),
    "pickled objects": npz("pickled Python objects", ("a.npy", make.header("|O", (3,)))),
    "records": npz("bits without a meaning", ("a.npy", make.npy(np.zeros(3, [("x", "<f4"), ("y", "<f8")])))),
    "a name that commands": npz("is not a whole npy array", (f"{ESCAPES}.npy", b"not numpy")),
    "a folder of 16 GB": folder("is truncated", a__npy=make.header("<f4", (HUGE,))),
    "a folder's parity.json nested": folder("parity.json: is not JSON", a__npy=SOUND, parity__json=DEEP),
    # -- name maps
    "a name map nested deeply": names(DEEP, "is not a name map — not JSON: nested more than 32 deep"),
    "a name map with a name twice": names(b'{"a": "b", "a": "c"}', "'a' is there twice"),
    "a name map of no names": names(b'{"a": {"split": [["x"]]}}', "maps to nothing usable"),
    "sizes beyond counting": names(b'{"lm_head": {"split": ["a"], "sizes": [%d]}}' % 10**30, "cannot be split"),
    # -- checkpoints
    "a config nested deeply": model(make.model_with("config.json", make.content(DEEP)), "not readable as JSON (nested"),
    "a config that is a list": model(make.model_with("config.json", make.content(b"[]")), "a JSON object is expected"),
    "a tokenizer that is a FIFO": model(make.model_with("tokenizer.json", make.fifo), "tokenizer.json in"),
    "weights that are a FIFO": model(make.model_with("model.safetensors", make.fifo), "is a FIFO"),
    "weights outside of the directory": model(
        make.model_with("model.safetensors.index.json", make.content(b'{"weight_map": {"a": "../../etc/passwd"}}')),
        "names the file '../../etc/passwd'",
    ),
    "a weight map of numbers": model(
        make.model_with("model.safetensors.index.json", make.content(b'{"weight_map": {"a": 3}}')), "names the file 3"
    ),
    "quantized weights": model(
        make.model(quantization_config={"quant_method": "gptq"}), "quantized (quant_method 'gptq')"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_each_gets_one_line(tmp_path: Path, case: str) -> None:
    row = TABLE[case]
    write_safetensors(tmp_path / "plain.safetensors", {"lm_head": np.zeros(2)}, {})
    row.build(tmp_path / row.name)
    ran = forked(tmp_path, *(row.name if word == "FILE" else word for word in row.command))
    assert ran.code == 2, ran
    assert ran.out == "", ran
    assert ran.err.startswith("parity: "), ran
    assert ran.err.count("\n") == 1, ran
    assert ran.err.endswith("\n"), ran
    assert row.line in ran.err, ran
    assert "internal error" not in ran.err, ran
    assert "Traceback" not in ran.err, ran
    assert ran.err[:-1].isprintable(), ran
    assert len(ran.err) < 1500, ran
    assert ran.memory < MEMORY, ran


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 60


# -- a command in a process of its own, under limits --------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What a command left behind; `memory` is how many bytes more than its parent it held at most."""

    code: int
    out: str
    err: str
    memory: int


def forked(folder: Path, *arguments: str) -> Ran:
    """Run parity in a fork of this process, which has imported all that is needed."""
    streams = [folder / "stdout", folder / "stderr"]
    before = resident()
    sys.stdout.flush()
    with warnings.catch_warnings(action="ignore"):  # of threads: the child starts none and waits for none
        child = os.fork()
    if child == 0:
        _become_parity(folder, arguments, streams)
    _, status, usage = wait(child)
    out, err = (stream.read_text(errors="surrogateescape") for stream in streams)
    return Ran(os.waitstatus_to_exitcode(status), out, err, usage.ru_maxrss * 1024 - before)


def _become_parity(folder: Path, arguments: tuple[str, ...], streams: list[Path]) -> None:
    code = 99
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, stream in enumerate(streams, 1):
            os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False)) for number in (1, 2))
        os.chdir(folder)
        sys.argv = ["parity", *arguments]
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> tuple[int, int, resource.struct_rusage]:
    """Wait for a child, and end it after a while."""
    ended = os.pidfd_open(child)
    try:
        if not select.select([ended], [], [], SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(ended)
    return os.wait4(child, 0)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture(autouse=True, scope="module")
def _on_linux() -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("limits of memory are those of Linux")


@pytest.fixture(autouse=True, scope="module")
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Both commands once in this process, so that no fork has to import what they use."""
    folder = tmp_path_factory.mktemp("imported")
    write_safetensors(folder / "plain.safetensors", {"lm_head": np.zeros(2)}, {})
    streams = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with pytest.MonkeyPatch.context() as patch, streams[0], streams[1]:
        patch.chdir(folder)
        for command in ("check plain.safetensors --names nowhere.json", "diff --tokens 1 --model nowhere"):
            patch.setattr(sys, "argv", ["parity", *command.split()])
            with pytest.raises(SystemExit):
                main()


# -- what has no file of its own -----------------------------------------------------------------------------


@pytest.mark.parametrize("stars", [20, 400])
def test_many_stars_are_answered_at_once(tmp_path: Path, stars: int) -> None:
    pattern, name = "*" * stars + "x", "1" * 300
    write_safetensors(tmp_path / "port.safetensors", {name: np.zeros(2)}, {"parity.dims": f'{{"{pattern}": "a"}}'})
    (tmp_path / "names.json").write_text(f'{{"{pattern}": "{pattern}"}}')
    start = time.monotonic()
    with open_dump(tmp_path / "port.safetensors", tmp_path / "names.json") as dump:
        assert list(dump.entries) == [name]
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_comes_back_bit_by_bit(tmp_path: Path, kind: str) -> None:
    patterns = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, kind)).reshape(2, 2, 64)
    with ArchiveWriter(tmp_path / "a.h5", RunInfo()) as writer:
        writer.add("site", patterns, None)
    write_safetensors(tmp_path / "a.safetensors", {"site": patterns}, {})
    np.savez(tmp_path / "a.npz", site=patterns.view("V1"), **{"parity.dtype": np.array(kind)})
    for name in ("a.h5", "a.safetensors", "a.npz"):
        with open_dump(tmp_path / name) as dump:
            assert dump.entries["site"].dtype == kind
            assert dump.read("site").dtype == patterns.dtype
            assert dump.read("site").tobytes() == patterns.tobytes()


def test_what_a_terminal_obeys_is_spelt_out() -> None:
    assert printable("plain — text") == "plain — text"
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert printable(ESCAPES) == "\\x1b]0;owned\\x07\\x1b[2J\\u202e\\u200b\\x9b31m"
    assert printable("\ud800") == "\\ud800"
