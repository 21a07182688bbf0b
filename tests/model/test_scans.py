"""Inside linear attention, state spaces, short convolutions and latent attention: seen, transparent, and blamed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parity.candidates.torch_module import TorchModule
from parity.compare.pipeline import diff
from parity.options import RunOptions
from parity.record.scans import SCAN, VALUES
from parity.record.tap import quiet_torch, tapping
from parity.reference.checkpoint import find
from parity.reference.pieces import PiecewiseModel
from parity.results import Comparison
from parity.run_spec import RunSpec
from tests.architectures import make
from tests.conftest import in_turn

IDS = tuple((torch.arange(1, 91) * 37 % 199).tolist())
_DELTA = {"conv_output", "decay", "beta", "state_output", "norm.gate", "norm.output"}
_MAMBA1 = {"conv_output", "dt", "gate", "state_output"}
_MAMBA2 = {"conv_output", "dt", "state_output", "norm.gate"}
_LATENT = {"q_rotated", "k_rotated"}
# Name: the block, and what is seen inside.
SEEN: dict[str, tuple[str, set[str]]] = {
    "qwen3_next": ("linear_attn", _DELTA | {"conv_input"}),
    "qwen3_5": ("linear_attn", _DELTA),
    "mamba": ("mixer", _MAMBA1),
    "mamba2": ("mixer", _MAMBA2),
    "jamba": ("mamba", _MAMBA1),
    "bamba": ("mamba", _MAMBA2),
    "falcon_h1": ("mamba", {"conv_input", "conv_output", "dt", "state_output"}),
    "lfm2": ("conv", {"conv_input", "conv_output"}),
    "deepseek_v2": ("self_attn", _LATENT),
    "deepseek_v3": ("self_attn", _LATENT),
}
FAST = ["qwen3_5", "mamba2", "lfm2", "deepseek_v3"]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of an architecture, written once."""
    folder = tmp_path_factory.mktemp("scans")
    return lambda name: folder / name if (folder / name).exists() else make(name, folder / name)


def stock(path: Path, dtype: str, attention: str = "eager") -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_torch():
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()


def compared(path: Path, dtype: str, model: Any) -> Comparison:
    return diff(RunSpec(find(str(path)), (IDS,), dtype, RunOptions(power=False)), TorchModule.of(model, {}))


def scans(path: Path) -> list[str]:
    return [site.name for site in PiecewiseModel(find(str(path)), torch.float32).sites if site.where == SCAN]


@pytest.mark.parametrize("name", SEEN)
def test_what_is_seen_inside(architecture: Callable[[str], Path], name: str) -> None:
    block, values = SEEN[name]
    sites = scans(architecture(name))
    assert {site.split(f".{block}.", 1)[1] for site in sites} == values
    assert len(sites) % len(values) == 0


@pytest.mark.parametrize("name", SEEN)
def test_recording_changes_no_bit_and_leaves_nothing_behind(architecture: Callable[[str], Path], name: str) -> None:
    path = architecture(name)
    model, ids = stock(path, "bfloat16"), torch.tensor([IDS])
    sites = [site for site in PiecewiseModel(find(str(path)), torch.bfloat16).sites if site.where == SCAN]
    seen: dict[str, Tensor] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        seen[site] = value.clone()
        return value

    with quiet_torch():
        before = model(input_ids=ids, use_cache=False).logits
        with tapping(model, sites, tap):
            during = model(input_ids=ids, use_cache=False).logits
        count = len(seen)
        after = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert len(seen) == count == len(sites)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("name", SEEN)
def test_a_replaced_value_flows_on(architecture: Callable[[str], Path], name: str) -> None:
    """Given back as an equal copy nothing changes, given back changed the logits do: for each value."""
    path = architecture(name)
    model, ids = stock(path, "float32"), torch.tensor([IDS])
    sites = [site for site in PiecewiseModel(find(str(path)), torch.float32).sites if site.where == SCAN]
    kinds = {tuple(site.name.rsplit(".", 2)[1:]): site for site in sites}
    with quiet_torch():
        plain = model(input_ids=ids, use_cache=False).logits
        with tapping(model, sites, lambda _site, value: value.clone()):
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
        for site in kinds.values():
            with tapping(model, [site], lambda _site, value: value * 0.9):
                assert not torch.equal(model(input_ids=ids, use_cache=False).logits, plain), site.name


