"""The catalogue: every fault does what it says, where it says, and leaves no trace."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from parity.errors import UsageError
from parity.faults import CATALOGUE, Fault, Scope, by_id, load_user_faults, shows_at
from parity.faults.fault import attribute
from parity.faults.patches import attention
from parity.faults.patches.numbers import rounded
from parity.preflight import fault_ids
from parity.record.attention import attention_taps
from parity.record.scans import source_of
from parity.reference.checkpoint import find
from parity.reference.pieces import Piece, PiecewiseModel
from tests import checkpoints

TOKENS = 12
MIDDLE = 1  # a layer with neighbours on both sides
INNER = ("scores", "probs")
# Numbers that a prompt of a dozen tokens can show.
NUMBERS = {"window-applied": 5.0, "position-chunk-restart": 8.0, "softcap-applied": 1.5}
# A Qwen3 in which as many faults as possible can be made: biases, whole blocks of 32, numbers that only float32 holds.
RICH: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "bias": True,
    "dtype": "float32",
}


class Bench:
    """One layer and the ends of a model in memory, with their sites' values on a run without faults."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.model = PiecewiseModel(find(str(path)), dtype, inner=True)
        self.ids = torch.randint(0, 200, (2, TOKENS), generator=torch.Generator().manual_seed(3))
        stored = load_file(path / "model.safetensors")
        self.weight: Callable[[str], Tensor] = lambda name: stored[name].to(dtype)
        self.hidden: dict[Piece, Tensor | None] = {"embed": None}
        self.loaded = ExitStack()
        for piece in ("embed", MIDDLE):
            self.loaded.enter_context(self.model.loaded(piece))
        self.clean: dict[Piece, dict[str, Tensor]] = {}
        self.model.prepare(self.ids)
        self.hidden[MIDDLE] = self.model.embed(self.ids, lambda _site, fresh: fresh) * 20
        self.hidden["head"] = self.model.layer(MIDDLE, self.hidden[MIDDLE], lambda _site, fresh: fresh)
        for piece in ("embed", MIDDLE, "head"):
            self.clean[piece] = self.replay(piece, {})

    def replay(self, piece: Piece, recorded: dict[str, Tensor]) -> dict[str, Tensor]:
        """What every site of a piece computes on recorded inputs."""
        fresh: dict[str, Tensor] = {}

        def tap(site: str, value: Tensor) -> Tensor:
            fresh[site] = value.clone()
            return recorded.get(site, value)

        hidden = self.hidden[piece]
        self.model.run(piece, self.ids, None if hidden is None else hidden.clone(), tap)
        return fresh

    def scope(self, piece: Piece) -> Scope:
        model = self.model
        if not isinstance(piece, int):
            return Scope(model.model, model.config, None, None, {}, self.weight, calls=model.calls)
        return Scope(
            model.model,
            model.config,
            model.layers[piece],
            piece,
            model.arguments(piece),
            self.weight,
            calls=model.calls,
        )


@pytest.fixture(scope="session")
def benches(checkpoint: Callable[..., Path]) -> Iterator[dict[torch.dtype, Bench]]:
    path = checkpoint("qwen3", layers=3, **RICH)
    made = {dtype: Bench(path, dtype) for dtype in (torch.float64, torch.bfloat16)}
    yield made
    for bench in made.values():
        bench.loaded.close()


def differing(fresh: dict[str, Tensor], clean: dict[str, Tensor]) -> set[str]:
    return {s for s, v in fresh.items() if not torch.equal(v.nan_to_num(1e30), clean[s].nan_to_num(1e30))}


def number_of(fault: Fault, scope: Scope) -> float:
    """A wrong number for a fault that has one."""
    if fault.number is None:
        return 0.0
    wrong = (n for n in fault.number.typical if n != fault.number.expected(scope))
    return NUMBERS.get(fault.id, next(wrong))


def shown(fault: Fault, bench: Bench, recorded: Callable[[str], bool]) -> set[str]:
    """The recorded sites that a fault changes, given the recorded values of a run without it."""
    found: set[str] = set()
    for piece in ("embed", MIDDLE, "head"):
        scope = bench.scope(piece)
        if fault.applies(scope):
            values = {s: v for s, v in bench.clean[piece].items() if recorded(s)}
            with fault.patch(scope, number_of(fault, scope)):
                found |= differing(bench.replay(piece, values), bench.clean[piece]) & values.keys()
    return found


