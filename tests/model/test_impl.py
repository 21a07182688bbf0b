"""The worked example agrees with transformers at every site, and refuses what it cannot do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from impl.qwen3 import Cache, Config, Qwen3, load
from tests import checkpoints
from tests.planted import observe

ROOT = Path(__file__).parents[2]
TINY = ROOT / "parity" / "models" / "tiny-qwen3"
KINDS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "bias": {"bias": True, "tied": True},
    "sharded": {"shards": 3},
}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("impl")
    made = {kind: checkpoints.qwen3(root / kind, layers=3, **settings) for kind, settings in KINDS.items()}
    return made | {"tiny-qwen3": TINY}


def input_ids(rows: int = 1, tokens: int = 23) -> Tensor:
    return torch.randint(0, 300, (rows, tokens), generator=torch.Generator().manual_seed(rows))


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double().reshape(a.shape)
    return float((a - b).norm() / b.norm())


def reference(model_dir: Path, dtype: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    return model.eval()


@contextmanager
def inputs_seen(model: nn.Module, names: dict[str, str], seen: dict[str, Tensor]) -> Iterator[None]:
    """Inputs of the modules whose names end in a key of `names`, as sites that end in its value."""

    def hook_of(site: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: seen.__setitem__(site, args[0])

    with ExitStack() as stack:
        for full, module in model.named_modules():
            for end, site in names.items():
                if full.endswith(end):
                    hook = hook_of(full.removesuffix(end) + site)
                    stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def attention_seen(model: nn.Module, seen: dict[str, Tensor]) -> Iterator[None]:
    """What transformers' eager attention is given and returns, by the names of our sites."""
    from transformers.models.qwen3 import modeling_qwen3

    plain = modeling_qwen3.eager_attention_forward
    names = {module: name for name, module in model.named_modules()}

    def spying(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Any:
        context, probs = plain(module, q, k, v, *rest, **more)
        for short, value in {"q_rope": q, "k_rope": k, "context": context, "probs": probs}.items():
            seen[f"{names[module]}.{short}"] = value
        return context, probs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_qwen3, "eager_attention_forward", spying)
        yield


def reference_sites(model_dir: Path, dtype: str, ids: Tensor) -> dict[str, Tensor]:
    model = reference(model_dir, dtype)
    seen: dict[str, Tensor] = {}
    spied = {"post_attention_layernorm": "resid_mid", "down_proj": "product"}
    with inputs_seen(model, spied, seen), attention_seen(model, seen):
        seen |= observe(model, ids)
    return seen


@pytest.mark.parametrize("kind", [*KINDS, "tiny-qwen3"])
def test_float32_agrees_with_transformers_at_every_site(kind: str, model_dirs) -> None:
    theirs = reference_sites(model_dirs[kind], "float32", input_ids())
    ours = observe(load(model_dirs[kind], "float32"), input_ids())
    # Attention modules return tuples there; scores never leave the eager function, what is read has no name.
    inside = (".self_attn", ".scores", ".cache_k", ".cache_v")
    unknown = {name for name in set(ours) - set(theirs) if not name.endswith(inside)}
    assert not unknown
    # Hooks see the rotary module's tables there, which here are no module.
    assert {name for name in set(theirs) - set(ours) if "rotary" not in name} == set()
    far = {name: distance(ours[name], theirs[name]) for name in set(ours) & set(theirs)}
    assert {name: d for name, d in far.items() if not d < 1e-5} == {}


@pytest.mark.parametrize("kind", ["untied", "bias", "tiny-qwen3"])
def test_bfloat16_logits_agree_with_transformers(kind: str, model_dirs) -> None:
    theirs = reference_sites(model_dirs[kind], "bfloat16", input_ids())["lm_head"]
    ours = observe(load(model_dirs[kind], "bfloat16"), input_ids())["lm_head"]
    assert ours.dtype == torch.bfloat16
    assert distance(ours, theirs) < 0.01


