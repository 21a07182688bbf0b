"""The whole way, from a candidate and a reference to verdicts: live, offline, coarse, renamed, batched, broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from impl.qwen3 import load
from parity.candidates.base import open_candidate
from parity.candidates.dump_file import DumpFile, working_dtype
from parity.compare.measure import Storage
from parity.compare.pipeline import diff
from parity.dump import open_dump
from parity.dump.names import parse_names
from parity.errors import IncomparableError
from parity.reasons import Gap
from parity.record.chain import Chain
from parity.reference import pieces
from parity.reference.checkpoint import find
from parity.reference.replay import Reference
from parity.reference.transfer import run_together
from parity.results import Comparison
from parity.run_spec import DTYPES, RunSpec
from parity.sites import family
from tests.builders import whole
from tests.conftest import slow_but
from tests.planted import BUGS, CLEAN, build, observe

TOKENS = tuple((97 * i * i + 31 * i + 7) % 200 for i in range(24))
OTHERS = tuple((53 * i * i + 11 * i + 3) % 200 for i in range(24))
VARIANTS = {v.id: v for v in (*BUGS, *CLEAN)}
Arrays = dict[str, NDArray[Any]]

_references: dict[tuple[Path, str], Reference] = {}


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterable[None]:
    yield
    _references.clear()


def ask(path: Path, dtype: str = "bfloat16", rows: tuple[tuple[int, ...], ...] = (TOKENS,)) -> RunSpec:
    """Without diagnosis, which has tests of its own."""
    return RunSpec(find(str(path)), rows, dtype, faults=())


def reference(question: RunSpec) -> Reference:
    key = (question.checkpoint.path, question.dtype)
    if key not in _references:
        _references[key] = Reference(question.model())
    return _references[key]


def live(question: RunSpec, module: nn.Module, **more: Any) -> Comparison:
    return diff(question, open_candidate(module, **more), reference=reference(question))


def offline(question: RunSpec, path: Path) -> Comparison:
    return diff(question, DumpFile(path, {}), reference=reference(question))


def verdicts(result: Comparison) -> dict[str, str]:
    return {m.site: m.verdict for m in result.sites}


def bad(result: Comparison) -> set[str]:
    return {m.site for m in result.sites if m.verdict in ("wrong", "imprecise", "nonfinite")}


def planted(question: RunSpec, *places: tuple[str, tuple[int, ...]]) -> nn.Module:
    (first, layers), *rest = places
    module = build(VARIANTS[first], question.checkpoint.path, question.dtype, layers)
    for name, where in rest:
        VARIANTS[name].apply(module, where)  # type: ignore[arg-type]
    return module


def recorded(question: RunSpec, module: nn.Module) -> dict[str, Tensor]:
    """What a port would dump: every site that the module has."""
    known = {s.name for s in reference(question).working.sites}
    return {name: x for name, x in observe(module, question.ids).items() if name in known}


GELU = ("act-gelu", (1,))
GUILTY = {"model.layers.1.mlp.act_fn"}


def clean(question: RunSpec) -> nn.Module:
    return load(question.checkpoint.path, question.dtype)


# -- live ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["float32", "bfloat16", "float16"]))
def test_a_right_candidate_matches_and_a_wrong_one_is_localized(small: Path, dtype: str) -> None:
    question = ask(small, dtype)
    right = live(question, clean(question))
    assert (right.verdict, right.exit_code, right.findings, bad(right)) == ("match", 0, (), set())
    assert right.coverage.measured == right.coverage.known == len(right.sites)
    wrong = live(question, planted(question, GELU))
    assert (wrong.verdict, wrong.exit_code, bad(wrong)) == ("diverged", 1, GUILTY)
    assert [(f.families, f.layers) for f in wrong.findings] == [(("model.layers.*.mlp.act_fn",), (1,))]


@pytest.mark.slow
def test_what_the_report_says_of_the_run(small: Path) -> None:
    question = ask(small)
    env = live(question, clean(question)).environment
    assert (env.tokens, env.batch, env.working_dtype, env.candidate_dtype) == (24, 1, "bfloat16", "bfloat16")
    assert (env.truth_dtype, env.candidate, env.attention) == ("float32", "Qwen3", "eager")


def test_rows_of_a_batch_are_all_looked_at(small: Path) -> None:
    question = ask(small, rows=(OTHERS, TOKENS))
    right = live(question, clean(question))
    assert (right.verdict, right.environment.batch) == ("match", 2)
    assert right.next_token is not None
    assert right.next_token.positions == 48
    assert bad(live(question, planted(question, GELU))) == GUILTY

    class SecondRow(nn.Module):
        """SiLU, but for the second row of the batch."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([nn.functional.silu(x[:1]), nn.functional.gelu(x[1:])])

    module = clean(question)
    module.model.layers[1].mlp.act_fn = SecondRow()  # type: ignore[union-attr, index]
    assert bad(live(question, module)) == GUILTY


