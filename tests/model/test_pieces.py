"""The reference in pieces is the reference: bit by bit what transformers computes in one go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parity.errors import ModelError
from parity.record import attention
from parity.record.tap import Tap, quiet_torch
from parity.reference.checkpoint import Checkpoint, find
from parity.reference.pieces import EMBED, HEAD, PiecewiseModel
from tests.builders import IDS, fired, hooks, whole
from tests.checkpoints import OTHER
from tests.conftest import in_turn, slow_but

TYPES = ["qwen3", *OTHER]
pytestmark = pytest.mark.usefixtures("one_piece_at_a_time")


def piecewise(
    path: Path, dtype: torch.dtype = torch.float32, implementation: str = "eager", inner: bool = False
) -> PiecewiseModel:
    return PiecewiseModel(find(str(path)), dtype, "cpu", implementation, inner)


def run(
    model: PiecewiseModel, ids: Tensor = IDS, also: Tap = lambda _site, value: value
) -> tuple[dict[str, Tensor], Tensor]:
    """All sites and the logits, from a run that holds one piece at a time."""
    seen: dict[str, Tensor] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        assert site not in seen
        seen[site] = value.clone()
        return also(site, value)

    hidden = None
    for piece in model.pieces:
        with model.loaded(piece):
            hidden = model.run(piece, ids, hidden, tap)
    assert hidden is not None
    return seen, hidden


def stock_logits(path: Path, implementation: str, dtype: torch.dtype, ids: Tensor = IDS) -> Tensor:
    with quiet_torch():
        logits: Tensor = whole(path, implementation, dtype)(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("implementation", slow_but(["eager"], ["eager", "sdpa"]))
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    in_turn(["qwen3", "qwen3_moe", "gemma3_text"], TYPES, [torch.float32, torch.bfloat16]),
    ids=str,
)
def test_pieces_compute_what_the_whole_computes(
    checkpoint: Callable[..., Path], model_type: str, implementation: str, dtype: torch.dtype
) -> None:
    path = checkpoint(model_type)
    model = piecewise(path, dtype, implementation)
    seen, logits = run(model)
    assert torch.equal(logits, stock_logits(path, implementation, dtype))
    expected = fired(path, implementation, dtype, model.sites)
    assert list(seen) == list(expected)
    for name, value in seen.items():
        assert torch.equal(value, expected[name][0]), name


@pytest.mark.parametrize(
    "settings",
    slow_but(
        [{"shards": 3, "tied": True}],
        [{"tied": True}, {"bias": True}, {"shards": 2}, {"shards": 3, "tied": True}, {"dtype": "float32"}],
    ),
    ids=str,
)
def test_other_qwen3_checkpoints_too(checkpoint: Callable[..., Path], settings: dict[str, Any]) -> None:
    path = checkpoint("qwen3", **settings)
    if "shards" in settings:
        assert len(list(path.glob("*.safetensors"))) > 1
    for dtype in (torch.float32, torch.bfloat16):
        _, logits = run(piecewise(path, dtype))
        assert torch.equal(logits, stock_logits(path, "eager", dtype))


def test_one_token_and_one_row(small: Path) -> None:
    ids = IDS[:1, :1]
    assert torch.equal(run(piecewise(small), ids)[1], stock_logits(small, "eager", torch.float32, ids))


@pytest.mark.parametrize("model_type", slow_but(["mistral"], ["qwen3", "mistral", "gemma3_text"]))
def test_no_piece_looks_ahead(checkpoint: Callable[..., Path], model_type: str) -> None:
    other = IDS.clone()
    other[:, -1] += 1
    model = piecewise(checkpoint(model_type))
    first, second = run(model, IDS)[0], run(model, other)[0]
    for site in model.sites:
        if site.dims[:2] == ("batch", "token"):
            assert torch.equal(first[site.name][:, :-1], second[site.name][:, :-1]), site.name
    assert not torch.equal(first["lm_head"][:, -1], second["lm_head"][:, -1])


@pytest.mark.parametrize("model_type", TYPES)
def test_every_site_belongs_to_one_piece(checkpoint: Callable[..., Path], model_type: str) -> None:
    model = piecewise(checkpoint(model_type))
    by_piece = [site.name for piece in model.pieces for site in model.sites_of(piece)]
    assert by_piece == [site.name for site in model.sites]
    assert model.pieces == [EMBED, 0, 1, 2, *([3] if model_type == "qwen3" else []), HEAD]
    assert all(model.sites_of(piece) for piece in model.pieces)


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
def test_layers_need_no_pass_before_them(checkpoint: Callable[..., Path], model_type: str) -> None:
    path = checkpoint(model_type)
    sites, _ = run(piecewise(path, torch.bfloat16))
    model = piecewise(path, torch.bfloat16)
    model.prepare(IDS)
    for index in (2, 0):  # any layer, in any order
        source = f"model.layers.{index - 1}" if index else model.sites_of(EMBED)[-1].name
        with model.loaded(index):
            out = model.layer(index, sites[source], lambda _site, value: value)
        assert torch.equal(out, sites[f"model.layers.{index}"])
    twin = model.twin(torch.float32)
    with twin.loaded(0):
        out = twin.run(0, IDS, sites[model.sites_of(EMBED)[-1].name].float(), lambda _site, value: value)
    assert torch.dist(out, sites["model.layers.0"]) < 0.03 * out.norm()


def test_other_token_ids_are_prepared_anew(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3", layers=2)
    model, short = piecewise(path), IDS[:, :3]
    expected = run(piecewise(path), short)[1]
    model.prepare(IDS)
    assert torch.equal(run(model, short)[1], expected)


# -- memory and cleaning up ----------------------------------------------------------------------------------


def held(model: PiecewiseModel) -> set[str]:
    """Parameters that take memory."""
    return {name for name, p in model.model.named_parameters(remove_duplicate=False) if not p.is_meta}


def test_only_one_piece_is_in_memory(checkpoint: Callable[..., Path]) -> None:
    model = piecewise(checkpoint("qwen3"))
    assert held(model) == set()
    with model.loaded(2):
        names = held(model)
        assert names
        assert all(name.startswith("model.layers.2.") for name in names)
    assert held(model) == set()
    with model.loaded(EMBED):
        assert held(model) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        with model.loaded(HEAD):  # they are loaded together, and not twice
            pass
        assert held(model) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert held(model) == set()


def test_a_small_checkpoint_is_read_once_and_stays(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(piecewise(small))
    monkeypatch.setattr("parity.reference.pieces.SMALL", find(str(small)).size)
    model = piecewise(small)
    opened: list[str] = []
    original = Checkpoint.open

    def counted(self: Checkpoint, *args: Any) -> list[Any]:
        opened.append(self.name)
        return original(self, *args)

    monkeypatch.setattr(Checkpoint, "open", counted)
    seen, logits = run(model)
    again, _ = run(model)
    assert len(opened) == 1
    assert held(model) == {name for name, _ in model.model.named_parameters(remove_duplicate=False)}
    assert torch.equal(logits, expected[1])
    assert all(
        torch.equal(seen[site], value) and torch.equal(again[site], value) for site, value in expected[0].items()
    )


class PlantedError(Exception):
    pass


@pytest.mark.parametrize("piece", [EMBED, 0, HEAD])
def test_a_tap_that_raises_leaves_the_model_as_it_was(small: Path, piece: str | int) -> None:
    model = piecewise(small, inner=True)
    expected = run(model)[1]
    before = hooks(model.model)

    def tap(site: str, value: Tensor) -> Tensor:
        if site == model.sites_of(piece)[-1].name:
            raise PlantedError
        return value

    with pytest.raises(PlantedError):
        run(model, IDS, tap)
    assert hooks(model.model) == before
    assert attention._active.get() is None
    assert held(model) == set()
    assert not [m for m in model.model.modules() if "forward" in vars(m)], "stubs are gone"
    assert torch.equal(run(model)[1], expected)


def test_two_models_do_not_hear_each_other(small: Path) -> None:
    working, precise = piecewise(small, torch.bfloat16), piecewise(small)
    expected = run(working)[1], run(precise)[1]
    hidden: list[Tensor | None] = [None, None]
    for piece in working.pieces:
        with working.loaded(piece), precise.loaded(piece):
            hidden = [m.run(piece, IDS, h, lambda _s, v: v) for m, h in zip((working, precise), hidden, strict=True)]
    assert torch.equal(hidden[0], expected[0])
    assert torch.equal(hidden[1], expected[1])


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "qwen3_moe", "gpt_neox"])
def test_weights_of_the_truth_are_those_of_the_working_model(checkpoint: Callable[..., Path], model_type: str) -> None:
    path = checkpoint(model_type, dtype="float32")
    working = piecewise(path, torch.bfloat16)
    precise = working.twin(torch.float64)
    for piece in working.pieces:
        with working.loaded(piece), precise.loaded(piece):
            mine, theirs = (dict(m.model.named_parameters()) for m in (precise, working))
            loaded = [name for name, p in theirs.items() if not p.is_meta]
            assert loaded
            for name in loaded:
                assert mine[name].dtype is torch.float64
                assert torch.equal(mine[name], theirs[name].to(torch.float64)), name


# -- checkpoints that are not whole --------------------------------------------------------------------------


@pytest.fixture
def damaged(small: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the small checkpoint after `change(tensors)`."""

    def make(change: Callable[[dict[str, Tensor]], Any]) -> Path:
        path = tmp_path / "damaged"
        shutil.copytree(small, path)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(damaged: Callable[..., Path], name: str) -> None:
    path = damaged(lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"has no {name}") as caught:
        run(piecewise(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
def test_a_misshapen_tensor_is_named_with_both_shapes(damaged: Callable[..., Path], name: str) -> None:
    shapes: list[tuple[int, ...]] = []

    def cut(tensors: dict[str, Tensor]) -> None:
        shapes.append(tuple(tensors[name].shape))
        tensors[name] = tensors[name][:, :-1].contiguous()

    path = damaged(cut)
    rows, columns = shapes[0]
    with pytest.raises(ModelError) as caught:
        run(piecewise(path))
    assert f"{name} has shape ({rows}, {columns - 1}), config.json asks for ({rows}, {columns})" in str(caught.value)


def test_a_failed_piece_leaves_nothing_in_memory(damaged: Callable[..., Path]) -> None:
    model = piecewise(damaged(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")))
    with pytest.raises(ModelError), model.loaded(1):
        pass
    assert held(model) == set()


def test_a_missing_shard_is_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "sharded"
    shutil.copytree(checkpoint("qwen3", shards=2), path)
    shard = sorted(path.glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        find(str(path))


def test_a_truncated_shard_is_named(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "short"
    shutil.copytree(small, path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        run(piecewise(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json"),
        ("[]", "config.json"),
        ("{}", "config.json"),
        ('{"model_type": "no_such_type"}', "no_such_type"),
        ('{"model_type": "qwen3", "hidden_size": "wide"}', "config.json"),
    ],
)
def test_a_config_that_means_nothing_is_a_model_error(small: Path, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "odd"
    shutil.copytree(small, path)
    (path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        piecewise(path)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"no config\.json in .* \(found: notes\.txt\)"):
        find(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        find(str(tmp_path))


def test_fingerprints_tell_checkpoints_apart(damaged: Callable[..., Path], small: Path) -> None:
    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"].view(-1)[0] += 1

    assert find(str(small)).fingerprint() == find(str(small)).fingerprint()
    assert find(str(damaged(nudge))).fingerprint() != find(str(small)).fingerprint()


def test_a_fingerprint_hears_the_configuration(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "other"
    shutil.copytree(small, path)
    config = json.loads((path / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    (path / "config.json").write_text(json.dumps(config))
    assert find(str(path)).fingerprint() != find(str(small)).fingerprint()