def test_cached_decoding_gives_the_logits_of_one_full_pass(model_dirs) -> None:
    model, ids = load(model_dirs["untied"], "float32"), input_ids(rows=2)
    cache = Cache()
    parts = [model(part, cache) for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:])]
    assert cache.length == ids.shape[1]
    assert distance(torch.cat(parts, dim=1), model(ids)) < 1e-5


@pytest.mark.parametrize("kind", ["untied", "tiny-qwen3"])
def test_greedy_decoding_is_the_same_without_a_cache(kind: str, model_dirs) -> None:
    model, ids = load(model_dirs[kind], "float32"), input_ids(tokens=9)
    slow = ids
    for _ in range(6):
        slow = torch.cat([slow, model(slow)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, 6), slow)


def test_batch_of_two_equals_two_single_runs(model_dirs) -> None:
    model, ids = load(model_dirs["untied"], "float32"), input_ids(rows=2)
    both = model(ids)
    for row in range(2):
        assert distance(model(ids[row : row + 1]), both[row : row + 1]) < 1e-6


def test_shards_hold_the_same_model(model_dirs) -> None:
    assert len(list(model_dirs["sharded"].glob("*.safetensors"))) > 1
    one, many = load(model_dirs["untied"]), load(model_dirs["sharded"])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))


def test_tied_head_shares_the_embedding(model_dirs) -> None:
    tied, untied = load(model_dirs["tied"]), load(model_dirs["untied"])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


# -- what it refuses ---------------------------------------------------------------------------------------


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a single-file checkpoint with other tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(GATE),
        lambda tensors: tensors.update({"model.layers.9.mlp.gate_proj.weight": tensors[GATE].clone()}),
        lambda tensors: tensors.update({GATE: tensors[GATE].t().contiguous()}),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_checkpoint_that_does_not_fit_is_refused(change, model_dirs, tmp_path: Path) -> None:
    broken = changed(model_dirs["untied"], tmp_path / "broken", change)
    with pytest.raises(RuntimeError, match="gate_proj"):
        load(broken)


def test_two_heads_where_one_is_promised_are_refused(model_dirs, tmp_path: Path) -> None:
    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(ValueError, match="ties lm_head"):
        load(changed(model_dirs["tied"], tmp_path / "broken", add_head))


def test_missing_files_are_named(model_dirs, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)
    shutil.copy(model_dirs["untied"] / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model_type", "qwen2", "model_type"),
        ("hidden_act", "gelu", "hidden_act"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}, "rope_type"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_type"),
    ],
)
def test_unsupported_config_is_refused(key: str, value: Any, named: str, model_dirs, tmp_path: Path) -> None:
    raw = json.loads((model_dirs["untied"] / "config.json").read_text())
    if key == "rope_scaling":
        del raw["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value, "rope_theta": 1e4}))
    with pytest.raises(ValueError, match=named):
        Config.read(tmp_path / "config.json")


def test_config_of_older_checkpoints_is_read(model_dirs, tmp_path: Path) -> None:
    raw = json.loads((model_dirs["untied"] / "config.json").read_text())
    del raw["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_theta": 777.0, "rope_scaling": None}))
    assert Config.read(tmp_path / "config.json").rope_theta == 777.0


# -- it stands alone ---------------------------------------------------------------------------------------

ALONE = """
import sys
import impl.qwen3
{more}
print(sorted(sys.modules.keys() & {{"transformers", "parity"}}))
"""


def imported_with_impl(more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(more=more)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_impl_imports_neither_transformers_nor_parity() -> None:
    assert imported_with_impl("") == "[]"


def test_the_import_check_can_fail() -> None:
    assert imported_with_impl("import parity") == "['parity']"


def test_load_gives_a_model_in_the_dtype_asked_for(model_dirs) -> None:
    model = load(model_dirs["untied"], "float16")
    assert isinstance(model, Qwen3)
    assert not model.training
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float16, False)}
