"""Bugs of many architectures, as ports have had them: is each found, and is its name right?

    python -m tests.bench.cases                 every case in both dtypes, as it is and as a port without taps
    python -m tests.bench.cases --only rope     cases whose name holds this

A case is a small random checkpoint and the transformers model with one bug, mostly a misread config. Every checkpoint
without its bug is run as well, and must match. Prints each run and the shares; exits with 1 if any name was wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from parity.candidates.base import open_candidate
from parity.compare.pipeline import diff
from parity.faults import CATALOGUE
from parity.options import RunOptions
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.results import Comparison
from parity.run_spec import RunSpec
from tests.checkpoints import randomize
from tests.planted.dumps import TAPS, dump_without

TOKENS = tuple((89 * i * i + 17 * i + 5) % 151 for i in range(72))
DTYPES = ("float32", "bfloat16")
# Shares of bugs named rightly that a release must reach.
NAMED = {"float32": 0.85, "bfloat16": 0.75}

_SIZES = {
    "vocab_size": 151,
    "hidden_size": 80,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 2e5,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
_YARN = {"rope_type": "yarn", "rope_theta": 2e4, "factor": 8.0, "original_max_position_embeddings": 64}
_PER_KIND = {
    _SLIDING: {"rope_type": "default", "rope_theta": 3e3},
    _FULL: {"rope_type": "linear", "rope_theta": 4e5, "factor": 4.0},
}
_UNSCALED = {"rope_type": "default", "rope_theta": 2e5}
_ONE_TABLE = dict.fromkeys(_PER_KIND, _PER_KIND[_FULL])
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [2.0 + 0.7 * i for i in range(8)],
    "original_max_position_embeddings": 256,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": _LLAMA3},
    "qwen3": {"head_dim": 16, "rope_parameters": _YARN},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 20,
        "query_pre_attn_scalar": 25,
        "layer_types": [_SLIDING, _FULL, _SLIDING],
        "rope_parameters": _PER_KIND,
    },
    "gemma2": {"head_dim": 20, "sliding_window": 20, "query_pre_attn_scalar": 25},
    "phi3": {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 256, "sliding_window": None},
    "smollm3": {"head_dim": 16, "no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "olmo": {"clip_qkv": 0.5},
    "gpt_neox": {"rotary_pct": 0.5},
    "granite": {"logits_scaling": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
}


@dataclass(frozen=True)
class Case:
    """A bug: the config that the port reads in place of the checkpoint's, or a change to its model.

    `names` are right names for it; where it is one in some layers and another in others, both.
    """

    id: str
    architecture: str
    names: frozenset[str]
    config: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], None] | None = None


def _attentions(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if type(m).__name__.endswith("Attention"))


def _long(model: Any) -> None:
    rotary = model.get_decoder().rotary_emb
    factors = torch.tensor(_LONGROPE["long_factor"])
    rotary.inv_freq = 1.0 / (factors * 1e4 ** (torch.arange(8.0) / 8))
    rotary.original_inv_freq = rotary.inv_freq


def _inverted(model: Any) -> None:
    for attention in _attentions(model):
        attention.use_rope = not attention.use_rope


def _blocks(model: Any) -> None:
    """Cut q, k and v as three blocks, after the fused projection has shown what it returns."""
    for attention in _attentions(model):
        own, fused = attention.forward, attention.query_key_value

        class Reordered(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.inner(x)
                return torch.stack(y.reshape(*y.shape[:-1], 3, 5, -1).unbind(-3), -2).flatten(-3)

        def forward(*args: Any, own: Any = own, attention: Any = attention, fused: Any = fused, **kwargs: Any) -> Any:
            attention._modules["query_key_value"] = Reordered(fused)
            try:
                return own(*args, **kwargs)
            finally:
                attention._modules["query_key_value"] = fused

        attention.forward = forward


def _one_more(model: nn.Module) -> None:
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.weight.data += 1  # type: ignore[operator]


def _kinds_exchanged(model: Any) -> None:
    for attention in _attentions(model):
        attention.sliding_window = None if attention.sliding_window else 20
    layers = model.get_decoder().layers
    kinds = model.config.layer_types
    model.config.layer_types = [_FULL if kind == _SLIDING else _SLIDING for kind in kinds]
    for layer in layers:
        for module in (layer, layer.self_attn):
            for name in ("attention_type", "layer_type"):
                if hasattr(module, name):
                    setattr(module, name, _FULL if getattr(module, name) == _SLIDING else _SLIDING)


def _residual(model: Any) -> None:
    for layer in model.get_decoder().layers:
        layer.residual_multiplier = 1.0


def _scale(model: Any) -> None:
    for attention in _attentions(model):
        attention.scaling = attention.head_dim**-0.5


def _case(id: str, architecture: str, *names: str, change: Callable[[Any], None] | None = None, **config: Any) -> Case:
    return Case(id, architecture, frozenset(names), config, change)


CASES = (
    _case("llama3-factor", "llama", "rope-scaling-factor", rope_parameters=_LLAMA3 | {"factor": 8.0}),
    _case("llama3-ignored", "llama", "rope-scaling-ignored", rope_parameters=_UNSCALED),
    _case("yarn-factor", "qwen3", "rope-scaling-factor", rope_parameters=_YARN | {"factor": 4.0}),
    _case("yarn-attention-factor", "qwen3", "rope-attention-factor", rope_parameters=_YARN | {"attention_factor": 1.0}),
    _case("global-table", "gemma3_text", "rope-of-other-layers", rope_parameters=_ONE_TABLE),
    _case("local-theta", "gemma3_text", "rope-theta",
          rope_parameters=_PER_KIND | {_SLIDING: {"rope_type": "default", "rope_theta": 4e5}}),
    _case("global-unscaled", "gemma3_text", "rope-scaling-ignored", "rope-scaling-factor",
          rope_parameters=_PER_KIND | {_FULL: {"rope_type": "default", "rope_theta": 4e5}}),
    _case("window-inclusive", "gemma3_text", "window-plus-one", sliding_window=21),
    _case("one-twice", "gemma3_text", "norm-one-twice", change=_one_more),
    _case("scale-head-dim", "gemma2", "attention-scale-head-dim", change=_scale),
    _case("windows-exchanged", "gemma2", "window-ignored", "window-of-other-layers", change=_kinds_exchanged),
    _case("long-factors", "phi3", "rope-long-factors", change=_long),
    _case("nope-inverted", "smollm3", "rope-skipped", "rope-on-nope-layer", change=_inverted),
    _case("clip-missing", "olmo", "clip-qkv-missing", clip_qkv=None),
    _case("qkv-in-blocks", "gpt_neox", "qkv-in-blocks", change=_blocks),
    _case("logits-multiplied", "granite", "logits-scale", logits_scaling=1 / 6.0),
    _case("residual-multiplier", "granite", "residual-multiplier", change=_residual),
)  # fmt: skip


def make(architecture: str, folder: Path) -> Path:
    """The checkpoint of an architecture, written once."""
    path = folder / architecture
    if not path.exists():
        given = _SIZES | deepcopy(ARCHITECTURES[architecture])
        config = AutoConfig.for_model(architecture, **given)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(model, seed=7)
        model.save_pretrained(path)
    return path


def port(path: Path, dtype: str, case: Case | None = None) -> nn.Module:
    """The transformers model with the case's bug in it, or without any."""
    config = AutoConfig.from_pretrained(path)
    for name, value in (case.config if case else {}).items():
        setattr(config, name, deepcopy(value))
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    if case and case.change:
        case.change(model)
    return model


