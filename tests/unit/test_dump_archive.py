"""The HDF5 archive: bits in are bits out, other tools can read it, a killed run leaves nothing whole."""

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from parity.dump import (
    DTYPES,
    ArchiveWriter,
    Array,
    Dump,
    Entry,
    RunInfo,
    give_back,
    open_archive,
    open_dump,
    open_safetensors,
    write_safetensors,
)
from parity.dump.files import Outlet
from parity.errors import DumpError

INFO = RunInfo(
    producer="parity 0.1.0",
    model="tiny-qwen3",
    fingerprint="abc",
    token_ids=((1, 2, 3), (4, 5, 6)),
    dtype="bfloat16",
    device="cpu",
    attention="eager",
    prompt="Grüße\0🙂",
    versions={"torch": "2.6"},
    created="2026-01-01T00:00:00Z",
    notes=("a note",),
)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Any bits in any dtype in any shape, in any memory order."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    raw = raw & 1 if dtype.kind == "b" else raw
    array = raw.view(dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


def every_pattern(dtype: str) -> Array:
    """All NaN payloads, both zeros, all subnormals: every bit pattern of a dtype of one or two bytes."""
    kind = DTYPES[dtype]
    return np.arange(256**kind.itemsize, dtype=f"<u{kind.itemsize}").view(kind)


def special(dtype: type[np.floating]) -> Array:
    bits = {np.float32: np.uint32, np.float64: np.uint64}[dtype]
    infinity = int(np.array(np.inf, dtype).view(bits))
    sign = 1 << (8 * np.dtype(dtype).itemsize - 1)
    patterns = [0, sign, 1, sign | 1, infinity, infinity + 1, infinity | 0x123, sign | infinity | 0x456]
    return np.array(patterns, bits).view(dtype)


def assert_same_bits(actual: Array, expected: Array) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=60, deadline=None)
@given(st.lists(arrays(), max_size=4))
def test_both_formats_keep_every_bit(values: list[Array]) -> None:
    tensors = {f"model.layers.{i}": value for i, value in enumerate(values)} | {"last": np.float32([1])}
    with tempfile.TemporaryDirectory() as folder:
        with ArchiveWriter(Path(folder, "a.h5"), INFO) as writer:
            for site, value in tensors.items():
                writer.add(site, value, None)
        write_safetensors(Path(folder, "a.safetensors"), tensors, {})
        for dump in (open_archive(Path(folder, "a.h5")), open_safetensors(Path(folder, "a.safetensors"))):
            with dump:
                assert list(dump.entries) == list(tensors)
                for site, value in tensors.items():
                    assert_same_bits(dump.read(site), value)
                    assert dump.entries[site] == Entry(site, None, value.shape, value.dtype.name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int16"])
def test_every_bit_pattern_survives(tmp_path: Path, dtype: str) -> None:
    with ArchiveWriter(tmp_path / "a.h5", INFO) as writer:
        writer.add("site", every_pattern(dtype), ("_",))
    assert_same_bits(open_archive(tmp_path / "a.h5").read("site"), every_pattern(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_payloads_zeros_and_subnormals_survive(tmp_path: Path, dtype: type[np.floating]) -> None:
    with ArchiveWriter(tmp_path / "a.h5", INFO) as writer:
        writer.add("site", special(dtype), ("_",))
    assert_same_bits(open_archive(tmp_path / "a.h5").read("site"), special(dtype))


def test_big_endian_arrays_keep_their_values(tmp_path: Path) -> None:
    array = np.arange(5, dtype=">i4")
    with ArchiveWriter(tmp_path / "a.h5", INFO) as writer:
        writer.add("site", array, ("_",))
    write_safetensors(tmp_path / "a.safetensors", {"site": array}, {})
    for name in ("a.h5", "a.safetensors"):
        assert_same_bits(open_dump(tmp_path / name).read("site"), np.arange(5, dtype="<i4"))


def test_info_dims_and_order_come_back(tmp_path: Path) -> None:
    with ArchiveWriter(tmp_path / "a.h5", INFO) as writer:
        for layer in (10, 9, 2):
            writer.add(f"model.layers.{layer}", np.zeros((2, 3, 4), np.float32), ("batch", "token", "hidden"))
    with open_dump(tmp_path / "a.h5") as dump:
        assert dump.info == INFO
        assert list(dump.entries) == ["model.layers.10", "model.layers.9", "model.layers.2"]
        assert dump.entries["model.layers.9"].dims == ("batch", "token", "hidden")
    assert leftovers(tmp_path) == ["a.h5"]


def test_an_empty_run_info_comes_back(tmp_path: Path) -> None:
    with ArchiveWriter(str(tmp_path / "a.h5"), RunInfo()) as writer:
        writer.add("site", np.zeros(1), None)
    assert open_dump(str(tmp_path / "a.h5")).info == RunInfo()


def test_plain_h5py_reads_the_right_numbers(tmp_path: Path) -> None:
    patterns = every_pattern("bfloat16")
    finite = patterns[np.isfinite(patterns.astype(np.float32))]
    with ArchiveWriter(tmp_path / "a.h5", INFO) as writer:
        writer.add("bf16", finite, ("_",))
        writer.add("int64", np.array([2**62 + 1]), ("_",))
        writer.add("flag", np.array([True, False]), ("_",))
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["sites"]["bf16"][()], finite.astype(np.float32))
        assert file["sites"]["bf16"].id.get_type().get_size() == 2
        assert file["sites"]["int64"][0] == 2**62 + 1
        assert file["sites"]["flag"][()].tolist() == [1, 0]


def test_read_gives_aligned_read_only_views_that_outlive_the_dump(tmp_path: Path) -> None:
    value = np.arange(7, dtype=np.float64)
    with ArchiveWriter(tmp_path / "a.h5", INFO) as writer:
        for size in range(1, 9):
            writer.add(f"odd{size}", np.zeros(size * 1001, np.int8), ("_",))
        writer.add("site", value, ("_",))
    with open_dump(tmp_path / "a.h5") as dump:
        arrays = {site: dump.read(site) for site in dump.entries}
    for array in arrays.values():
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable
        assert not array.flags.owndata
    np.testing.assert_array_equal(arrays["site"], value)
    dump.close()
    with pytest.raises(ValueError, match="closed dump"):
        dump.read("site")


def test_archives_that_other_tools_compressed_can_be_read(tmp_path: Path) -> None:
    patterns = every_pattern("bfloat16")
    with ArchiveWriter(tmp_path / "a.h5", INFO) as writer:
        writer.add("site", patterns, ("_",))
    with h5py.File(tmp_path / "a.h5", "a") as file:  # what h5repack does
        kind = file["sites"]["site"].id.get_type()
        del file["sites"]["site"]
        create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        create.set_chunk((1024,))
        create.set_deflate(1)
        space = h5py.h5s.create_simple(patterns.shape)
        dataset = h5py.h5d.create(file["sites"].id, b"site", kind, space, create)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, patterns.view(np.uint16), mtype=kind)
    array = open_dump(tmp_path / "a.h5").read("site")
    assert_same_bits(array, patterns)
    assert not array.flags.writeable


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def run() -> None:
        with ArchiveWriter(tmp_path / "a.h5", INFO) as writer:
            writer.add("site", np.zeros(3), ("_",))
            assert leftovers(tmp_path) == [f".a.h5.partial-{os.getpid()}@{socket.gethostname()}"]
            raise error("stop")

    with pytest.raises(error, match="stop"):
        run()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("nth", [0, 1, 2, 5])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_hdf5_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, number: signal.Signals
) -> None:
    """HDF5 writes while it opens, adds and flushes; an interrupt in any of its calls must not break it."""
    done: list[int] = []

    def write(self: Outlet, data: Any, /) -> int:
        if len(done) == nth:
            os.kill(os.getpid(), number)
        done.append(size := original(self, data))
        return size

    def run() -> None:
        with ArchiveWriter(tmp_path / "a.h5", INFO) as writer:
            for site in range(100):
                writer.add(f"site{site}", np.zeros(3), ("_",))

    original = Outlet.write
    monkeypatch.setattr(Outlet, "write", write)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert len(done) > nth
    assert leftovers(tmp_path) == []


