"""A kind of candidate of one's own, a folder of text files, made with what CONTRIBUTING.md says and nothing else."""

from pathlib import Path

import numpy as np
import pytest

import parity
from parity.candidates.base import KINDS, Candidate
from parity.dump import ArchiveWriter, Dump, open_dump
from parity.errors import CandidateError


class TextFolder(Candidate):
    def __init__(self, rest: str, options: dict[str, str], names: object) -> None:
        self.name, self.scale = rest, float(options.get("scale", 1))

    def record(self, run, sites, path: Path) -> Dump:  # type: ignore[no-untyped-def]
        with ArchiveWriter(path, run.info(self.name)) as writer:
            for site in sites:
                if (file := Path(self.name) / f"{site.name}.txt").is_file():
                    array = np.loadtxt(file, dtype=np.float32, ndmin=2)[None] * np.float32(self.scale)
                    writer.add(site.name, array, ("batch", "token", "hidden"))
        if not any(Path(self.name).glob("*.txt")):
            raise CandidateError(f"{self.name}: no text files. Write SITE.txt, a line for each token.")
        return open_dump(path)


def test_a_folder_of_text_files(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "text", f"{__name__}:TextFolder")
    asked = {"model": str(small), "tokens": "5 17 3", "dtype": "float32"}
    parity.record(tmp_path / "ref.h5", **asked)
    with open_dump(tmp_path / "ref.h5") as ref:
        for site in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"):
            np.savetxt(tmp_path / f"{site}.txt", ref.read(site)[0])
    assert parity.diff(f"text:{tmp_path}", **asked).verdict == "match"
    assert parity.diff(f"text:{tmp_path}?scale=1.01", **asked).findings[0].sites[0] == "model.embed_tokens"
