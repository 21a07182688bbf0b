"""A candidate that is transformers itself: another attention, dtype or device, or a checkpoint of other weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn

from parity.candidates.torch_module import TorchModule
from parity.dump import NameMap, RunInfo
from parity.errors import CandidateError
from parity.load_object import describe
from parity.reference.build import auto_class, choose_experts
from parity.reference.checkpoint import find
from parity.reference.weights import no_progress_bar
from parity.run_spec import DTYPES, RunSpec

OPTIONS = ("attn", "dtype", "device")


class TransformersModel(TorchModule):
    """`hf:DIR?attn=sdpa&dtype=bfloat16&device=cuda`: all sites, because the reference's own taps fit it.

    DIR is a directory or hub id, and without it the model of the run. What the options leave out is as the run says.
    """

    def __init__(self, rest: str, options: Mapping[str, str], names: NameMap) -> None:
        query = "&".join(f"{key}={value}" for key, value in options.items())
        super().__init__(f"hf:{rest}{'?' if query else ''}{query}", self._from_pretrained, names)
        self._model, self._options = rest, options
        if unknown := [key for key in options if key not in OPTIONS]:
            raise CandidateError(f"candidate {self.name!r}: no option {unknown[0]!r}. It has {', '.join(OPTIONS)}.")
        if (dtype := options.get("dtype")) not in (None, *DTYPES):
            raise CandidateError(f"candidate {self.name!r}: dtype {dtype!r} is not one of {', '.join(DTYPES)}.")

    def said(self) -> RunInfo:
        """The model and the dtype that the SPEC names."""
        return RunInfo(model=self._model or None, dtype=self._options.get("dtype"))

    def _from_pretrained(self, run: RunSpec) -> nn.Module:
        from transformers import AutoConfig

        trusts = run.checkpoint.trust_remote_code
        path = find(self._model, trust_remote_code=trusts).path if self._model else run.checkpoint.path
        try:
            with redirect_stdout(sys.stderr), no_progress_bar():
                config = AutoConfig.from_pretrained(path, trust_remote_code=trusts)
                model, info = auto_class(config).from_pretrained(
                    path,
                    dtype=DTYPES[self._options.get("dtype", run.dtype)],
                    attn_implementation=self._options.get("attn", run.options.attention),
                    trust_remote_code=trusts,
                    output_loading_info=True,
                )
                model = model.to(torch.device(self._options.get("device", run.device)))
        except Exception as error:
            raise CandidateError(f"candidate {self.name!r}: loading {path} failed with {describe(error)}") from error
        self._check_complete(info)
        choose_experts(model)
        loaded: nn.Module = model.eval()
        return loaded

    def _check_complete(self, info: Mapping[str, Any]) -> None:
        """transformers fills what a checkpoint lacks with random numbers, and only warns."""
        if missing := sorted(info["missing_keys"]):
            raise CandidateError(
                f"candidate {self.name!r}: the checkpoint has no {missing[0]} ({len(missing)} tensors are missing). "
                "Complete the download."
            )
