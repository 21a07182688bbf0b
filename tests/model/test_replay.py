"""Replay: every site is the reference's operation on the candidate's own inputs, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parity.reference.checkpoint import find
from parity.reference.floor import Local, local_error
from parity.reference.pieces import EMBED, PiecewiseModel
from parity.reference.replay import Reference, Replayed
from parity.sites import Site
from tests.conftest import slow_but

pytestmark = pytest.mark.usefixtures("one_piece_at_a_time")
IDS = (torch.arange(2 * 11).reshape(2, 11) * 37 + 11) % 200
Recording = dict[str, Tensor]


def reference(path: Path, dtype: torch.dtype = torch.bfloat16, *, inner: bool = False) -> Reference:
    return Reference(PiecewiseModel(find(str(path)), dtype, inner=inner))


def recording(of: Reference, ids: Tensor = IDS) -> Recording:
    """The reference's own plain run."""
    seen: Recording = {}

    def tap(site: str, value: Tensor) -> Tensor:
        seen[site] = value.clone()
        return value

    hidden = None
    for piece in of.working.pieces:
        with of.working.loaded(piece):
            hidden = of.working.run(piece, ids, hidden, tap)
    return seen


def replayed(of: Reference, candidate: Recording, ids: Tensor = IDS) -> dict[str, Replayed]:
    """Every site after the replay; its tensors are copied because a piece's memory may be used again."""
    return {s.site.name: s for _, sites in of.replay(ids, lambda site: candidate.get(site.name)) for s in sites}


def measured(site: Replayed, of: Reference) -> Local:
    return local_error(site, of.working.dtype, of.working.dtype, of.working.head_dim)


@pytest.fixture(scope="module")
def half(checkpoint: Callable[..., Path]) -> Reference:
    return reference(checkpoint("qwen3", layers=2))


@pytest.fixture(scope="module")
def plain(half: Reference) -> Recording:
    return recording(half)


TYPES = ("qwen3", "qwen3_moe", "gemma3_text", "phi3", "olmo2", "gpt_neox", "mistral")


@pytest.mark.parametrize(
    "dtype", slow_but([torch.float32, torch.bfloat16], [torch.float32, torch.bfloat16, torch.float16]), ids=str
)
@pytest.mark.parametrize("model_type", slow_but(["qwen3"], TYPES))
def test_the_reference_is_its_own_perfect_candidate(
    checkpoint: Callable[..., Path], model_type: str, dtype: torch.dtype
) -> None:
    of = reference(checkpoint(model_type, **({"layers": 2} if model_type == "qwen3" else {})), dtype, inner=True)
    own = recording(of)
    sites = replayed(of, own)
    assert list(sites) == [s.name for s in of.working.sites] == list(own)
    for name, site in sites.items():
        assert torch.equal(site.own, own[name]), name
        local = measured(site, of)
        assert local.bit_equal, name
        assert local.ratio <= 1.0001, name
        assert local.inherited_rel < 0.2, name


def test_every_tensor_has_the_shape_and_the_precision_that_it_should(
    first: dict[str, Replayed], plain: Recording
) -> None:
    for name, site in first.items():
        tensors = (site.own, site.ideal, site.truth, site.floor, site.jitter)
        assert {t.shape for t in tensors} == {plain[name].shape}
        assert site.own.dtype is site.floor.dtype is torch.bfloat16
        assert site.ideal.dtype is site.truth.dtype is site.jitter.dtype is torch.float32


def test_without_a_candidate_the_replay_is_the_plain_run(half: Reference, plain: Recording) -> None:
    for name, site in replayed(half, {}).items():
        assert site.candidate is None
        assert torch.equal(site.floor, site.own), name
        assert torch.equal(site.truth, site.ideal), name
        assert torch.equal(site.jitter, site.ideal), name
        assert torch.equal(site.own, plain[name]), name


def without(candidate: Recording, *names: str) -> Recording:
    return {name: value for name, value in candidate.items() if name not in names}


def changed(candidate: Recording, name: str, change: Callable[[Tensor], Tensor]) -> Recording:
    return candidate | {name: change(candidate[name])}


def affected(of: Reference, before: dict[str, Replayed], after: Recording) -> set[str]:
    """Sites whose truth is another than it was before the candidate was changed."""
    now = replayed(of, after)
    return {name for name in now if not torch.equal(now[name].truth, before[name].truth)}


@pytest.fixture(scope="module")
def first(half: Reference, plain: Recording) -> dict[str, Replayed]:
    return replayed(half, plain)