def test_two_bugs_are_two_findings(checkpoint: Callable[..., Path]) -> None:
    question = ask(checkpoint("qwen3"))
    result = live(question, planted(question, ("act-gelu", (0,)), ("residual-dropped-mlp", (2,))))
    assert bad(result) == {"model.layers.0.mlp.act_fn", "model.layers.2"}
    assert [(f.families, f.layers) for f in result.findings] == [
        (("model.layers.*.mlp.act_fn",), (0,)),
        (("model.layers.*",), (2,)),
    ]
    assert "2 wrong operations" in result.headline


def test_a_bug_that_heals_before_the_logits_is_seen(small: Path) -> None:
    """RoPE is relative: positions that all begin at 1 change queries and keys, and not one score."""
    question = ask(small, "float32")
    result = live(question, planted(question, ("position-offset", (0, 1))))
    logits = result.sites[-1]
    assert logits.total_ratio is not None
    assert logits.total_ratio < 4, "the logits show nothing"
    assert result.verdict == "diverged"
    assert bad(result) == {f"model.layers.{i}.self_attn.{n}_rope" for i in (0, 1) for n in "qk"}


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["float32", "bfloat16"]))
def test_nan_is_found_where_it_begins(small: Path, dtype: str) -> None:
    question = ask(small, dtype)
    result = live(question, planted(question, ("weight-nan", (0,))))
    assert (result.verdict, bad(result)) == ("diverged", {"model.layers.0.mlp.down_proj"})
    assert verdicts(result)["model.layers.0.mlp.down_proj"] == "nonfinite"
    assert [f.verdict for f in result.findings] == ["nonfinite"]
    assert result.next_token is None
    logits = result.sites[-1]
    assert logits.verdict == "unmeasured", "what it was given is not finite"


@pytest.mark.parametrize("dtype", slow_but(["float32"], ["float32", "float16"]))
def test_a_candidate_in_another_dtype(small: Path, dtype: str) -> None:
    question = ask(small)
    right = live(question, load(small, dtype))
    assert (right.verdict, right.environment.candidate_dtype) == ("match", dtype)
    assert bad(live(question, build(VARIANTS["act-gelu"], small, dtype, (1,)))) == GUILTY