def test_an_exception_leaves_the_previous_dump(tmp_path: Path) -> None:
    for run in range(2):
        try:
            with ArchiveWriter(tmp_path / "a.h5", INFO) as writer:
                writer.add("site", np.array([run]), ("_",))
                if run == 1:
                    raise InterruptedError
        except InterruptedError:
            pass
    assert open_dump(tmp_path / "a.h5").read("site").tolist() == [0]


KILLED = """
import os, signal, sys
import numpy as np
from parity.dump import ArchiveWriter, RunInfo
with ArchiveWriter(sys.argv[1], RunInfo(producer="killed")) as writer:
    for i in range(100):
        writer.add(f"model.layers.{i}", np.full(1000, i, np.float32), ("_",))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_a_visibly_incomplete_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a.h5"], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    (name,) = leftovers(tmp_path)
    assert name.startswith(".a.h5.partial-")
    with h5py.File(tmp_path / name) as file:  # what was flushed can still be looked at
        assert len(file["sites"]) >= 96
        assert file["sites"]["model.layers.50"][0] == 50
    with pytest.raises(DumpError, match=r"is incomplete — the run ended after \d+ sites or more"):
        open_dump(tmp_path / name)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """But not what a living process writes, another machine's process, or another recording's."""
    host, dead = socket.gethostname(), 2**22 + 1  # no Linux gives so high a number
    kept = {f".a.h5.partial-{os.getppid()}@{host}", f".a.h5.partial-{dead}@far", f".b.h5.partial-{dead}@{host}"}
    kept |= {f".a.h5.partial-1@{host}", f".a.h5.partial-x@{host}"}
    for name in kept | {f".a.h5.partial-{dead}@{host}", f".a.h5.partial-{dead + 10**30}@{host}"}:
        (tmp_path / name).touch()
    with ArchiveWriter(tmp_path / "a.h5", INFO):
        pass
    assert set(leftovers(tmp_path)) == kept | {"a.h5"}


FULL = """
import resource, signal, sys
import numpy as np
from parity.dump import ArchiveWriter, RunInfo
from parity.dump.files import Outlet
from parity.errors import DumpError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with ArchiveWriter(sys.argv[1], RunInfo()) as writer:
        for i in range(20):
            writer.add(str(i), np.zeros(5000, np.float32), ("_",))
