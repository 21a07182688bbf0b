"""Open a dump of any format."""

from __future__ import annotations

from pathlib import Path

from parity.dump.archive import open_archive
from parity.dump.files import reading, require_file
from parity.dump.names import load_names, rename
from parity.dump.npy import open_npy_folder, open_npz
from parity.dump.records import Dump
from parity.dump.safetensors import open_safetensors
from parity.errors import DumpError

HDF5 = b"\x89HDF\r\n\x1a\n"
ZIP = b"PK"
HINTS = {
    b"\x93NUMPY": "a single .npy: put one for each site into a folder and name the folder",
    b"GGUF": "a GGUF: that is a model; dump its activations",
}
OPENERS = {".h5": open_archive, ".hdf5": open_archive, ".safetensors": open_safetensors, ".npz": open_npz}


def open_dump(path: Path | str, names: Path | str | None = None) -> Dump:
    """Open a dump: HDF5, safetensors, npz or a folder of .npy, told apart by content, then by suffix.

    `names` is a name map (see parity.dump.names), applied after the one that the dump may carry itself.
    """
    table = None if names is None else load_names(names)
    dump = _open(Path(path))
    if table is None:
        return dump
    try:
        return rename(dump, table)
    except BaseException:
        dump.close()
        raise


def _open(path: Path) -> Dump:
    if path.is_dir():
        return open_npy_folder(path)
    require_file(path)
    with reading(path), path.open("rb") as file:
        start = file.read(16)
    if start.startswith(HDF5):
        return open_archive(path)
    if start.startswith(ZIP):
        return open_npz(path)
    if start[8:9] == b"{":
        return open_safetensors(path)
    if path.suffix in OPENERS:
        return OPENERS[path.suffix](path)
    hint = next((hint for magic, hint in HINTS.items() if start.startswith(magic)), f"a file that begins {start!r}")
    raise DumpError(f"{path}: is not a dump — found {hint} — parity opens HDF5, safetensors, npz, folders of .npy")
