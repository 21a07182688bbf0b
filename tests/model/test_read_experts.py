"""Which experts a mixture used is read off their sum; a bug inside an expert is not taken for one of the router."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parity.diagnose.match import _case
from parity.diagnose.read_experts import read_experts, weights_of
from parity.diagnose.trial import Case, attempt
from parity.diagnose.workbench import Workbench
from parity.record.tap import quiet_torch
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.run_spec import RunSpec
from tests.checkpoints import randomize
from tests.conftest import in_turn

DTYPES = ("float32", "bfloat16")
IDS = tuple((torch.arange(1, 61) * 37 % 199).tolist())
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "head_dim": 20},
    "qwen2_moe": {"norm_topk_prob": False, "shared_expert_intermediate_size": 50},
}
# Where nothing is added to the experts' outputs, the mixture returns just these.
SITES = {"qwen3_moe": "mlp.experts", "qwen2_moe": "mlp"}
Given = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("experts")
    for kind, more in KINDS.items():
        sizes = {"vocab_size": 211, "hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2}
        ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        mixture = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "num_hidden_layers": 2}
        config = AutoConfig.for_model(kind, **sizes, **ends, **mixture, intermediate_size=104, **more)
        model = AutoModelForCausalLM.from_config(config)
        randomize(model, seed=5)
        model.save_pretrained(root / kind)
    return root


@contextmanager
def block(kind: str, change: Callable[[Any], None], dtype: str, folder: Path) -> Iterator[Case]:
    """The output of the mixture in layer 1 of a port that records its norms and the mixture alone."""
    from transformers import AutoModelForCausalLM

    run = RunSpec(find(str(folder / kind)), (IDS,), dtype)
    with quiet_torch():
        model = AutoModelForCausalLM.from_pretrained(
            folder / kind, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()
    change(model.model.layers[1].mlp)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, value: Any) -> None:
            seen[name] = (value if isinstance(value, Tensor) else value[0]).detach()

        return hook

    site = f"model.layers.1.{SITES[kind]}"
    for name in ("model.layers.0", "model.layers.1.post_attention_layernorm", site):
        model.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        model(run.ids)
    bench = Workbench(Reference(run.model()), run.ids, lambda site: seen.get(site.name))
    with bench.piece(1) as at:
        assert at is not None
        yield _case(site, at, bench)


def given(change: Given) -> Callable[[Any], None]:
    """The experts get what `change` makes of the router's choice and weights."""

    def plant(mlp: Any) -> None:
        own = mlp.experts.forward
        mlp.experts.forward = lambda x, index, weights: own(x, *change(index, weights))

    return plant


ORDER = torch.tensor([3, 1, 2, 0, 5, 6, 4, 7])
SCALE = torch.tensor([1, 1, 1.5, 1, 1, 1, 0.5, 1])
PLANTED: dict[str, tuple[Callable[[Any], None], str]] = {
    "order": (
        given(lambda i, w: (ORDER[i], w)),
        "the experts are in another order than the checkpoint's: expert 0 is its expert 3, expert 3 is its expert 0,"
        " expert 4 is its expert 5, and 2 more",
    ),
    "scale of single ones": (
        given(lambda i, w: (i, w * SCALE.to(w)[i])),
        "outputs of experts are multiplied by another factor as well: expert 2 by 1.5",
    ),
    "one scale": (given(lambda i, w: (i, w * 0.7)), "the experts' outputs are added 0."),
    "weights": (
        given(lambda i, w: (i, w.sqrt())),
        "the chosen experts have other weights than in the reference: token ",
    ),
    "choice": (
        given(lambda i, w: ((i + 1) % 8, w.flip(-1))),
        "tokens go to other experts than in the reference: token 0 goes",
    ),
    "fewer": (
        given(lambda i, w: (i[:, :2], w[:, :2])),
        "tokens go to other experts than in the reference: token 0 goes",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "dtype"), in_turn([], PLANTED, DTYPES))
def test_what_the_router_did_is_read_and_explains_the_port(name: str, dtype: str, kind: str, folder: Path) -> None:
    change, words = PLANTED[name]
    with block(kind, change, dtype, folder) as case:
        fault = read_experts(case)
        assert fault is not None
        assert fault.title.startswith(words)
        trial = attempt(fault, case)
        assert trial is not None
        assert trial.fits


def activation(mlp: Any) -> None:
    mlp.experts.act_fn = torch.nn.GELU()


def one_expert(mlp: Any) -> None:
    mlp.experts.down_proj.data[2] = mlp.experts.down_proj.data[2].flip(0)


def without_shared(mlp: Any) -> None:
    mlp.shared_expert.forward = torch.zeros_like


CONTROLS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "nothing": ("qwen3_moe", lambda _mlp: None),
    "activation": ("qwen3_moe", activation),
    "one expert": ("qwen2_moe", one_expert),
    "shared expert": ("qwen2_moe", without_shared),
}


@pytest.mark.parametrize(("name", "dtype"), in_turn([], CONTROLS, DTYPES))
def test_what_is_wrong_elsewhere_is_not_read_as_the_router(name: str, dtype: str, folder: Path) -> None:
    kind, change = CONTROLS[name]
    with block(kind, change, dtype, folder) as case:
        assert read_experts(case) is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_weights_hold(dtype: str, folder: Path) -> None:
    """Of planted weights 95 % lie within two standard errors."""
    planted: list[Tensor] = []

    def other(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        new = (weights * (0.5 + torch.rand(weights.shape, generator=torch.Generator().manual_seed(3)))).to(weights)
        planted.append(torch.zeros(len(new), 8, dtype=torch.float64).scatter(1, index, new.double()))
        return index, new

    with block("qwen3_moe", given(other), dtype, folder) as case:
        found = weights_of(case)
    assert found is not None
    told = found.value != 0
    assert torch.equal(told, planted[0] != 0)
    ratio = ((found.value - planted[0]).abs() / found.stderr)[told]
    assert float((ratio <= 2).double().mean()) >= 0.9
    assert float(ratio.max()) < 6