def compare(path: Path, model: nn.Module, dtype: str, taps: bool, folder: Path) -> Comparison:
    """The comparison of a port at all its sites, or at what its modules return alone."""
    run = RunSpec(find(str(path)), (TOKENS,), dtype, faults=CATALOGUE, options=RunOptions(power=False))
    reference = Reference(run.model())
    if taps:
        return diff(run, open_candidate(model), reference=reference)
    dump = dump_without(_Plain(model), run, reference, folder / "dump.h5", TAPS)
    return diff(run, open_candidate(dump), reference=reference)


class _Plain(nn.Module):
    """A model under the names of its own modules, called with token ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules = model._modules
        self.__dict__["own"] = model

    def forward(self, ids: torch.Tensor) -> Any:
        """Logits and all else that the model returns, for ids (b, t)."""
        return self.__dict__["own"](input_ids=ids, use_cache=False)


def naming(case: Case, result: Comparison) -> str:
    """`right`, `tied` (the right name is among those that cannot be told apart), `wrong`, `unnamed` or `missed`."""
    if result.verdict != "diverged":
        return "missed"
    causes = [finding.fault for finding in result.findings]
    wrong = [c for c in causes if c and c.id not in case.names and not case.names & set(c.rivals)]
    if wrong:
        return "wrong"
    if any(cause is None for cause in causes):
        return "unnamed"
    return "right" if all(cause and cause.id in case.names for cause in causes) else "tied"


def run(cases: Sequence[Case], folder: Path, dtypes: Sequence[str] = DTYPES) -> list[tuple[str, str]]:
    """Every case in every way: its dtype and what became of its name. Prints each."""
    outcomes = []
    for case in cases:
        path = make(case.architecture, folder)
        for dtype in dtypes:
            for taps in (True, False):
                result = compare(path, port(path, dtype, case), dtype, taps, folder)
                said = "; ".join(dict.fromkeys(f.fault.id if f.fault else "unknown" for f in result.findings))
                outcomes.append((dtype, naming(case, result)))
                print(f"{case.id:22} {dtype:9} {'all sites' if taps else 'plain':9} {outcomes[-1][1]:8} {said}")
    return outcomes


def false_alarms(architectures: Sequence[str], folder: Path, dtypes: Sequence[str] = DTYPES) -> list[str]:
    """The checkpoints whose right port does not match, with the dtype."""
    alarms = []
    for name in architectures:
        path = make(name, folder)
        for dtype in dtypes:
            if compare(path, port(path, dtype), dtype, True, folder).verdict == "diverged":
                alarms.append(f"{name} {dtype}")
    return alarms


def main() -> None:
    """Run the cases and print the shares."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="cases whose name holds this")
    options.add_argument("--dtypes", nargs="*", default=DTYPES, choices=DTYPES)
    given = options.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        cases = [case for case in CASES if given.only in case.id]
        outcomes = run(cases, Path(name), given.dtypes)
        alarms = false_alarms(sorted({case.architecture for case in cases}), Path(name), given.dtypes)
    print(f"false alarms: {', '.join(alarms) or 'none'}")
    failed = bool(alarms)
    for dtype in given.dtypes:
        namings = [naming for of, naming in outcomes if of == dtype]
        right = sum(naming in ("right", "tied") for naming in namings) / len(namings)
        print(f"{dtype}: {len(namings)} runs, {right:.0%} named rightly, {namings.count('wrong')} wrongly")
        failed |= right < NAMED[dtype] or "wrong" in namings or "missed" in namings
    sys.exit(failed)


if __name__ == "__main__":
    main()
