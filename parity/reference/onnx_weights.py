"""The weights of an ONNX graph as torch exports it, quantized by ONNX Runtime or not.

A matrix has no name of its own there: it is what the node that a module made multiplies with. Quantizers drop what the
export says of its nodes but keep the names of their results, so that the export tells whose a result is.

    MatMulInteger      (in, out) integers, a scale and a zero for each column or for all; two Mul nodes scale the sums
    DequantizeLinear   the same, before a MatMul or a Gather
    MatMulNBits        (out, block, packed), the lowest bits first; a scale and a zero for each block
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity.errors import ModelError
from parity.reference.checkpoint import first_sentence
from parity.reference.grids import PLAIN, Grid, rounded
from parity.reference.packed import unpacked

_SCOPES = "pkg.torch.onnx.name_scopes"
_BITS = 8  # of integers that are not packed


@dataclass(frozen=True)
class _Matrix:
    """The node that holds a weight, and the names of its integers, scales and zeros; or of plain numbers."""

    node: Any
    numbers: str
    scales: str = ""
    zeros: str = ""
    transposed: bool = True


class OnnxWeights:
    """A graph's weights under transformers' names; `names_from` is the export that it was made of.

    Raises ModelError if a file cannot be read, or if no node says which module made it.
    """

    are_all = True

    def __init__(self, path: Path, names_from: Path | None = None) -> None:
        self.name, self._folder = f"onnx:{path}", path.parent
        try:
            import onnx
        except ImportError as error:
            raise ModelError(f"weights {self.name}: onnx is not installed. pip install 'parity[onnx]'.") from error
        try:
            graph = onnx.load(path, load_external_data=False).graph
            export = onnx.load(names_from, load_external_data=False).graph if names_from else graph
            self._stored = {tensor.name: tensor for tensor in graph.initializer}
            modules = _modules(export)
        except Exception as error:  # of any kind, for the file may hold anything
            raise ModelError(f"weights {self.name}: not readable as ONNX ({first_sentence(error)}).") from error
        found = {f"{modules[value]}.weight": m for value, m in _matrices(graph, self._stored) if value in modules}
        if not found:
            raise ModelError(
                f"weights {self.name}: no product says which module made it. Give the export that the file was made "
                f"of, by torch.onnx.export(dynamo=True): --weights {self.name}?names_from=FILE."
            )
        self._found: dict[str, _Matrix] = {name: _Matrix(None, name, transposed=False) for name in self._stored} | found

    def format(self, name: str) -> str:
        """How a tensor is kept, by its name in transformers (`int8/row`); empty if there is none of it."""
        found = self._of(name)
        if found is None:
            return ""
        if not found.scales:
            return PLAIN.get(self._read(found.numbers).dtype, "other")
        bits, block, _ = self._layout(found)
        kind = "all" if self._is_shared(found) else "row" if self._is_by_row(found) else "column"
        return f"int{bits}/{block or kind}"

    def grid(self, name: str) -> Grid | None:
        """The grid of a quantized tensor; None where it has steps by its inputs."""
        found = self._of(name)
        if found is None or not found.scales or not (self._is_shared(found) or self._is_by_row(found)):
            return None
        bits, block, ranged = self._layout(found)
        steps = 2**bits - 1 if ranged else 2 ** (bits - 1) - (0 if block else 1)
        return Grid(block, steps, ranged, allowed=1.0, shared=self._is_shared(found))

    def as_kept(self, name: str, stored: Tensor) -> Tensor | None:
        """`stored` numbers (…) as a tensor that is not quantized has them, (…); None for a quantized one."""
        return rounded(self.format(name), stored)

    def tensor(self, name: str) -> Tensor | None:
        """A tensor by its name in transformers, read back to float32, (out, in) for a matrix; None if there is none.

        Raises ModelError where its parts do not fit together.
        """
        found = self._of(name)
        if found is None:
            return None
        numbers = self._read(found.numbers)
        try:
            if not found.scales:
                whole = numbers
            elif found.node.op_type == "MatMulNBits":
                return self._from_blocks(found, numbers)
            else:
                scales = self._read(found.scales).float()
                zeros = self._read(found.zeros).float() if found.zeros else torch.zeros(())
                scales, zeros = (x if x.numel() == 1 else x.unsqueeze(1 - _axis(found.node)) for x in (scales, zeros))
                whole = (numbers.float() - zeros) * scales
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(
                f"weights {self.name}: {name} has integers, scales and zeros that do not fit together "
                f"({first_sentence(error)}). Quantize the model again."
            ) from error
        return (whole.T if found.transposed and whole.dim() == 2 else whole).float().contiguous()

    def _from_blocks(self, found: _Matrix, packed: Tensor) -> Tensor:
        """(out, in) of (out, block, packed)."""
        said = _attributes(found.node)
        rows, columns, bits, block = (int(said[key]) for key in ("N", "K", "bits", "block_size"))
        blocks = -(-columns // block)
        whole = unpacked(packed.reshape(rows, -1), bits)[:, : blocks * block].float().reshape(rows, blocks, block)
        scales = self._read(found.scales).float().reshape(rows, blocks, 1)
        zeros = torch.full((1, 1, 1), 2.0 ** (bits - 1))
        if found.zeros:
            stored = self._read(found.zeros).reshape(rows, -1)
            zeros = (stored if stored.is_floating_point() else unpacked(stored, bits))[:, :blocks, None].float()
        return ((whole - zeros) * scales).reshape(rows, -1)[:, :columns].contiguous()

    def _layout(self, found: _Matrix) -> tuple[int, int, bool]:
        """Bits, numbers in a block (0 for a row) and whether the grid reaches from the least number to the largest."""
        if found.node.op_type == "MatMulNBits":
            said = _attributes(found.node)
            return int(said["bits"]), int(said["block_size"]), bool(found.zeros)
        ranged = bool(found.zeros) and bool(self._read(found.zeros).any())
        return _BITS, 0, ranged

    def _is_by_row(self, found: _Matrix) -> bool:
        return found.node.op_type == "MatMulNBits" or found.transposed == (_axis(found.node) == 1)

    def _is_shared(self, found: _Matrix) -> bool:
        return self._read(found.scales).numel() == 1

    def _of(self, name: str) -> _Matrix | None:
        """An export may wrap the model in another: then its names end so, and the shortest is the model's."""
        ends = [own for own in self._found if f".{own}".endswith(f".{name}")]
        return self._found[min(ends, key=len)] if ends else None

    def _read(self, name: str) -> Tensor:
        import onnx

        try:
            stored = onnx.numpy_helper.to_array(self._stored[name], str(self._folder))
            if stored.dtype.name == "bfloat16":
                return torch.from_numpy(stored.view(np.uint16).copy()).view(torch.bfloat16)
            return torch.from_numpy(np.array(stored))
        except Exception as error:  # of any kind, for the data may lie in a file that is gone
            raise ModelError(f"weights {self.name}: {name} is not readable ({first_sentence(error)}).") from error