L0 = "model.layers.0."


READERS: dict[str, set[str]] = {
    "model.embed_tokens": {L0 + "input_layernorm", L0 + "resid_mid"},
    L0 + "input_layernorm": {L0 + f"self_attn.{n}_proj" for n in "qkv"},
    L0 + "self_attn.q_proj": {L0 + "self_attn.q_norm"},
    L0 + "self_attn.v_proj": {L0 + "self_attn.context"},
    L0 + "self_attn.q_rope": {L0 + "self_attn.context"},
    L0 + "self_attn.context": {L0 + "self_attn.o_proj"},
    L0 + "self_attn.o_proj": {L0 + "resid_mid"},
    L0 + "resid_mid": {L0 + "post_attention_layernorm", L0.rstrip(".")},
    L0 + "mlp.act_fn": {L0 + "mlp.product"},
    L0 + "mlp.product": {L0 + "mlp.down_proj"},
    L0 + "mlp.down_proj": {L0.rstrip(".")},
    L0.rstrip("."): {"model.layers.1.input_layernorm", "model.layers.1.resid_mid"},
    "model.layers.1": {"model.norm"},
    "model.norm": {"lm_head"},
    "lm_head": set(),
}


@pytest.mark.parametrize(
    "site", slow_but(["model.embed_tokens", L0 + "self_attn.q_rope", L0 + "resid_mid", "model.layers.0"], READERS)
)
def test_a_change_reaches_the_operations_that_read_it_and_no_others(
    half: Reference, plain: Recording, first: dict[str, Replayed], site: str
) -> None:
    other = changed(plain, site, lambda x: x * 1.5 + 0.25)
    assert affected(half, first, other) == READERS[site]


def test_a_site_that_was_not_recorded_is_not_replaced(half: Reference, plain: Recording) -> None:
    gone = L0 + "input_layernorm"
    bent = changed(plain, "model.embed_tokens", lambda x: x * 1.5 + 0.25)
    sites = replayed(half, without(bent, gone))
    assert sites[gone].candidate is None
    # Its operation is part of the next ones now: they follow what came before it.
    expected = {gone, L0 + "resid_mid"} | {L0 + f"self_attn.{n}_proj" for n in "qkv"}
    assert affected(half, replayed(half, without(plain, gone)), without(bent, gone)) == expected


def test_layer_outputs_alone_cut_the_model_into_layers(half: Reference, plain: Recording) -> None:
    ends = ("model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head")
    coarse = {name: plain[name] for name in ends}
    bent = changed(coarse, "model.layers.0", lambda x: -x)
    touched = affected(half, replayed(half, coarse), bent)
    assert "model.layers.1" in touched
    assert not [name for name in touched if name.startswith("model.layers.0") or name in ("model.norm", "lm_head")]