@pytest.mark.parametrize(
    ("name", "dtype", "attention"),
    in_turn(FAST, SEEN, ["bfloat16", "float32"], ["sdpa", "eager", "eager"]),
)
def test_transformers_itself_matches(
    architecture: Callable[[str], Path], name: str, dtype: str, attention: str
) -> None:
    path = architecture(name)
    has_attention = name not in ("mamba", "mamba2")  # transformers refuses sdpa where there is none
    found = compared(path, dtype, stock(path, dtype, attention if has_attention else "eager"))
    assert found.verdict == "match", found.headline
    measured = {m.site for m in found.sites if m.verdict != "unmeasured"}
    assert set(scans(path)) <= measured


# -- the plants: a block that computes as ever, but for one value or one argument ----------------------------------


@contextmanager
def _other(source: Any, name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    original = getattr(source, name)
    setattr(source, name, change(original))
    try:
        yield
    finally:
        setattr(source, name, original)


def calling(function: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[nn.Module], None]:
    """The block calls another function in the place of `function`, which is given the original."""

    def plant(block: nn.Module) -> None:
        source, forward = sys.modules[type(block).__module__], block.forward

        def other(*args: Any, **kwargs: Any) -> Any:
            with _other(source, function, change):
                return forward(*args, **kwargs)

        block.forward = other

    return plant


def with_(**changes: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The same function with changed keyword arguments."""

    def change(original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs | {name: new(kwargs[name]) for name, new in changes.items()})

        return called

    return change


def late(original: Callable[..., Any]) -> Callable[..., Any]:
    """A convolution whose taps (feature, tap) stand one token too late: it does not see the token itself."""

    def convolve(x: Tensor, taps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        convolved: Tensor = original(x, nn.functional.pad(taps[:, 1:], (0, 1)), *args, **kwargs)
        return convolved

    return convolve


def reversed_halves(original: Callable[..., Any]) -> Callable[..., Any]:
    """Rotation pairs dimension i with i + d / 2, the checkpoint means its neighbours."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **kwargs: Any) -> Any:
        def shuffled(x: Tensor) -> Tensor:
            return torch.stack(x.chunk(2, -1), -1).flatten(-2)

        return original(shuffled(q), shuffled(k), cos, sin, **kwargs)

    return rotate


def answering(operation: str, answer: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    """In the block, a function of torch is replaced by one that answers so."""
    from torch.overrides import TorchFunctionMode

    class Other(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return answer(args[0]) if func.__name__ == operation else func(*args, **(kwargs or {}))

    def plant(block: nn.Module) -> None:
        forward = block.forward

        def other(*args: Any, **kwargs: Any) -> Any:
            with Other():
                return forward(*args, **kwargs)

        block.forward = other

    return plant


# Negative time steps are cut where they would explode.
unplussed = answering("softplus", torch.relu)
_RULE = "torch_chunk_gated_delta_rule"
_CONV = "causal_conv1d_fn"
_CHUNKS = "mamba2_chunk_scan"


def backwards(original: Callable[..., Any]) -> Callable[..., Any]:
    """A convolution that meets the token itself with its first tap."""
    return lambda x, taps, *args, **kwargs: original(x, taps.flip(-1), *args, **kwargs)


def biasless(original: Callable[..., Any]) -> Callable[..., Any]:
    """A convolution without its bias."""
    return lambda x, taps, _bias, *args, **kwargs: original(x, taps, None, *args, **kwargs)


def unexponential(block: nn.Module) -> None:
    """The decay rate is the logarithm that the checkpoint holds."""
    raw: Any = block.A_log
    calling(_RULE, with_(g=lambda g: g / raw.float().exp() * raw.float()))(block)


def reordered(block: nn.Module) -> None:
    """The gate is multiplied before the norm where it comes after it, and after where it comes before."""
    norm: Any = block.norm
    size = getattr(norm, "group_size", norm.weight.numel())

    def rms(x: Tensor) -> Tensor:
        groups = x.reshape(*x.shape[:-1], -1, size)
        normalized = groups / (groups.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        return normalized.reshape(x.shape) * norm.weight.float()

    def forward(x: Tensor, gate: Tensor) -> Tensor:
        opened = nn.functional.silu(gate.float())
        gates_first = "Mamba" in type(norm).__name__
        result = rms(x.float()) * opened if gates_first else rms(x.float() * opened)
        return result.to(x.dtype)

    norm.forward = forward


# Name: the architecture, the bug, where it shows, and what it is called; None if the catalogue has no name for it.
PLANTS: dict[str, tuple[str, Callable[[nn.Module], None], set[str], str | None]] = {
    "decay missing": ("qwen3_5", calling(_RULE, with_(g=torch.zeros_like)), {"decay"}, "scan-decay-missing"),
    "decay without softplus": ("qwen3_next", unplussed, {"decay"}, None),  # negative ones are cut
    "beta without sigmoid": ("qwen3_5", answering("sigmoid", lambda x: x), {"beta"}, "delta-beta-unbounded"),
    "queries not normalized": (
        "qwen3_5",
        calling(_RULE, with_(use_qk_l2norm_in_kernel=lambda _: False)),
        {"state_output"},
        "delta-qk-not-normalized",
    ),
    "gate before norm": ("qwen3_next", reordered, {"norm", "output"}, "gated-norm-order"),
    "gate behind norm": ("mamba2", reordered, {"norm"}, "gated-norm-order"),
    "time step without softplus": ("mamba2", answering("softplus", lambda x: x), {"dt"}, "scan-softplus-missing"),
    "time step of jamba without softplus": ("jamba", unplussed, {"dt"}, None),
    "time step without bias": (
        "falcon_h1",
        calling(_CHUNKS, with_(dt_bias=torch.zeros_like)),
        {"dt"},
        "scan-step-bias-missing",
    ),
    "decay rate as its logarithm": ("qwen3_5", unexponential, {"decay"}, "scan-a-log-as-it-is"),
    "skip dropped": ("bamba", calling(_CHUNKS, with_(D=lambda _: None)), {"state_output"}, "scan-skip-missing"),
    "skip of jamba dropped": (
        "jamba",
        calling("mamba_selective_scan", with_(D=lambda _: None)),
        {"state_output"},
        "scan-skip-missing",
    ),
    "convolution one token late": ("lfm2", calling(_CONV, late), {"conv_output"}, "conv-one-late"),
    "convolution backwards": ("qwen3_5", calling(_CONV, backwards), {"conv_output"}, "conv-taps-reversed"),
    "convolution without bias": ("jamba", calling(_CONV, biasless), {"conv_output"}, "conv-bias-missing"),
    "convolution without activation": (
        "falcon_h1",
        calling(_CONV, with_(activation=lambda _: None)),
        {"conv_output"},
        "conv-activation-missing",
    ),
    "rotated halves": (
        "deepseek_v3",
        calling("apply_rotary_pos_emb_interleave", reversed_halves),
        {"q_rotated", "k_rotated"},
        None,
    ),
}


@pytest.mark.parametrize(
    ("bug", "dtype"),
    in_turn(["beta without sigmoid", "time step without softplus"], PLANTS, ["bfloat16", "float32"]),
)
def test_a_bug_inside_is_seen_inside_and_named(architecture: Callable[[str], Path], bug: str, dtype: str) -> None:
    name, plant, where, called = PLANTS[bug]
    path = architecture(name)
    model = stock(path, dtype)
    for part, module in model.named_modules():
        if part.rsplit(".", 1)[-1] == SEEN[name][0] and part.rsplit(".", 2)[-2].isdigit() and _has_inside(path, part):
            plant(module)
    found = compared(path, dtype, model)
    assert found.verdict == "diverged", found.headline
    blamed = {site.rsplit(".", 1)[-1] for finding in found.findings for site in finding.sites}
    assert blamed <= where, found.findings
    assert blamed & where & (VALUES | {"norm"})
    said = {finding.fault.id for finding in found.findings if finding.fault}
    assert said == {called} if called else said <= {"rope-halves", "rope-interleaved"}, found.findings


def _has_inside(path: Path, block: str) -> bool:
    return any(site.startswith(f"{block}.") for site in scans(path))
