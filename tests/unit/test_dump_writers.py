"""The programs of dumps/README.md, as they stand there: compiled, run, and their dumps opened."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from parity.dump import ArchiveWriter, RunInfo, open_dump, write_tokens
from parity.dump.names import parse_names

README = Path(__file__).parents[2] / "dumps" / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(), re.DOTALL)
READER, PYTHON = [code for language, code in BLOCKS if language == "python"]
TOKENS = ((151643, 7, 11), (0, 3, 2))


def block(language: str) -> str:
    (code,) = [code for found, code in BLOCKS if found == language]
    return code


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def compiler(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def check(folder: Path, *program: object, producer: str) -> None:
    write_tokens(folder / "ref.tokens.txt", TOKENS)
    run(*program, folder / "ref.tokens.txt", folder / "port.safetensors")
    embedded = np.array(TOKENS, np.float32)[:, :, None] + np.float32(0.25) * np.arange(4, dtype=np.float32)
    with open_dump(folder / "port.safetensors") as dump:
        assert dump.info.token_ids == TOKENS
        assert dump.info.producer == producer
        assert list(dump.entries) == ["model.embed_tokens", "model.layers.0"]
        assert {entry.dims for entry in dump.entries.values()} == {("batch", "token", "hidden")}
        np.testing.assert_array_equal(dump.read("model.embed_tokens"), embedded)
        layer = dump.read("model.layers.0")
        assert layer.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(layer, (embedded / np.float32(3)).astype(ml_dtypes.bfloat16))


def test_python_writer(tmp_path: Path) -> None:
    (tmp_path / "port.py").write_text(PYTHON)
    check(tmp_path, sys.executable, tmp_path / "port.py", producer="port.py 1.0")


def test_c_writer(tmp_path: Path) -> None:
    source, program = tmp_path / "port.c", tmp_path / "port"
    source.write_text(block("c"))
    run(compiler("gcc"), "-std=c99", "-Wall", "-Wextra", "-Werror", source, "-o", program)
    check(tmp_path, program, producer="port.c 1.0")


def test_rust_writer(tmp_path: Path) -> None:
    source, program = tmp_path / "port.rs", tmp_path / "port"
    source.write_text(block("rust"))
    run(compiler("rustc"), "--edition=2021", "-Dwarnings", source, "-o", program)
    check(tmp_path, program, producer="port.rs 1.0")


def test_plain_h5py_reader(tmp_path: Path) -> None:
    info = RunInfo(producer="parity", model="tiny", token_ids=TOKENS)
    with ArchiveWriter(tmp_path / "ref.h5", info) as writer:
        writer.add("lm_head", np.ones((2, 3), ml_dtypes.bfloat16), ("batch", "vocab"))
    (tmp_path / "read.py").write_text(READER)
    lines = run(sys.executable, tmp_path / "read.py", tmp_path / "ref.h5").splitlines()
    assert lines == [
        "parity tiny [[151643, 7, 11], [0, 3, 2]]",
        "lm_head ['batch', 'vocab'] bfloat16 (2, 3) float32",
    ]


def test_the_name_map_is_one() -> None:
    names = parse_names(json.loads(block("json")), "README")
    assert names["blk.*.attn_qkv"].sizes == (2048, 1024, 1024)
