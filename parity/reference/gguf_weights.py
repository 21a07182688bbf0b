"""The weights of a GGUF, dequantized one tensor at a time, under the names that transformers gives them.

llama.cpp's converter changes some tensors of some architectures, which is undone here:

| architecture | what it changes |
|---|---|
| llama (Mistral too) | rows of the q and k projections: a head's two halves become pairs |
| gemma, gemma2, gemma3, nemotron | 1 is added to the weights of norms, which transformers adds when it computes |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity.errors import ModelError
from parity.reference.checkpoint import first_sentence
from parity.reference.grids import GGML, Grid, rounded

_SAME_TENSORS = ("phi3", "qwen2", "qwen3", "starcoder2")
_PAIRED = ("llama",)
_RAISED = ("gemma", "gemma2", "gemma3", "nemotron")
_KNOWN = (*_SAME_TENSORS, *_PAIRED, *_RAISED)
_ENDS = (".weight", ".bias")
# A projection's name in the file → where the metadata say how many heads it has.
_HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


class GgufWeights:
    """A GGUF as the weights of a model. Raises ModelError if it cannot be read, or is of an unknown architecture."""

    are_all = True

    def __init__(self, path: Path) -> None:
        self.name = f"gguf:{path}"
        try:
            import gguf
        except ImportError as error:
            raise ModelError(f"weights {self.name}: gguf is not installed. pip install 'parity[gguf]'.") from error
        try:
            reader: Any = gguf.GGUFReader(path)
            self._architecture = str(reader.get_field("general.architecture").contents())
            layers = self._number(reader, "block_count")
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            paired = _HEADS if self._architecture in _PAIRED else {}
            self._heads = {module: self._number(reader, key) for module, key in paired.items()}
        except Exception as error:  # of any kind, for the file may hold anything
            raise ModelError(f"weights {self.name}: not readable as GGUF ({first_sentence(error)}).") from error
        if self._architecture not in _KNOWN:
            known = ", ".join(_KNOWN)
            raise ModelError(
                f"weights {self.name}: of architecture {self._architecture!r:.40}, which is none of {known}."
            )
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(kinds[self._architecture], layers)

    def format(self, name: str) -> str:
        """The format of a tensor by its name in transformers (`Q4_K`); empty if the file has none of it."""
        found = self._find(name)
        return "" if found is None else str(found.tensor_type.name)

    def grid(self, name: str) -> Grid | None:
        """The grid of a quantized tensor; None for formats of which nothing is known."""
        return GGML.get(self.format(name))

    def as_kept(self, name: str, stored: Tensor) -> Tensor | None:
        """`stored` numbers (…) as a tensor that is not quantized has them, (…); None for a quantized one."""
        offset = self._offset(self._find(name).name)
        kept = rounded(self.format(name), stored + offset)
        return None if kept is None else kept - offset

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
        return self._as_in_transformers(found.name, torch.from_numpy(numbers))

    def _as_in_transformers(self, own: str, numbers: Tensor) -> Tensor:
        """What the converter has changed, changed back."""
        heads = self._heads.get(own.split(".")[-2], 0)
        if not heads:
            return numbers - self._offset(own)
        if numbers.shape[0] % (2 * heads):
            raise ModelError(f"weights {self.name}: {own} has {numbers.shape[0]} rows, which are not {heads} heads.")
        return numbers.reshape(heads, -1, 2, *numbers.shape[1:]).transpose(1, 2).reshape(numbers.shape)

    def _offset(self, own: str) -> int:
        """What the converter has added to all numbers of a tensor."""
        return int(self._architecture in _RAISED and own.endswith("norm.weight"))

    def _number(self, reader: Any, key: str) -> int:
        return int(reader.get_field(f"{self._architecture}.{key}").contents())

    def _find(self, name: str) -> Any:
        own = self._names.get_name(name, try_suffixes=_ENDS)
        return None if own is None else self._tensors.get(own)
