"""The weights of a GGUF, dequantized one tensor at a time, under the names that transformers gives them.

Only architectures whose tensors llama.cpp keeps as they are: others permute or shift some of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity.errors import ModelError
from parity.reference.checkpoint import first_sentence

_SAME_TENSORS = ("qwen2", "qwen3")
_ENDS = (".weight", ".bias")


class GgufWeights:
    """A GGUF as the weights of a model. Raises ModelError if it cannot be read, or is of an unknown architecture."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = f"gguf:{path}", path
        try:
            import gguf
        except ImportError as error:
            raise ModelError(f"weights {self.name}: gguf is not installed. pip install 'parity[gguf]'.") from error
        try:
            reader: Any = gguf.GGUFReader(path)
            architecture = str(reader.get_field("general.architecture").contents())
            layers = int(reader.get_field(f"{architecture}.block_count").contents())
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # of any kind, for the file may hold anything
            raise ModelError(f"weights {self.name}: not readable as GGUF ({first_sentence(error)}).") from error
        if architecture not in _SAME_TENSORS:
            known = ", ".join(_SAME_TENSORS)
            raise ModelError(f"weights {self.name}: of architecture {architecture!r:.40}, but only {known} are known.")
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(kinds[architecture], layers)

    def format(self, name: str) -> str:
        """The format of a tensor by its name in transformers (`Q4_K`); empty if the file has none of it."""
        found = self._find(name)
        return "" if found is None else str(found.tensor_type.name)

    def tensor(self, name: str) -> Tensor | None:
        """A tensor by its name in transformers, dequantized to float32, (out, in) for a matrix; None if there is none.

        Raises ModelError for a format that the package `gguf` does not read.
        """
        from gguf.quants import dequantize

        found = self._find(name)
        if found is None:
            return None
        try:
            numbers = np.array(dequantize(found.data, found.tensor_type), dtype=np.float32)
        except Exception as error:  # a format that the package does not know
            raise ModelError(
                f"weights {self.name}: {name} in {found.tensor_type.name} is not read ({first_sentence(error)})."
            ) from error
        return torch.from_numpy(numbers)

    def _find(self, name: str) -> Any:
        own = self._names.get_name(name, try_suffixes=_ENDS)
        return None if own is None else self._tensors.get(own)
