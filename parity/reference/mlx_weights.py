"""The weights of an MLX model: safetensors in which a quantized matrix is packed, with a scale and a start per group.

    weight (out, in) = scales (out, group) * integers (out, in) + biases (out, group)

The integers lie in uint32 with the lowest bits first; how many bits and how large a group, config.json says under
`quantization`, for all matrices or for one by its name. Names are those of transformers.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity.errors import ModelError
from parity.reference.checkpoint import first_sentence
from parity.reference.grids import PLAIN, Grid, rounded
from parity.reference.packed import unpacked
from parity.untrusted import parse_json

_BITS = (2, 3, 4, 5, 6, 8)


class MlxWeights:
    """A folder that mlx_lm wrote, as the weights of a model. Raises ModelError if it cannot be read."""

    are_all = True

    def __init__(self, path: Path) -> None:
        self.name = f"mlx:{path}"
        files = sorted(path.glob("*.safetensors"))
        if not files or not (path / "config.json").is_file():
            raise ModelError(f"weights {self.name}: no config.json with *.safetensors. Give the folder that MLX reads.")
        try:
            config = parse_json((path / "config.json").read_bytes(), unique=False)
            self._files = {key: file for file in files for key in _keys(file)}
        except Exception as error:  # of any kind, for the files may hold anything
            raise ModelError(f"weights {self.name}: not readable as MLX ({first_sentence(error)}).") from error
        self._settings: Any = config.get("quantization") if isinstance(config, dict) else None

    def format(self, name: str) -> str:
        """How a tensor is kept, by its name in transformers (`int4/64`); empty if there is none of it."""
        if self._is_packed(name):
            bits, group = self._of(name)
            return f"int{bits}/{group}"
        return PLAIN.get(self._read(name).dtype, "other") if name in self._files else ""

    def grid(self, name: str) -> Grid | None:
        """The grid of a quantized tensor."""
        if not self._is_packed(name):
            return None
        bits, group = self._of(name)
        steps = 2**bits - 1
        # Step and start are rounded to a dtype; the start lies up to all steps from zero, and so does the last number.
        dtype = self._read(_beside(name, "scales")).dtype
        return Grid(group, steps, ranged=True, allowed=0.75 + steps * torch.finfo(dtype).eps)

    def as_kept(self, name: str, stored: Tensor) -> Tensor | None:
        """`stored` numbers (…) as a tensor that is not quantized has them, (…); None for a quantized one."""
        return rounded(self.format(name), stored)

    def tensor(self, name: str) -> Tensor | None:
        """A tensor by its name in transformers, read back to float32, (out, in) for a matrix; None if there is none.

        Raises ModelError where its parts do not fit together.
        """
        if name not in self._files:
            return None
        stored = self._read(name)
        if not self._is_packed(name):
            return stored.float()
        bits, group = self._of(name)
        scales, starts = (self._read(_beside(name, end)).float() for end in ("scales", "biases"))
        whole = unpacked(stored.view(torch.uint8), bits) if stored.dtype is torch.uint32 and stored.dim() == 2 else None
        if whole is None or scales.shape != starts.shape or whole.shape != (len(scales), scales.shape[-1] * group):
            found = ", ".join(str(tuple(x.shape)) for x in (stored, scales, starts))
            raise ModelError(
                f"weights {self.name}: {name}, scales and biases have shapes {found}, which are not {bits} bits by "
                f"{group}, as config.json says. Convert the model again."
            )
        blocks = whole.reshape(*scales.shape, group).float()
        return (scales[..., None] * blocks + starts[..., None]).reshape(whole.shape)

    def _is_packed(self, name: str) -> bool:
        return name in self._files and _beside(name, "scales") in self._files

    def _of(self, name: str) -> tuple[int, int]:
        """The bits and the group of a matrix."""
        general = self._settings if isinstance(self._settings, dict) else {}
        own = general.get(name.removesuffix(".weight"))
        said = general | own if isinstance(own, dict) else general
        bits, group, mode = said.get("bits"), said.get("group_size"), said.get("mode", "affine")
        known = mode == "affine" and _beside(name, "biases") in self._files
        if not known or not isinstance(bits, int) or bits not in _BITS or not isinstance(group, int) or group < 1:
            raise ModelError(
                f"weights {self.name}: {name} is kept in mode {mode!r:.20}, bits {bits!r:.20}, group {group!r:.20}, "
                "which is not read. Give one that is quantized in mode 'affine'."
            )
        return bits, group

    def _read(self, key: str) -> Tensor:
        from safetensors import safe_open

        with ExitStack() as stack:
            tensor: Tensor = stack.enter_context(safe_open(self._files[key], framework="pt")).get_tensor(key)
            return tensor


def _beside(name: str, end: str) -> str:
    return f"{name.removesuffix('.weight')}.{end}"


def _keys(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as shard:
        return list(shard.keys())