def _modules(graph: Any) -> dict[str, str]:
    """Value of a graph → the module that made it, as the metadata of torch's exporter say."""
    found: dict[str, str] = {}
    for node in graph.node:
        said = next((note.value for note in node.metadata_props if note.key == _SCOPES), "()")
        scopes = ast.literal_eval(said)[:-1]
        if scopes:
            found |= dict.fromkeys(node.output, str(scopes[-1]))
    return found


def _matrices(graph: Any, stored: Mapping[str, Any]) -> list[tuple[str, _Matrix]]:
    """Every weight that a node multiplies with or looks up, beside the value that is computed from it."""
    maker = {value: node for node in graph.node for value in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for value in node.input:
            users.setdefault(value, []).append(node)
    found: list[tuple[str, _Matrix]] = []
    for node in graph.node:
        given = (*node.input, "", "")
        if node.op_type == "MatMulNBits" and given[1] in stored:
            found.append((node.output[0], _Matrix(node, given[1], given[2], given[3], transposed=False)))
        elif node.op_type == "MatMulInteger" and given[1] in stored:
            found += _scaled(node, maker, users, stored)
        elif node.op_type == "MatMul" and given[1] in stored:
            found.append((node.output[0], _Matrix(node, given[1])))
        elif node.op_type in ("MatMul", "Gather"):
            at = given[1] if node.op_type == "MatMul" else given[0]
            kept = maker.get(at)
            if kept is not None and kept.op_type == "DequantizeLinear" and kept.input[0] in stored:
                numbers, scales, zeros = (*kept.input, "")[:3]
                found.append((node.output[0], _Matrix(kept, numbers, scales, zeros, node.op_type == "MatMul")))
    return found


def _scaled(
    node: Any, maker: Mapping[str, Any], users: Mapping[str, list[Any]], stored: Mapping[str, Any]
) -> list[tuple[str, _Matrix]]:
    """MatMulInteger → Cast → Mul by (scale of the inputs × scale of the weight)."""
    value, scales = node.output[0], ""
    for op_type in ("Cast", "Mul"):
        after = users.get(value, [])
        if len(after) != 1 or after[0].op_type != op_type:
            return []
        value = after[0].output[0]
    for factor in maker[value].input:
        made = maker.get(factor)
        scales = next((x for x in made.input if x in stored), scales) if made is not None else scales
    zeros = node.input[3] if len(node.input) > 3 else ""
    return [(value, _Matrix(node, node.input[1], scales, zeros))] if scales else []


def _axis(node: Any) -> int:
    """The axis of integers along which each has a scale of its own."""
    return int(_attributes(node).get("axis", 1))


def _attributes(node: Any) -> dict[str, Any]:
    return {attribute.name: attribute.i for attribute in node.attribute}