def test_a_replaced_input_really_flows_on_into_the_residual(
    half: Reference, plain: Recording, first: dict[str, Replayed]
) -> None:
    """The residual is read from `resid_mid` by the layer itself, not through any module."""
    rest = torch.randn(plain[L0 + "resid_mid"].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    other = plain | {L0 + "resid_mid": rest}
    sites = replayed(half, other)
    site = sites["model.layers.0"]
    expected = rest.float() + plain[L0 + "mlp.down_proj"].float()
    torch.testing.assert_close(site.truth, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(site.floor, rest + plain[L0 + "mlp.down_proj"])
    mid = sites[L0 + "resid_mid"]
    assert not torch.equal(mid.floor, rest), "what the reference computed is kept, not what replaced it"
    assert torch.equal(mid.floor, first[L0 + "resid_mid"].floor)


def test_the_candidates_recording_is_left_as_it_was(half: Reference, plain: Recording) -> None:
    kept = {name: value.clone() for name, value in plain.items()}
    replayed(half, plain)
    assert all(torch.equal(kept[name], plain[name]) for name in kept)


def test_a_candidate_in_a_wider_dtype_is_used_as_it_is(half: Reference, plain: Recording) -> None:
    wide = {name: value.float() * (1 + 2**-14) for name, value in plain.items()}
    sites = replayed(half, wide)
    expected = wide["model.embed_tokens"] + wide[L0 + "self_attn.o_proj"]
    torch.testing.assert_close(sites[L0 + "resid_mid"].truth, expected, rtol=1e-6, atol=1e-6)
    narrow = replayed(half, plain)[L0 + "resid_mid"].truth
    assert not torch.allclose(sites[L0 + "resid_mid"].truth, narrow, rtol=1e-5, atol=0), "the extra bits count"


def test_two_replays_give_the_same_bits_and_serve_other_prompts(
    half: Reference, plain: Recording, first: dict[str, Replayed]
) -> None:
    ids = IDS[:1, :5]
    short = replayed(half, recording(half, ids), ids)
    assert short["lm_head"].own.shape[:2] == (1, 5)
    again = replayed(half, plain)
    for name, site in first.items():
        for one, other in zip(tensors_of(site), tensors_of(again[name]), strict=True):
            assert torch.equal(one, other), name


def tensors_of(site: Replayed) -> Iterator[Tensor]:
    yield from (site.own, site.ideal, site.truth, site.floor, site.jitter)


def test_jitter_moves_what_the_candidate_recorded_by_less_than_its_rounding(first: dict[str, Replayed]) -> None:
    for name in (L0 + "self_attn.o_proj", L0 + "mlp.product", "model.norm"):
        site = first[name]
        moved = float((site.jitter - site.truth).norm() / site.truth.norm())
        assert 2**-11 < moved < 2**-7, name
    embedded = first["model.embed_tokens"]
    assert torch.equal(embedded.jitter, embedded.truth), "no inputs to move"


def test_summands_are_the_length_of_the_inner_axis(first: dict[str, Replayed]) -> None:
    assert first[L0 + "self_attn.q_proj"].summands == 80
    assert first[L0 + "mlp.down_proj"].summands == 112
    assert first["lm_head"].summands == 80
    assert first[L0 + "self_attn.context"].summands == IDS.shape[-1], "of the run, not of the probe"
    assert first[L0 + "input_layernorm"].summands == first[L0 + "resid_mid"].summands == 1


def test_a_score_sums_as_many_products_as_a_head_is_wide(checkpoint: Callable[..., Path]) -> None:
    model = reference(checkpoint("qwen3", layers=2), inner=True).working
    (scores,) = [s for s in model.sites if s.name == L0 + "self_attn.scores"]
    assert model.head_dim not in (None, scores.shape[-1]), "the two can be told apart"
    assert model.summands(scores, 11) == model.head_dim


# -- memory --------------------------------------------------------------------------------------------------


def numbers_held(model: PiecewiseModel) -> int:
    return sum(p.numel() for p in model.model.parameters() if not p.is_meta)


def test_weights_of_one_piece_at_a_time_are_in_memory(checkpoint: Callable[..., Path]) -> None:
    of = reference(checkpoint("qwen3"))
    own = recording(of)
    ends = {n: p.numel() for n, p in of.working.model.named_parameters() if ".layers." not in n}
    layer = sum(p.numel() for p in of.working.layers[0].parameters())
    during: list[tuple[int, int]] = []

    def candidate(site: Site) -> Tensor | None:
        during.append((numbers_held(of.working), numbers_held(of.precise)))
        return own.get(site.name)

    hooks = [
        part.register_forward_pre_hook(lambda *_: during.append((numbers_held(of.working), numbers_held(of.precise))))
        for part in (*of.working.layers, of.working.model.lm_head)
    ]
    after = [(piece, numbers_held(of.working), numbers_held(of.precise)) for piece, _ in of.replay(IDS, candidate)]
    for hook in hooks:
        hook.remove()
    assert [piece for piece, *_ in after] == of.working.pieces
    assert {held[1:] for held in after} == {(0, 0)}, "between pieces nothing is held"
    assert {0, layer, sum(ends.values())} == {held for held, _ in during}
    assert max(held for _, held in during) <= max(layer, sum(ends.values()))


def test_a_replay_that_is_given_up_holds_nothing(half: Reference, plain: Recording) -> None:
    steps = half.replay(IDS, lambda site: plain.get(site.name))
    assert next(steps)[0] == EMBED
    steps.close()
    assert numbers_held(half.working) == numbers_held(half.precise) == 0


class PlantedError(Exception):
    pass


def test_a_recording_that_cannot_be_read_leaves_the_reference_usable(half: Reference, plain: Recording) -> None:
    def candidate(site: Site) -> Tensor | None:
        if site.name == "model.layers.1.mlp.product":
            raise PlantedError
        return plain.get(site.name)

    with pytest.raises(PlantedError):
        list(half.replay(IDS, candidate))
    assert numbers_held(half.working) == 0
    assert measured(replayed(half, plain)["lm_head"], half).bit_equal
