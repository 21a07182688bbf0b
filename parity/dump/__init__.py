"""One recorded run on disk: parity's own HDF5 archive, and what ports in other languages write.

    with ArchiveWriter("ref.h5", info) as writer:
        writer.add("model.embed_tokens", array, ("batch", "token", "hidden"))

    with open_dump("port.safetensors") as dump:
        dump.info.token_ids, dump.entries["lm_head"].dims, dump.read("lm_head")

Arrays are numpy arrays; bfloat16 and float8 are the types of ml_dtypes. Bits in are bits out.
"""

from parity.dump.archive import ArchiveWriter, open_archive
from parity.dump.files import give_back
from parity.dump.names import NameMap, left_out, load_names, lookup, rename, sites_of
from parity.dump.npy import open_npy_folder, open_npz
from parity.dump.opening import open_dump
from parity.dump.records import DTYPES, Array, Dump, Entry, RunInfo
from parity.dump.safetensors import copy_as_safetensors, open_safetensors, write_safetensors
from parity.dump.tokens import write_tokens

__all__ = [
    "DTYPES",
    "ArchiveWriter",
    "Array",
    "Dump",
    "Entry",
    "NameMap",
    "RunInfo",
    "copy_as_safetensors",
    "give_back",
    "left_out",
    "load_names",
    "lookup",
    "open_archive",
    "open_dump",
    "open_npy_folder",
    "open_npz",
    "open_safetensors",
    "rename",
    "sites_of",
    "write_safetensors",
    "write_tokens",
]