def trace(scope: Scope) -> dict[str, Any]:
    """All that a patch may touch, by identity."""
    left: dict[str, Any] = {f"kwargs {name}": id(value) for name, value in scope.kwargs.items()}
    for name, module in scope.model.named_modules():
        for key, value in vars(module).items():
            left[f"{name} {key}"] = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
    for key, value in vars(source_of(scope.model)).items():
        left[f"source {key}"] = id(value)
    return left


def applicable(fault: Fault, bench: Bench) -> list[tuple[Piece, Scope]]:
    found = [(piece, bench.scope(piece)) for piece in ("embed", MIDDLE)]
    return [(piece, scope) for piece, scope in found if fault.applies(scope)]


every_fault = pytest.mark.parametrize("fault", CATALOGUE, ids=lambda fault: fault.id)


@every_fault
def test_a_fault_shows_where_it_says_and_nowhere_else(fault: Fault, benches: dict[torch.dtype, Bench]) -> None:
    bench = benches[torch.bfloat16 if fault.only_rounds else torch.float64]
    if not applicable(fault, bench):
        pytest.skip("does not apply to Qwen3")
    for recorded in (lambda _s: True, lambda s: not s.endswith(INNER)):
        changed = shown(fault, bench, recorded)
        assert changed, "it changes nothing"
        assert all(shows_at(fault, site) for site in changed), changed


@every_fault
def test_a_fault_leaves_no_trace(fault: Fault, benches: dict[torch.dtype, Bench]) -> None:
    bench = benches[torch.float64]
    for piece, scope in applicable(fault, bench):
        before = trace(scope)
        with fault.patch(scope, number_of(fault, scope)):
            pass
        assert trace(scope) == before
        with suppress(ZeroDivisionError), fault.patch(scope, number_of(fault, scope)):
            bench.replay(piece, {})
            raise ZeroDivisionError
        assert trace(scope) == before
        assert not differing(bench.replay(piece, {}), bench.clean[piece])


@every_fault
def test_a_fault_keeps_to_the_dtype_of_the_model(fault: Fault, benches: dict[torch.dtype, Bench]) -> None:
    bench = benches[torch.bfloat16]
    for piece, scope in applicable(fault, bench):
        with fault.patch(scope, number_of(fault, scope)):
            fresh = bench.replay(piece, bench.clean[piece])
        assert {s: v.dtype for s, v in fresh.items() if shows_at(fault, s)} == {
            s: v.dtype for s, v in bench.clean[piece].items() if shows_at(fault, s)
        }


@pytest.mark.parametrize("fault", [f for f in CATALOGUE if f.number], ids=lambda fault: fault.id)
def test_the_right_number_is_no_fault(fault: Fault, benches: dict[torch.dtype, Bench]) -> None:
    bench = benches[torch.float64]
    assert fault.number is not None
    for piece, scope in applicable(fault, bench):
        with fault.patch(scope, fault.number.expected(scope)):
            fresh = bench.replay(piece, bench.clean[piece])
        for site, value in fresh.items():
            assert torch.allclose(value, bench.clean[piece][site], rtol=1e-12, atol=1e-14), site


def test_the_ids_that_are_known_without_torch_are_those_of_the_catalogue() -> None:
    assert sorted(fault_ids()) == sorted(fault.id for fault in CATALOGUE)
    assert sorted(fault_ids(regimes=True)) == sorted(fault.id for fault in CATALOGUE if fault.regime)


def test_tf32_rounds_ties_away_from_zero() -> None:
    bits = torch.tensor([0x3F801000, 0x3F803000, 0x3F800FFF, 0x3F801001, 0x3FFFF000, 0x00000000], dtype=torch.int32)
    x = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    wanted = torch.tensor([1 + 2**-10, 1 + 2**-9, 1.0, 1 + 2**-10, 2.0, 0.0])
    for dtype in (torch.float32, torch.float64):
        assert rounded(x.to(dtype), 11).tolist() == torch.cat([wanted, -wanted]).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_shows_what_it_was_made_to_show(dtype: torch.dtype) -> None:
    hidden = torch.tensor([[[[False, True, True], [False, False, True], [False, False, False]]]])
    mask = attention.hiding(hidden, dtype)
    assert mask.dtype is dtype
    for seen in map(attention.shown, (mask, mask + 7, ~hidden)):
        assert torch.equal(seen, ~hidden)


