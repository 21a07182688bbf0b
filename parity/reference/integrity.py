"""Integrity before measurement: is the reference itself sound, and do both sides hold the same weights?"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from parity.record.tap import without_wrappers
from parity.reference.batch import Batch
from parity.reference.checkpoint import Checkpoint
from parity.reference.module_weights import is_quantized
from parity.reference.pieces import PiecewiseModel
from parity.results import Check


def reference_checks(model: PiecewiseModel, input_ids: Tensor | Batch) -> list[Check]:
    """A reference that rounds its RoPE frequencies, uses TF32 or gives other numbers each time cannot serve as one.

    `input_ids` (b, t).
    """
    checks = [
        Check(
            "reference in pieces",
            True,
            f"{len(model.layers)} layers, one in memory at a time" if model.is_cut else "cannot be cut; run whole",
        )
    ]
    with model.loaded(model.pieces[0]):
        frequencies = {name: b.dtype for name, b in model.model.named_buffers() if name.endswith("inv_freq")}
    narrow = [name for name, dtype in frequencies.items() if dtype in (torch.bfloat16, torch.float16)]
    if frequencies:
        detail = f"{narrow[0]} is {frequencies[narrow[0]]}" if narrow else "float32 or wider"
        checks.append(Check("reference RoPE frequencies", not narrow, detail))
    tf32 = model.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    checks.append(Check("reference TF32", not tf32, "on: float32 matmuls round to 10 bits" if tf32 else "off"))
    same = _is_deterministic(model, input_ids)
    checks.append(Check("reference determinism", same, "two runs bit-equal" if same else "two runs differ"))
    return checks


def _is_deterministic(model: PiecewiseModel, input_ids: Tensor | Batch) -> bool:
    """Whether the first layer gives the same bits twice: it has every kind of operation that the others have."""
    hidden = None
    for piece in model.pieces[:2]:
        with model.loaded(piece):
            first, second = (model.run(piece, input_ids, hidden, _pass_through) for _ in range(2))
        if not torch.allclose(first, second, rtol=0, atol=0, equal_nan=True):
            return False
        hidden = first
    return True


def _pass_through(_site: str, value: Tensor) -> Tensor:
    return value


def weight_check(module: nn.Module, checkpoint: Checkpoint) -> Check:
    """The live candidate's parameters against the checkpoint, name by name, in the candidate's dtype.

    A different tensor is said to be transposed, or another tensor of the checkpoint, where it is one.
    A name that the checkpoint lacks is not an error: a port may fuse or split weights. Where the reference computes
    with other weights (`--weights`), the candidate's must be those; what a library has quantized is judged elsewhere
    (parity.reference.weight_error).
    """
    differing: list[str] = []
    compared = 0
    own = {without_wrappers(name): p for name, p in module.named_parameters(remove_duplicate=False)}
    padding = {m.weight: m.padding_idx for m in module.modules() if isinstance(m, nn.Embedding)}
    judged = 0
    for name, stored in _tensors(checkpoint, own):
        if checkpoint.weights is not None and is_quantized(own[name]):
            judged += 1
            continue
        compared += 1
        other = checkpoint.weights.tensor(name) if checkpoint.weights is not None else None
        stored = stored if other is None else other
        mine = own[name].detach().cpu()
        if not _same(mine, stored) and not _same(mine, _padded(stored, padding.get(own[name]))):
            differing.append(f"{name} {_how(mine, stored, checkpoint)}")
    unknown = len(own) - compared - judged
    if differing:
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        return Check("candidate weights", False, differing[0] + more)
    tail = f", {unknown} under other names" if unknown else ""
    apart = f", {judged} quantized" if judged else ""
    whose = "the checkpoint" if checkpoint.weights is None or judged else checkpoint.weights.name
    return Check("candidate weights", True, f"{compared} tensors equal to {whose}{apart}{tail}")


def _padded(stored: Tensor, row: int | None) -> Tensor:
    """An embedding as transformers may load it: zero for the padding token, which the reference then has too."""
    return stored if row is None else stored.index_fill(0, torch.tensor([row]), 0)


def _same(mine: Tensor, stored: Tensor) -> bool:
    return not is_quantized(mine) and mine.shape == stored.shape and torch.equal(mine, stored.to(mine.dtype))


def _how(mine: Tensor, stored: Tensor, checkpoint: Checkpoint) -> str:
    if is_quantized(mine):
        return f"is a {type(mine).__name__}, whose numbers cannot be compared"
    if mine.dim() == 2 and mine.shape == stored.shape[::-1] and _same(mine.T, stored):
        return "is transposed"
    if mine.shape != stored.shape:
        return f"has shape {tuple(mine.shape)}, the checkpoint has {tuple(stored.shape)}"
    if mine.dim() == 2 and mine.shape[0] == mine.shape[1] and _same(mine.T, stored):
        return "is transposed"
    twin = next((name for name, other in _tensors(checkpoint) if _same(mine, other)), None)
    if twin:
        return f"holds {twin}"
    changed = float((mine != stored.to(mine.dtype)).float().mean())
    return f"differs from the checkpoint in {changed:.0%} of its numbers"


def _tensors(checkpoint: Checkpoint, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors one by one, or only those of the wanted names; one file is mapped at a time."""
    for file in checkpoint.files:
        with ExitStack() as stack:
            for shard in replace(checkpoint, files=(file,)).open(stack):
                for name in shard.keys():  # noqa: SIM118
                    if wanted is None or name in wanted:
                        yield name, shard.get_tensor(name)