class Inside(nn.Module):
    """The port as another author would have packed it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, ids: Tensor) -> Any:
        return {"logits": self.inner(ids)}["logits"]


@pytest.mark.parametrize("with_head", [True, False], ids=["head named", "head left out"])
def test_a_name_map_for_a_live_candidate(small: Path, with_head: bool) -> None:
    question = ask(small)
    families = {family(s.name) for s in reference(question).working.sites}
    if not with_head:
        families.discard("lm_head")  # the logits are what the module returns, whatever its head is called
    names = parse_names({f"inner.{name}": name for name in families}, "test")
    right = live(question, Inside(clean(question)), names=names)
    assert right.verdict == "match"
    assert right.coverage.measured == right.coverage.known
    wrong = planted(question, GELU)
    assert verdicts(live(question, Inside(wrong), names=names)) == verdicts(live(question, wrong))


@pytest.mark.slow
def test_layouts_are_asked_of_a_live_candidate(small: Path) -> None:
    """Six tokens and six heads: a shape alone does not say which axis is which."""
    question = ask(small, rows=(TOKENS[:6],))
    assert live(question, clean(question)).verdict == "match"
    assert bad(live(question, planted(question, ("rope-interleaved", (1,))))) == {
        f"model.layers.1.self_attn.{n}_rope" for n in "qk"
    }


# -- dumps of a port -----------------------------------------------------------------------------------------


def numbers(x: Tensor) -> NDArray[Any]:
    """As float32, which has all of bfloat16."""
    return x.float().numpy()


def bits(x: Tensor) -> NDArray[Any]:
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


def other_layout(question: RunSpec, dims: Callable[[str], tuple[str, ...]], values: Arrays) -> tuple[Arrays, Any]:
    """Heads before tokens in the norms, heads flattened behind the tokens after RoPE, and no batch axis anywhere."""
    arrays, declared = {}, {}
    for name, x in values.items():
        x = x[0]
        axes = list(dims(name))[1:]
        if name.endswith(("q_norm", "k_norm")):
            x, axes = x.swapaxes(0, 1), ["head", "token", "head_dim"]
        elif name.endswith(("_rope", "context")):
            x = x.swapaxes(0, 1) if name.endswith("_rope") else x
            x, axes = x.reshape(x.shape[0], -1), ["token", "head*head_dim"]
        arrays[name], declared[name] = np.ascontiguousarray(x), " ".join(axes)
    return arrays, declared


def write_safetensors(path: Path, arrays: Arrays, metadata: dict[str, str]) -> Path:
    """By hand, as dumps/README.md shows: uint16 holds the bits of bfloat16."""
    header: dict[str, Any] = {"__metadata__": {f"parity.{k}": v for k, v in metadata.items()}}
    end = 0
    for name, x in arrays.items():
        kind = {"uint16": "BF16", "float32": "F32", "float16": "F16"}[x.dtype.name]
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [end, end := end + x.nbytes]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(x.tobytes() for x in arrays.values()))
    return path


def write_npz(path: Path, arrays: Arrays, metadata: dict[str, str]) -> Path:
    np.savez(path, **arrays, **{f"parity.{k}": np.array(v) for k, v in metadata.items()})
    return path


def write_folder(path: Path, arrays: Arrays, metadata: dict[str, str]) -> Path:
    path.mkdir()
    for name, x in arrays.items():
        np.save(path / f"{name}.npy", x)
    (path / "parity.json").write_text(json.dumps(metadata))
    return path


WRITERS = {"port.safetensors": write_safetensors, "port.npz": write_npz, "port": write_folder}


def written(question: RunSpec, module: nn.Module, path: Path, *, wide: bool, declare: bool) -> Path:
    dims = {s.name: s.dims for s in reference(question).working.sites}
    values = {name: (numbers if wide else bits)(x) for name, x in recorded(question, module).items()}
    arrays, declared = other_layout(question, dims.__getitem__, values)
    metadata = {"token_ids": json.dumps(question.token_ids)}
    if declare:
        metadata["dims"] = json.dumps(declared)
    if not wide and path.suffix != ".safetensors":
        metadata["dtype"] = "bfloat16"
    return WRITERS[path.name](path, arrays, metadata)


@pytest.mark.parametrize("name", slow_but(["port.safetensors"], WRITERS))
@pytest.mark.parametrize(
    ("wide", "declare"),
    [
        pytest.param(False, True, id="bits, dims"),
        pytest.param(True, False, id="float32, no dims"),
        pytest.param(False, False, id="bits, no dims", marks=pytest.mark.slow),
        pytest.param(True, True, id="float32, dims", marks=pytest.mark.slow),
    ],
)
def test_a_dump_in_another_layout_says_what_the_live_run_says(
    small: Path, tmp_path: Path, name: str, wide: bool, declare: bool
) -> None:
    question = ask(small)
    wrong = planted(question, GELU, ("rope-interleaved", (0,)))
    result = offline(question, written(question, wrong, tmp_path / name, wide=wide, declare=declare))
    expected = live(question, wrong)
    assert verdicts(result) == verdicts(expected)
    assert bad(result) == GUILTY | {f"model.layers.0.self_attn.{n}_rope" for n in "qk"}
    for mine, theirs in zip(result.sites, expected.sites, strict=True):
        assert mine.ratio == pytest.approx(theirs.ratio, rel=1e-6), mine.site
        assert mine.structure == theirs.structure
    steps = {m.site: m.steps for m in result.sites}
    assert steps["model.layers.0.self_attn.q_rope"] == ("token head*head_dim → batch head token head_dim",)
    assert steps["model.layers.0.self_attn.q_norm"] == ("head token head_dim → batch token head head_dim",)
    assert all(steps.values()), "the batch axis was left out everywhere, and that is said"


@pytest.mark.parametrize("name", slow_but(["port.npz"], WRITERS))
def test_a_right_dump_matches(small: Path, tmp_path: Path, name: str) -> None:
    question = ask(small)
    path = written(question, clean(question), tmp_path / name, wide=False, declare=True)
    result = offline(question, path)
    assert (result.verdict, result.coverage.measured) == ("match", len(result.sites))


@pytest.mark.slow
def test_bfloat16_in_a_float32_dump_is_recognised(small: Path, tmp_path: Path) -> None:
    question = ask(small)
    path = written(question, clean(question), tmp_path / "port.npz", wide=True, declare=True)
    with open_dump(path) as dump:
        assert working_dtype(dump) == "bfloat16"
    assert offline(question, path).verdict == "match"
    wide = ask(small, "float32")
    path = written(wide, clean(wide), tmp_path / "port.safetensors", wide=True, declare=True)
    with open_dump(path) as dump:
        assert working_dtype(dump) == "float32"


@pytest.mark.parametrize(
    "rows", [pytest.param((TOKENS,), marks=pytest.mark.slow), (TOKENS, OTHERS, TOKENS)], ids=["one row", "three rows"]
)
def test_a_batch_offline(small: Path, tmp_path: Path, rows: tuple[tuple[int, ...], ...]) -> None:
    question = ask(small, rows=rows)
    wrong = planted(question, GELU)
    arrays = {name: bits(x) for name, x in recorded(question, wrong).items()}
    path = write_safetensors(tmp_path / "port", arrays, {"token_ids": json.dumps(rows)})
    assert verdicts(offline(question, path)) == verdicts(live(question, wrong))


@pytest.mark.slow
def test_a_dump_of_other_tokens_is_refused(small: Path, tmp_path: Path) -> None:
    question = ask(small, rows=(OTHERS,))
    path = written(question, clean(question), tmp_path / "port.npz", wide=True, declare=True)
    with pytest.raises(IncomparableError, match="was asked"):
        offline(ask(small), path)


@pytest.mark.slow
def test_a_dump_whose_sizes_leave_two_readings_is_refused(small: Path, tmp_path: Path) -> None:
    question = ask(small, rows=(TOKENS[:6],))
    arrays = {name: numbers(x) for name, x in recorded(question, clean(question)).items()}
    path = write_safetensors(tmp_path / "port", arrays, {"token_ids": json.dumps(question.token_ids)})
    with pytest.raises(IncomparableError, match=r"Declare its axes in the dump: parity\.dims"):
        offline(question, path)
    dims = {family(s.name): " ".join(s.dims) for s in reference(question).working.sites if len(s.dims) == 4}
    metadata = {"token_ids": json.dumps(question.token_ids), "dims": json.dumps(dims)}
    assert offline(question, write_safetensors(tmp_path / "said", arrays, metadata)).verdict == "match"


def test_a_name_map_for_a_dump(small: Path, tmp_path: Path) -> None:
    question = ask(small)
    wrong = planted(question, GELU)
    arrays = {n.replace("model.layers.", "blk."): bits(x) for n, x in recorded(question, wrong).items()}
    for i in range(2):
        parts = [arrays.pop(f"blk.{i}.self_attn.{n}_proj") for n in "qkv"]
        arrays[f"blk.{i}.qkv"] = np.concatenate(parts, -1)
    families = {family(s.name) for s in reference(question).working.sites if ".layers." in s.name}
    names: dict[str, Any] = {f.replace("model.layers.", "blk."): f for f in families if not f.endswith("qkv_proj")}
    names["blk.*.qkv"] = {
        "split": [f"model.layers.*.self_attn.{n}_proj" for n in "qkv"],
        "sizes": [120, 40, 40],
    }
    metadata = {"token_ids": json.dumps(question.token_ids), "names": json.dumps(names)}
    path = write_safetensors(tmp_path / "port", arrays, metadata)
    assert verdicts(offline(question, path)) == verdicts(live(question, wrong))


# -- dumps with little in them -------------------------------------------------------------------------------


def part(question: RunSpec, module: nn.Module, keep: Callable[[str], bool], path: Path) -> Comparison:
    arrays = {name: bits(x) for name, x in recorded(question, module).items() if keep(name)}
    write_safetensors(path, arrays, {"token_ids": json.dumps(question.token_ids)})
    return offline(question, path)


def is_layer_end(name: str) -> bool:
    return name.rsplit(".", 1)[-1].isdigit() or name == "lm_head"


@pytest.mark.parametrize(
    "bug", slow_but(["rope-interleaved"], ["act-gelu", "rope-interleaved", "gqa-tile", "residual-dropped-attention"])
)
def test_layer_outputs_alone_localize_to_the_layer(checkpoint: Callable[..., Path], tmp_path: Path, bug: str) -> None:
    question = ask(checkpoint("qwen3"))
    result = part(question, planted(question, (bug, (2,))), is_layer_end, tmp_path / "port")
    assert (result.verdict, bad(result)) == ("diverged", {"model.layers.2"})
    (found,) = result.findings
    assert (found.families, found.layers) == (("model.layers.*",), (2,))
    assert found.span[0] == "model.layers.2.input_layernorm"
    assert found.span[-1] == "model.layers.2.mlp.down_proj"
    assert "the rest of what was measured" in result.headline


@pytest.mark.slow
def test_right_layer_outputs_alone_match_and_say_what_was_not_seen(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    question = ask(checkpoint("qwen3"))
    result = part(question, planted(question, ("sdpa", (0, 1, 2, 3))), is_layer_end, tmp_path / "port")
    assert (result.verdict, result.coverage.measured) == ("match", 5)
    assert f"{len(result.sites) - 5} sites unmeasured" in result.headline
    assert {m.gap for m in result.sites if m.verdict == "unmeasured"} == {Gap("not recorded")}


def test_without_attention_sites_its_bugs_show_at_the_next_one(small: Path, tmp_path: Path) -> None:
    question = ask(small)

    def keep(name: str) -> bool:
        return not name.endswith(("q_norm", "k_norm", "_rope", "context"))

    assert part(question, clean(question), keep, tmp_path / "clean").verdict == "match"
    result = part(question, planted(question, ("rope-interleaved", (1,))), keep, tmp_path / "port")
    assert bad(result) == {"model.layers.1.self_attn.o_proj"}
    (found,) = result.findings
    inside = {name.rsplit(".", 1)[-1] for name in found.span}
    assert {"q_rope", "k_rope", "context"} <= inside <= {"q_rope", "k_rope", "context", "q_norm", "k_norm"}


@pytest.mark.parametrize(
    "bug", slow_but(["qk-norm-skipped-q"], ["qk-norm-skipped-q", "qk-norm-skipped-k", "rope-interleaved", "gqa-tile"])
)
def test_the_span_holds_the_operation_that_is_wrong(small: Path, tmp_path: Path, bug: str) -> None:
    """Sites that were measured in between need not lie between: v_proj comes after q_norm and does not read it."""
    question = ask(small, "float32")

    def keep(name: str) -> bool:
        return not name.endswith(("q_norm", "k_norm", "_rope", "context"))

    arrays = {n: numbers(x) for n, x in recorded(question, planted(question, (bug, (1,)))).items() if keep(n)}
    write_safetensors(tmp_path / "port", arrays, {"token_ids": json.dumps(question.token_ids)})
    (found,) = offline(question, tmp_path / "port").findings
    assert found.families == ("model.layers.*.self_attn.o_proj",)
    assert VARIANTS[bug].guilty_sites([1]) <= set(found.span)


@pytest.mark.slow
def test_without_logits_nothing_is_a_match(small: Path, tmp_path: Path) -> None:
    question = ask(small)
    result = part(question, clean(question), lambda name: name != "lm_head", tmp_path / "port")
    assert (result.verdict, result.exit_code) == ("inconclusive", 2)
    assert result.answer == "the logits were not measured"


@pytest.mark.slow
def test_logits_alone_are_a_dump_too(small: Path, tmp_path: Path) -> None:
    question = ask(small)
    alone = part(question, clean(question), lambda name: name == "lm_head", tmp_path / "right")
    assert (alone.verdict, alone.coverage.measured, alone.findings) == ("inconclusive", 1, ())
    wrong = part(question, planted(question, ("gqa-tile", (0, 1))), lambda name: name == "lm_head", tmp_path / "wrong")
    assert (wrong.verdict, bad(wrong)) == ("diverged", {"lm_head"})
    assert len(wrong.findings[0].span) == len(wrong.sites) - 1


# -- models that cannot be cut -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["bfloat16", "float32"]))
def test_a_model_that_cannot_be_cut_is_run_whole(small: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    question = ask(small, dtype)
    modules = [clean(question), planted(question, GELU, ("rope-interleaved", (0,)))]
    expected = [live(question, module) for module in modules]
    with monkeypatch.context() as patch:
        patch.setattr(Chain, "is_whole", lambda _chain, _count: False)
        undivided = Reference(question.model())
    assert not undivided.working.is_cut
    assert undivided.working.pieces == [pieces.HEAD]
    for module, other in zip(modules, expected, strict=True):
        result = diff(question, open_candidate(module), reference=undivided)
        assert verdicts(result) == verdicts(other)
        assert (result.verdict, result.headline) == (other.verdict, other.headline)
        assert [m.ratio for m in result.sites] == [m.ratio for m in other.sites]
        said = {c.name: c.detail for c in result.checks}
        assert said["reference in pieces"] == "cannot be cut; run whole"


# -- other architectures -------------------------------------------------------------------------------------


def activation(model: nn.Module) -> tuple[str, nn.Module]:
    """The activation function of layer 1, and the module that holds it."""
    for name, module in model.named_modules():
        for child in ("act_fn", "activation_fn"):
            if name.startswith("model.layers.1.") and child in module._modules:
                return name, module
    raise AssertionError("no activation function in layer 1")


GUILTY_OF = {
    "gemma3_text": "model.layers.1.mlp.act_fn",
    "phi3": "model.layers.1.mlp.activation_fn",
    "qwen3_moe": "model.layers.1.mlp.experts",
}


@pytest.mark.parametrize("model_type", slow_but(["gemma3_text"], GUILTY_OF))
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["float32", "bfloat16"]))
def test_stock_models_as_candidates(checkpoint: Callable[..., Path], model_type: str, dtype: str) -> None:
    question = ask(checkpoint(model_type), dtype)
    model = whole(question.checkpoint.path, "sdpa", getattr(torch, dtype))
    right = live(question, model)
    assert (right.verdict, bad(right)) == ("match", set()), right.headline
    assert right.coverage.measured > len(right.sites) / 2
    _, holder = activation(model)
    for child in ("act_fn", "activation_fn"):
        if child in holder._modules:
            setattr(holder, child, nn.ReLU())
    wrong = live(question, model)
    assert (wrong.verdict, bad(wrong)) == ("diverged", {GUILTY_OF[model_type]})
    assert [f.layers for f in wrong.findings] == [(1,)]


@pytest.mark.parametrize(
    ("array", "working", "stored", "expected"),
    [
        ("bfloat16", "float32", None, "bfloat16"),  # a file of bfloat16 numbers
        ("bfloat16", "float32", "bfloat16", "bfloat16"),
        (
            "bfloat16",
            "float32",
            "float32",
            "float32",
        ),  # this operation alone: no excuse
        ("float32", "float32", "float32", "float32"),
        ("float32 on bfloat16's grid", "bfloat16", None, "bfloat16"),
        ("float32 on bfloat16's grid", "float32", "bfloat16", "bfloat16"),  # so is all of the dump
        ("float32 on bfloat16's grid", "float32", "float32", "float32"),  # this operation alone: it is at fault
    ],
)
def test_a_narrow_grid_is_storage_only_where_all_of_the_dump_has_it(
    array: str, working: str, stored: str | None, expected: str
) -> None:
    values = torch.linspace(-3, 3, 999)
    if "bfloat16" in array:
        values = values.bfloat16()
    if array.startswith("float32"):
        values = values.float()
    storage = Storage(DTYPES[working], DTYPES[stored] if stored else None)
    said = run_together([storage.finding_dtype(values)])[0]
    assert said is DTYPES[expected]