def test_a_word_on_what_a_run_needs_says_nothing_of_rounding() -> None:
    assert by_id("softmax-low").only_rounds
    assert not dataclasses.replace(by_id("act-gelu"), needs="bfloat16").only_rounds


def test_words() -> None:
    assert len({fault.id for fault in CATALOGUE}) == len(CATALOGUE) >= 50
    for fault in CATALOGUE:
        assert all((fault.title, fault.fix, fault.sites)), fault.id
        assert not any(text.endswith(".") for text in (fault.title, fault.fix, fault.needs)), fault.id
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fault.id)
        assert fault.number is None or len(set(fault.number.typical)) == len(fault.number.typical) > 0


# -- other architectures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A stock model in which the faults named in `shows` must be seen, beside all others that apply."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    shows: tuple[str, ...] = ()
    padded: str = ""
    positions: bool = False


_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5432.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    **{name: Case(name) for name in ("qwen2", "phi3")},
    "llama": Case("llama", {"num_key_value_heads": 6}, ("weight-qk-exchanged",)),
    "llama-tied": Case("llama", {"tie_word_embeddings": True}, ("head-untied",)),
    "llama-scaled": Case(
        "llama",
        {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 16}},
        ("rope-scaling-ignored",),
    ),
    "llama-padded": Case(
        "llama",
        {},
        ("position-skips-padding", "mask-first-row", "mask-padding-side", "mask-ignores-padding"),
        padded="left",
    ),
    "llama-padded-right": Case("llama", {}, ("last-token-padding", "mask-padding-side"), padded="right"),
    "llama-counted": Case(
        "llama",
        {},
        ("position-ignores-padding", "position-first-row", "position-decode-counts-padding"),
        padded="left",
        positions=True,
    ),
    "mistral": Case("mistral", {}, ("window-ignored", "window-plus-one", "window-minus-one")),
    "gemma2": Case("gemma2", checkpoints.OTHER["gemma3_text"], ("softcap-dropped",)),
    "gemma3": Case("gemma3_text", {}, ("norm-one-forgotten", "window-of-other-layers", "embedding-scale-missing")),
    "gpt_oss": Case(
        "gpt_oss",
        {**checkpoints.OTHER["qwen3_moe"], "num_local_experts": 4, "sliding_window": 7},
        ("sinks-dropped", "rope-interleaved"),
    ),
    "olmo2": Case("olmo2", {}, ("qk-norm-separate",)),
    "qwen3_moe": Case("qwen3_moe", {}, ("moe-renormalized",)),
    "qwen3_moe-renormalized": Case("qwen3_moe", {"norm_topk_prob": True}, ("moe-not-renormalized",)),
    "gpt_neox": Case("gpt_neox", {}, ("rope-full", "norm-rms-for-layernorm")),
}


Run = Callable[[], Tensor]