except DumpError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="no file size limit to imitate a full disk with")
    command = [sys.executable, "-c", FULL, tmp_path / "a.h5"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "a.h5: cannot be written — " in done.stdout
    assert "File too large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert (done.returncode, done.stderr) == (0, "")
    assert leftovers(tmp_path) == []


def test_a_write_that_fails_at_any_moment_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Outlet):
        room = 0

        def write(self, data: Any, /) -> int:
            Full.room -= 1
            if Full.room < 0:
                self.error = OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def write() -> None:
        with ArchiveWriter(tmp_path / "a.h5", INFO) as writer:
            writer.add("one", np.ones(10), ("_",))
            writer.add("two", np.ones(100_000), ("_",))

    monkeypatch.setattr("parity.dump.archive.Outlet", Full)
    Full.room = 10_000
    write()
    needed = 10_000 - Full.room
    (tmp_path / "a.h5").unlink()
    for room in range(needed):
        Full.room = room
        with pytest.raises(DumpError, match=r"a\.h5: cannot be written — No space left on device — check"):
            write()
        assert leftovers(tmp_path) == []


def test_no_torch_is_loaded() -> None:
    code = "import parity.dump, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_a_dump_can_stand_in_memory() -> None:
    values = {"site": np.ones(2, ml_dtypes.bfloat16)}
    entries = {"site": Entry("site", ("hidden",), (2,), "bfloat16")}
    with Dump(Path("live"), RunInfo(), entries, values.__getitem__) as dump:
        assert repr(dump) == "Dump('live', 1 sites)"
        assert not dump.read("site").flags.writeable
    assert values["site"].flags.writeable


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what of a file is in memory")
def test_what_was_read_leaves_memory_and_can_be_read_again(tmp_path: Path) -> None:
    def resident() -> int:
        after = Path("/proc/self/smaps").read_text().partition(str(path))[2]
        return int(after.partition("Rss:")[2].split()[0])

    path, numbers = tmp_path / "a.h5", np.arange(1 << 20)
    with ArchiveWriter(path, RunInfo()) as writer:
        writer.add("a", numbers, None)
    with open_dump(path) as dump:
        array = dump.read("a")
        assert array.sum() == numbers.sum()
        before = resident()
        give_back(array)
        assert resident() < before / 2
        assert (array[::2] == numbers[::2]).all()
        give_back(numbers)  # what is no view of a file stays
