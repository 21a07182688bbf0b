"""transformers as the candidate: all its sites are seen, whichever attention it uses, and it is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parity
from parity.candidates.base import beside
from parity.errors import CandidateError
from parity.results import Comparison

TOKENS = "3 150 17 17 0 99 201 5 42 8 1 1 200"


def diff(candidate: Any, model: Path, **options: Any) -> Comparison:
    return parity.diff(
        candidate, model=str(model), **({"tokens": TOKENS, "dtype": "float32", "power": False} | options)
    )


def unmeasured(found: Comparison) -> set[str]:
    return {site.site for site in found.sites if site.verdict == "unmeasured"}


def stock(model: Path, **options: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(model, **({"dtype": torch.float32} | options)).eval()
    return loaded


@pytest.mark.parametrize("query", ["", "?attn=sdpa", "?attn=eager", "?attn=sdpa&dtype=bfloat16"])
def test_hf_matches_at_every_site(query: str, small: Path) -> None:
    options = {"dtype": None} if "dtype" in query else {}
    found = diff(f"hf:{small}{query}", small, **options)
    assert found.verdict == "match"
    assert not unmeasured(found)
    assert len(found.sites) == 39
    assert found.environment.working_dtype == ("bfloat16" if "bfloat16" in query else "float32")


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "gpt_neox"])
def test_other_architectures_are_seen_whole_too(model_type: str, checkpoint: Any) -> None:
    model = checkpoint(model_type)
    found = diff("hf:?attn=sdpa", model)
    assert found.verdict == "match"
    assert not unmeasured(found)


def test_the_model_of_the_spec_is_the_model_of_the_run(small: Path) -> None:
    found = parity.diff(f"hf:{small}", tokens=TOKENS, power=False)
    assert (found.environment.model, found.verdict) == (str(small), "match")


def test_other_weights_are_told(small: Path, checkpoint: Any) -> None:
    found = diff(f"hf:{checkpoint('qwen3', layers=2, tied=True)}", small)
    assert found.verdict != "match"
    assert [check.name for check in found.checks if not check.ok] == ["candidate weights"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_live_module_is_seen_whole_and_left_as_it_was(attention: str, small: Path) -> None:
    module = stock(small, attn_implementation=attention)
    ids = torch.tensor([[int(i) for i in TOKENS.split()]])
    before = module(ids).logits
    found = diff(module, small)
    assert (found.verdict, unmeasured(found)) == ("match", set())
    assert {m.config._attn_implementation for m in module.modules() if hasattr(m, "config")} == {attention}
    assert torch.equal(module(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_bug_between_the_modules_is_found_where_it_is(small: Path) -> None:
    module = stock(small)
    attention = module.model.layers[1].self_attn
    plain = attention.forward
    attention.forward = lambda *args, position_embeddings, **kwargs: plain(
        *args, position_embeddings=tuple(t.roll(1, dims=1) for t in position_embeddings), **kwargs
    )
    found = diff(module, small)
    assert found.verdict == "diverged"
    bad = {site.site for site in found.sites if site.verdict not in ("exact", "rounding")}
    assert bad == {"model.layers.1.self_attn.q_rope", "model.layers.1.self_attn.k_rope"}


class OwnAttention(nn.Module):
    """A user's attention inside of transformers' model: what it hands to its o_proj is nobody's business."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.o_proj, self.inner = stock.o_proj, [stock]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner[0](*args, **kwargs)


def test_only_the_code_of_transformers_is_looked_into(small: Path) -> None:
    module = stock(small)
    module.model.layers[1].self_attn = OwnAttention(module.model.layers[1].self_attn)
    found = diff(module, small)
    assert found.verdict == "match"
    assert {site.partition("self_attn.")[2] for site in unmeasured(found)} >= {"q_rope", "k_rope", "context"}
    assert {site for site in unmeasured(found) if "layers.1.self_attn" not in site} == set()


@pytest.mark.slow
@pytest.mark.parametrize("has_run", [False, True])
def test_a_compiled_model_is_tapped_at_its_modules(has_run: bool, small: Path) -> None:
    module = torch.compile(stock(small), backend="eager")
    if has_run:
        module(torch.tensor([[1, 2, 3]]))
    found = diff(module, small)
    assert found.verdict == "match"
    measured = {site.site for site in found.sites} - unmeasured(found)
    assert {"model.layers.1.mlp.gate_proj", "model.layers.1", "lm_head"} <= measured
    assert not any(site.endswith(("q_rope", "context", "product")) for site in measured)
    checks = {check.name: check for check in found.checks}
    assert "under other names" not in checks["candidate weights"].detail
    assert checks["run without taps"].detail == "logits with and without taps are bit-equal"


def test_a_compiled_run_that_taps_change_is_no_match(small: Path) -> None:
    def breaks(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        """A compiler with a bug in large graphs: taps cut the model into small ones, where it does not show."""
        large = sum(node.op == "call_function" for node in graph.graph.nodes) > 40
        return (lambda *args: tuple(x * 1.5 for x in graph(*args))) if large else graph

    found = diff(torch.compile(stock(small), backend=breaks), small)
    assert found.verdict == "inconclusive"
    assert [check.name for check in found.checks if not check.ok] == ["run without taps"]


class Packed(torch.Tensor):
    """A weight as a quantizing library wraps it: it multiplies, and refuses to be compared."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.equal, torch.Tensor.ne, torch.Tensor.to):
            raise NotImplementedError(func)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found.as_subclass(cls) if func in (torch.Tensor.detach, torch.Tensor.cpu) else found


def test_weights_of_a_class_of_their_own_are_said_to_be_so(small: Path) -> None:
    module = stock(small)
    up = module.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().as_subclass(Packed), requires_grad=False)
    found = diff(module, small)
    weights = next(check for check in found.checks if check.name == "candidate weights")
    assert not weights.ok
    assert weights.detail == "model.layers.0.mlp.up_proj.weight is a Packed, whose numbers cannot be compared"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("hf:?atn=sdpa", "candidate 'hf:?atn=sdpa': no option 'atn'. It has attn, dtype, device."),
        ("hf:?dtype=int8", "candidate 'hf:?dtype=int8': dtype 'int8' is not one of float32, bfloat16, float16."),
    ],
)
def test_what_is_wrong_with_a_spec_is_said(spec: str, said: str, small: Path) -> None:
    with pytest.raises(CandidateError) as error:
        diff(spec, small)
    assert str(error.value) == said


def test_an_incomplete_checkpoint_is_refused(small: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(small / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((small / "config.json").read_bytes())
    with pytest.raises(CandidateError, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight"):
        diff(f"hf:{tmp_path}", small)


def test_a_spec_beside_a_test_file_means_the_folder_only_if_it_is_there(small: Path) -> None:
    assert beside(small.parent, f"hf:{small.name}?attn=sdpa") == f"hf:{small}?attn=sdpa"
    assert beside(small.parent, "hf:Qwen/Qwen3-0.6B") == "hf:Qwen/Qwen3-0.6B"
    assert beside(small.parent, "hf:?attn=sdpa") == "hf:?attn=sdpa"