@contextmanager
def stock_layer(case: Case) -> Iterator[tuple[tuple[Scope, Run], tuple[Scope, Run]]]:
    """A stock transformers model: the scopes of a layer and of the ends, each with a way to run it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(case.model_type, **checkpoints.OTHER.get(case.model_type, {}) | case.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    checkpoints.randomize(model, seed=7)
    layers = max((list(m) for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    calls: list[tuple[Any, Any]] = []
    handle = layers[MIDDLE].register_forward_pre_hook(lambda _m, *call: calls.append(call), with_kwargs=True)
    inputs: dict[str, Tensor] = {"input_ids": torch.arange(2 * TOKENS).reshape(2, -1)}
    text: Tensor | None = None
    if case.padded:
        text = torch.arange(TOKENS) >= torch.tensor([[0], [4]])
        text = text if case.padded == "left" else text.flip(1)
        inputs["attention_mask"] = text.long()
    if case.positions:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)

    def stored(name: str) -> Tensor:
        return state[name] * (3.0 if name == "lm_head.weight" else 1.0)

    with torch.no_grad():
        model(**inputs, use_cache=False)
        handle.remove()
        (args, kwargs), state = calls[0], model.state_dict()
        scopes = (
            Scope(model, model.config, layers[MIDDLE], MIDDLE, kwargs, stored, text=text, calls=(TOKENS,)),
            Scope(model, model.config, None, None, {}, stored, text=text, calls=(TOKENS,)),
        )

        # What attention reads of a cache is changed where it is tapped.
        seen = {module: {"context": "context"} for module in model.modules()}

        def run_layer() -> Tensor:
            with attention_taps(seen, lambda _site, value: value, (TOKENS,)):
                out = layers[MIDDLE](*args, **kwargs)
            return out if isinstance(out, Tensor) else out[0]

        def run_ends() -> Tensor:
            with attention_taps(seen, lambda _site, value: value, (TOKENS,)):
                logits: Tensor = model(**inputs, use_cache=False).logits
            return logits

        yield (scopes[0], run_layer), (scopes[1], run_ends)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_fault_runs_on_other_architectures(case: Case) -> None:
    with stock_layer(case) as pieces:
        seen = set()
        for scope, run in pieces:
            clean, before = run(), trace(scope)
            for fault in CATALOGUE:
                applies = fault.applies(scope)
                assert isinstance(applies, bool), fault.id
                if applies:
                    with fault.patch(scope, number_of(fault, scope)):
                        changed = not torch.equal(run(), clean)
                    assert trace(scope) == before, fault.id
                    assert changed or fault.needs, f"{fault.id} changes nothing"
                    seen |= {fault.id} if changed else set()
            assert torch.equal(run(), clean)
        assert seen >= set(case.shows)


# -- tests of the tests ----------------------------------------------------------------------------------------


def test_a_fault_at_the_wrong_site_is_found(benches: dict[torch.dtype, Bench]) -> None:
    lost = dataclasses.replace(by_id("act-gelu"), sites=("gate_proj",))
    changed = shown(lost, benches[torch.float64], lambda _s: True)
    assert changed
    assert not any(shows_at(lost, site) for site in changed)


def test_a_patch_that_leaves_something_behind_is_found(benches: dict[torch.dtype, Bench]) -> None:
    scope = benches[torch.float64].scope(MIDDLE)
    assert scope.layer is not None
    leaks: list[Callable[[], AbstractContextManager[None]]] = [
        lambda: attribute(scope.layer.self_attn, "scaling", 2.0),  # type: ignore[union-attr]
        lambda: attribute(source_of(scope.model), "repeat_kv", None),
        lambda: attribute(scope.layer.mlp, "act_fn", nn.ReLU()),  # type: ignore[union-attr]
    ]
    for leak in leaks:
        before = trace(scope)
        change = leak()
        change.__enter__()
        assert trace(scope) != before
        change.__exit__(None, None, None)
        assert trace(scope) == before


# -- finding faults --------------------------------------------------------------------------------------------


def test_an_id_is_found_or_the_nearest_are_named() -> None:
    assert by_id("rope-skipped-q").sites == ("q_rope",)
    with pytest.raises(UsageError, match=r"'rope-interleave'.*rope-interleaved"):
        by_id("rope-interleave")
    with pytest.raises(UsageError, match="parity faults"):
        by_id("zzzzzzzz")


def test_ends_of_names_are_whole_words() -> None:
    norm = by_id("norm-skipped")
    assert shows_at(norm, "model.norm")
    assert not shows_at(norm, "model.layers.0.self_attn.q_norm")
    dropped = by_id("residual-dropped-mlp")
    assert shows_at(dropped, "model.layers.11")
    assert not shows_at(dropped, "model.layers.11.mlp.down_proj")


_MINE = """
from contextlib import nullcontext
from parity.faults import Fault
FAULTS = (Fault(id={id!r}, title="title", sites=("act_fn",), fix="fix", patch=lambda scope, number: nullcontext()),)
NOTHING = 3
MIXED = (*FAULTS, NOTHING)
"""


def test_faults_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(_MINE.format(id="my-fault"))
    assert [fault.id for fault in load_user_faults(f"{mine}:FAULTS")] == ["my-fault"]
    monkeypatch.syspath_prepend(tmp_path)
    assert [fault.id for fault in load_user_faults("mine:FAULTS")] == ["my-fault"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NOTHING", "found int, expected a tuple of parity.faults.Fault"),
        ("MIXED", r"found int at \[1\], expected a Fault"),
        ("FAULTS", "the id 'rope-theta' is already taken"),
    ],
)
def test_faults_of_a_user_that_are_none(tmp_path: Path, name: str, message: str) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(_MINE.format(id="rope-theta"))
    with pytest.raises(UsageError, match=message):
        load_user_faults(f"{mine}:{name}")
