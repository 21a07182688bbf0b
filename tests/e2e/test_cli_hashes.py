"""`parity record --hash` and `parity diff` of two such files: the same bits, or where they part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from parity.api import record
from parity.dump import open_dump, write_safetensors
from parity.dump.hashes import open_hashes, row_hashes
from parity.errors import DumpError
from tests.conftest import Ran

TOKENS = "5 17 99 4 150 23 8 61 77 120 31"
# The second run of this module is not the first: one number of token 6 is rounded the other way.
_UNSTEADY = """
from pathlib import Path
import torch
from impl.qwen3 import load as plain

class Unsteady(torch.nn.Module):
    ran = Path(__file__).with_name("ran")

    def forward(self, x):
        x = torch.nn.functional.silu(x)
        if self.ran.exists():
            x[0, 6, 3] *= 1 + torch.finfo(x.dtype).eps
        self.ran.touch()
        return x

def load(model_dir, dtype, device):
    model = plain(model_dir, dtype, device)
    model.model.layers[1].mlp.act_fn = Unsteady()
    return model
"""


@pytest.fixture(scope="module")
def folder(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hashes of the same run twice, of the reference, of an unsteady module twice, and a dump."""
    folder = tmp_path_factory.mktemp("hashes")
    (folder / "port.py").write_text(_UNSTEADY)
    run = {"model": str(small), "tokens": TOKENS}
    for name in ("once", "again"):
        record(folder / f"{name}.safetensors", "hf:", hashed=True, **run)
    record(folder / "reference.safetensors", hashed=True, **run)
    record(folder / "reference.h5", **run)
    for name in ("first", "second"):
        record(folder / f"{name}.safetensors", f"{folder / 'port.py'}:load", hashed=True, **run)
    for name in ("chunks", "chunks_again"):
        record(folder / f"{name}.safetensors", "hf:", hashed=True, chunks="6,4", decode=1, **run)
    return folder


@pytest.mark.slow
def test_two_runs_of_a_steady_module_have_the_same_bits(cli: Callable[..., Ran], folder: Path) -> None:
    ran = cli("diff", folder / "once.safetensors", folder / "again.safetensors")
    assert (ran.code, ran.out.split("  ")[0]) == (0, "MATCH")
    hashes = open_hashes(folder / "once.safetensors")
    assert f"the same bits at all {len(hashes.entries)} sites" in ran.out
    assert len(hashes.entries) > 30


@pytest.mark.slow
def test_an_unsteady_operation_is_told_with_its_first_token(cli: Callable[..., Ran], folder: Path) -> None:
    ran = cli("diff", folder / "first.safetensors", folder / "second.safetensors", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["verdict"]) == (1, "diverged")
    assert found["parted"][0] | {"of": 0} == {
        "site": "model.layers.1.mlp.act_fn",
        "call": None,
        "first_token": 6,
        "place": "axis 0: 0, token 6",
        "rows": 1,
        "of": 0,
        "kinds": "",
    }
    # What comes after it differs too, and nothing before token 6 does.
    assert {p["first_token"] for p in found["parted"]} == {6}
    assert [p["site"] for p in found["parted"]][-2:] == ["lm_head", "returned logits"]
    assert found["differences"] == []
    said = " ".join(cli("diff", folder / "first.safetensors", folder / "second.safetensors").out.split())
    assert "the first is model.layers.1.mlp.act_fn: 1 of 11 rows, from axis 0: 0, token 6" in said


@pytest.mark.slow
def test_other_runs_say_how_they_differ(cli: Callable[..., Ran], folder: Path) -> None:
    ran = cli("diff", folder / "chunks.safetensors", folder / "chunks_again.safetensors")
    assert (ran.code, ran.out.split("  ")[0]) == (0, "MATCH")
    ran = cli("diff", folder / "once.safetensors", folder / "chunks.safetensors")
    assert (ran.code, ran.err.count("\n"), "are runs on other calls" in ran.err) == (2, 1, True)


@pytest.mark.slow
def test_sites_of_one_run_alone_are_no_match(cli: Callable[..., Ran], folder: Path) -> None:
    ran = cli("diff", folder / "reference.safetensors", folder / "once.safetensors")
    # The module's sites have the reference's bits; what it returned is a site that the reference has not.
    assert (ran.code, "only the second has returned logits" in ran.out) == (2, True)
    assert ran.out.startswith("INCONCLUSIVE  the same bits at ")


@pytest.mark.slow
def test_a_dump_beside_hashes_is_one_line(cli: Callable[..., Ran], folder: Path) -> None:
    hashed, dump = folder / "reference.safetensors", folder / "reference.h5"
    for files in ((hashed, dump), (dump, hashed)):
        ran = cli("diff", *files)
        assert (ran.code, ran.err.count("\n")) == (2, 1)
        assert f"parity record --hash --candidate {dump} -o HASHES.safetensors" in ran.err
    for command in (("diff", hashed), ("check", hashed), ("diff", "--candidate", hashed)):
        ran = cli(*command)
        assert (ran.code, ran.err.count("\n"), "holds hashes of bits, no activations" in ran.err) == (2, 1, True)
    ran = cli("record", "--hash", "-p", "x", "-o", folder / "x.h5")
    assert (ran.code, "hashes are written as safetensors" in ran.err) == (2, True)


@pytest.mark.slow
def test_the_hashes_of_a_dump_are_those_of_its_run(cli: Callable[..., Ran], folder: Path, small: Path) -> None:
    out = folder / "of_dump.safetensors"
    ran = cli("record", "--hash", "--candidate", folder / "reference.h5", "-m", small, "--tokens", TOKENS, "-o", out)
    assert ran.code == 0
    ran = cli("diff", out, folder / "reference.safetensors")
    assert (ran.code, ran.out.split("  ")[0]) == (0, "MATCH")
    assert out.stat().st_size < (folder / "reference.h5").stat().st_size / 3


def test_a_hash_is_of_bits(tmp_path: Path) -> None:
    zeros = np.array([[0.0, 1.0], [-0.0, 1.0]], np.float32)
    one, other = row_hashes(zeros)
    assert one != other
    assert row_hashes(zeros[:1]) == one
    assert row_hashes(np.float32(3.0)).shape == ()
    assert row_hashes(np.zeros((2, 0, 3), np.float32)).shape == (2, 0)
    damaged = tmp_path / "damaged.safetensors"
    write_safetensors(damaged, {"lm_head": np.zeros(3, np.int64)}, {"parity.hashes": '{"run": 3}'})
    with pytest.raises(DumpError, match="its hashes are damaged"):
        open_hashes(damaged)
    with pytest.raises(DumpError, match="holds hashes"):
        open_dump(damaged)
