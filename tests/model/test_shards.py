"""Some pieces alone are replayed as all are: a shard measures what a single process would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parity.errors import UsageError
from parity.reference.checkpoint import find
from parity.reference.pieces import HEAD, Piece, PiecewiseModel
from parity.reference.replay import Reference, Replayed
from parity.shards import Shard
from tests.architectures import make
from tests.conftest import slow_but

pytestmark = pytest.mark.usefixtures("one_piece_at_a_time")
IDS = (torch.arange(2 * 7).reshape(2, 7) * 37 + 11) % 200
Recording = dict[str, Tensor]


def recording(of: Reference) -> Recording:
    """A candidate that rounds its weights otherwise: the reference's truth, rounded late."""
    sites = [site for _, piece in of.replay(IDS, lambda _site: None) for site in piece]
    seen = {site.site.name: site.ideal.to(site.own.dtype) for site in sites if isinstance(site.ideal, Tensor)}
    return {name: value.clone() for name, value in seen.items()}


def replayed(of: Reference, candidate: Recording, wanted: Sequence[Piece] | None) -> dict[Piece, list[Replayed]]:
    return dict(of.replay(IDS, lambda site: candidate.get(site.name), noise=1, wanted=wanted))


def tensors(site: Replayed) -> list[Tensor]:
    found = (site.own, site.plain, site.ideal, site.truth, site.floor, site.jitter, *site.noise)
    return [value for value in found if isinstance(value, Tensor)]


@pytest.mark.parametrize("left", ["all", "no layer outputs", "outputs of layers alone"])
@pytest.mark.parametrize("family", slow_but(["qwen3"], ["qwen3", "qwen3_moe", "gemma3_text", "gpt_neox"]))
def test_wanted_pieces_are_what_they_are_among_all(checkpoint: Callable[..., Path], family: str, left: str) -> None:
    of = Reference(PiecewiseModel(find(str(checkpoint(family))), torch.bfloat16))
    ends = {of.working.source_of(piece) for piece in of.working.pieces}
    keep = {"all": lambda _: True, "no layer outputs": lambda name: name not in ends}.get(left, ends.__contains__)
    candidate = {name: value for name, value in recording(of).items() if keep(name)}
    whole = replayed(of, candidate, None)
    routes = dict(of.routes)
    for wanted in ([1, HEAD], [2]):
        some = replayed(of, candidate, wanted)
        assert list(some) == wanted
        for piece in wanted:
            for now, before in zip(some[piece], whole[piece], strict=True):
                assert now.site == before.site
                assert all(map(torch.equal, tensors(now), tensors(before))), now.site.name
                if now.site.name in routes:
                    assert torch.equal(of.routes[now.site.name].choice, routes[now.site.name].choice)


@pytest.mark.slow
def test_keys_that_a_later_layer_takes_are_made_all_the_same(tmp_path: Path) -> None:
    of = Reference(PiecewiseModel(find(str(make("gemma3n", tmp_path / "model"))), torch.bfloat16))
    candidate = recording(of)
    whole, some = replayed(of, candidate, None), replayed(of, candidate, [3])
    for now, before in zip(some[3], whole[3], strict=True):
        assert all(map(torch.equal, tensors(now), tensors(before))), now.site.name


def test_no_piece_is_run_for_its_inputs_if_the_record_says_what_comes_of_it(checkpoint: Callable[..., Path]) -> None:
    of = Reference(PiecewiseModel(find(str(checkpoint("qwen3"))), torch.bfloat16))
    candidate, runs = recording(of), list[Piece]()
    run = of.working.run

    def counted(piece: Piece, *arguments: object) -> Tensor:
        runs.append(piece)
        return run(piece, *arguments)  # type: ignore[arg-type]

    of.working.run = counted  # type: ignore[method-assign]
    replayed(of, candidate, [2])
    assert runs.count(1) == 1, "the reference's own run"
    assert runs.count(2) == 2, "that, and the floor"
    assert 3 not in runs, "nobody asked for what comes later"


@pytest.mark.parametrize("pieces", [1, 2, 7, 30])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_every_piece_is_in_one_shard(pieces: int, count: int) -> None:
    every = list(range(pieces))
    shares = [Shard(number, count).share(every) for number in range(1, count + 1)]
    assert [piece for share in shares for piece in share] == every
    assert all(len(a) >= len(b) - 1 for a, b in pairwise(shares)), "the way is long for the last"


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", "1/ 2"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no part of a whole"):
        Shard.parse(text)
    assert str(Shard.parse("2/3")) == "2/3"
